"""Random calls of every kernel: shapes, dtypes, options, timesteps and rows out of range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET, DeviceTable
from fastdiff.kernels.dropout import dropout
from fastdiff.kernels.group_norm import group_norm_silu
from fastdiff.kernels.mse import TARGETS, mse
from fastdiff.kernels.p_sample import p_sample_
from fastdiff.kernels.philox import STREAMS
from fastdiff.kernels.q_sample import q_sample
from fastdiff.kernels.solver_step import solver_step
from fastdiff.kernels.uniform import uniform_words
from fastdiff.noise import normal

Random = np.random.Generator
STEPS = 7
OUT_OF_RANGE = (-1, STEPS, 2**31 - 1, -(2**31))
# cut off to 32 bits the first is negative and the second a step like any other
OUT_OF_INT32 = (2**31, 2**32 + 1)


@dataclass(kw_only=True)
class Call:
    """One call of a kernel.

    Attributes:
        function: takes `arguments` and returns its results by name; what it writes in place is among the arguments.
        arguments: contiguous tensors and other values.
        alike: names of arguments that must lie in memory as x does.
        like: of others, the argument that they must lie like.
        written: names of arguments that the call writes.
        dtype: of the results.
        error: float32 arithmetic may be off by this share of the largest result.
    """

    function: Callable[..., dict[str, Tensor]]
    arguments: dict[str, Any]
    alike: tuple[str, ...] = ()
    like: dict[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    # sums of up to 4096 terms in another order, sqrt(4096) * 2^-24 = 4e-6 of their size, and as much for the rest
    error: float = 1e-5


def shape_of(random: Random, *, least: int = 1) -> tuple[int, ...]:
    """[B], [B, C] or [B, C, *spatial], at most 4096 elements; one in ten is empty."""
    ndim = int(random.integers(least, 6))
    while True:
        shape = [int(size) for size in random.choice([1, 1, 2, 3, 4, 5, 7, 8, 16, 33], ndim)]
        if random.random() < 0.1:
            shape[int(random.integers(ndim))] = 0
        if np.prod(shape) <= 4096:
            return tuple(shape)


def normals(random: Random, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape)).to(dtype)


def a_dtype(random: Random) -> torch.dtype:
    return FLOAT_DTYPES[int(random.integers(3))]


def counters(random: Random, batch: int) -> dict[str, Tensor]:
    """Of the whole range that the contract allows."""
    return {
        "seed": torch.from_numpy(random.integers(0, 2**63 - 1, batch)),
        "sample_indices": torch.from_numpy(random.integers(0, 2**32, batch)),
        "draw": torch.from_numpy(random.integers(0, 2**32, batch)),
    }


def row_numbers(random: Random, batch: int, dtype: torch.dtype) -> Tensor:
    """Mostly in [0, STEPS)."""
    numbers = random.integers(0, STEPS, batch)
    outside = random.random(batch) < 0.15
    values = OUT_OF_RANGE if dtype == torch.int32 else OUT_OF_RANGE + OUT_OF_INT32
    return torch.from_numpy(np.where(outside, random.choice(values, batch), numbers)).to(dtype)


def noise_source(random: Random, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Given, or made in the kernel."""
    if random.random() < 0.4:
        return {"noise": normals(random, shape, a_dtype(random))}
    return counters(random, shape[0])


def images(random: Random, shape: tuple[int, ...]) -> Tensor:
    """Pixels, or floats."""
    if random.random() < 0.3:
        return torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))
    return normals(random, shape, a_dtype(random))


def normal_call(random: Random) -> Call:
    shape = shape_of(random)
    stream = str(random.choice(list(STREAMS)))
    memory_format = torch.channels_last if random.random() < 0.5 else torch.contiguous_format
    return Call(
        function=lambda **keys: {"noise": normal(shape, stream=stream, memory_format=memory_format, **keys)},
        arguments=counters(random, shape[0]),
    )


def uniform_call(random: Random) -> Call:
    stream = str(random.choice(list(STREAMS)))
    return Call(
        function=lambda **arguments: {"words": uniform_words(stream=stream, **arguments)},
        arguments=counters(random, int(random.integers(0, 600))),
    )


def dropout_call(random: Random) -> Call:
    shape, dtype = shape_of(random), a_dtype(random)
    p, layer = float(random.choice([0.0, 0.1, 0.5, 0.99])), int(random.integers(1024))
    keys = torch.stack(list(counters(random, shape[0]).values()), 1)
    return Call(
        function=lambda x, keys: {"out": dropout(x, p, keys, layer)},
        arguments={"x": normals(random, shape, dtype), "keys": keys},
        dtype=dtype,
    )


def q_sample_call(random: Random) -> Call:
    shape, dtype = shape_of(random), a_dtype(random)
    formats = [torch.channels_last, torch.contiguous_format, torch.preserve_format]
    memory_format = formats[int(random.integers(3))]
    arguments: dict[str, Any] = {
        "x_start": images(random, shape),
        "t": row_numbers(random, shape[0], (torch.int64, torch.int32)[int(random.integers(2))]),
        "schedule_table": normals(random, (STEPS, 4)),
        "out_dtype": dtype,
        **noise_source(random, shape),
    }
    return Call(
        function=lambda **given: {"x_t": q_sample(**given, memory_format=memory_format)},
        arguments=arguments,
        dtype=dtype,
    )


def mse_call(random: Random) -> Call:
    shape, dtype = shape_of(random), a_dtype(random)
    target = str(random.choice(list(TARGETS)))
    arguments: dict[str, Any] = {
        "model_output": normals(random, shape, dtype),
        "x_start": images(random, shape),
        "t": row_numbers(random, shape[0], torch.int64),
        "schedule_table": normals(random, (STEPS, 4)),
        "weight": normals(random, shape[:1]).abs() if random.random() < 0.5 else None,
        **noise_source(random, shape),
    }
    return Call(
        function=lambda **given: dict(zip(("loss", "grad"), mse(**given, target=target))),
        arguments=arguments,
        dtype=dtype,
    )


def group_norm_call(random: Random) -> Call:
    shape, dtype = shape_of(random, least=2), a_dtype(random)
    channels = shape[1]
    divisors = [number for number in range(1, channels + 1) if channels % number == 0] or [1]
    groups, silu = int(random.choice(divisors)), bool(random.random() < 0.5)
    arguments: dict[str, Any] = {
        "x": normals(random, shape, dtype),
        "weight": normals(random, (channels,)),
        "bias": normals(random, (channels,)),
    }
    if random.random() < 0.5:
        arguments["channel_bias"] = normals(random, shape[:2] if random.random() < 0.5 else (channels,))
    if random.random() < 0.5:
        arguments |= {"scale": normals(random, shape[:2]), "shift": normals(random, shape[:2])}
    # a group of equal elements: their rounding, 2^-24 of their size, is divided by sqrt(eps)
    return Call(
        function=lambda **given: {"y": group_norm_silu(**given, num_groups=groups, eps=1e-5, silu=silu)},
        arguments=arguments,
        dtype=dtype,
        error=1e-4,
    )


def p_sample_call(random: Random) -> Call:
    shape, dtype = shape_of(random, least=2), a_dtype(random)
    slots = int(random.integers(0, 3))
    floats = normals(random, (STEPS, HISTORY_OFFSET + slots))
    floats[:, FLOAT_COLUMNS.index("lim")] = 0.7 if random.random() < 0.5 else torch.inf
    integers = torch.from_numpy(random.integers(-1 if slots == 0 else 0, max(slots, 1), (STEPS, 1)))
    integers = torch.cat([integers, torch.from_numpy(random.integers(0, 9, (STEPS, 1))), torch.ones(STEPS, 1)], 1)
    model_dtype = a_dtype(random)
    arguments: dict[str, Any] = {
        "x": normals(random, shape, dtype),
        "model_output": normals(random, shape, model_dtype),
        "row": row_numbers(random, shape[0], torch.int32),
        "floats": floats,
        "integers": integers.int(),
        "x0_out": torch.zeros(shape, dtype=dtype),
        "model_input_out": torch.zeros(shape, dtype=dtype),
        "history": normals(random, (slots, *shape)) if slots else None,
    }
    like = {}
    if random.random() < 0.3:
        arguments["model_output_uncond"] = normals(random, shape, model_dtype)
        like["model_output_uncond"] = "model_output"
    if random.random() < 0.3:
        arguments |= {"mask": normals(random, shape).sigmoid(), "known": normals(random, shape)}
    if random.random() < 0.5:
        arguments["noise"] = normals(random, shape)
    else:
        arguments |= {name: value for name, value in counters(random, shape[0]).items() if name != "draw"}
    written = ("x", "x0_out", "model_input_out", *(["history"] if slots else []))

    def function(**given: Tensor) -> dict[str, Tensor]:
        p_sample_(table=DeviceTable(given.pop("floats"), given.pop("integers")), **given)
        return {name: given[name] for name in written}

    return Call(
        function=function,
        arguments=arguments,
        alike=("x0_out", "model_input_out", "history"),
        like=like,
        written=written,
        dtype=dtype,
    )


def solver_step_call(random: Random) -> Call:
    shape, dtype = shape_of(random), a_dtype(random)
    n_history = int(random.integers(0, 3))
    floats = normals(random, (STEPS, HISTORY_OFFSET + n_history))
    floats[:, FLOAT_COLUMNS.index("lim")] = 0.7 if random.random() < 0.5 else torch.inf
    one_row = random.random() < 0.5
    arguments: dict[str, Any] = {
        "sample": normals(random, shape, dtype),
        "model_output": normals(random, shape, dtype),
        "row": row_numbers(random, 1 if one_row else shape[0], torch.int64),
        "floats": floats,
        **{f"age {age}": normals(random, shape, dtype) for age in range(n_history)},
    }
    if random.random() < 0.5:
        arguments["noise"] = normals(random, shape)

    def function(**given: Any) -> dict[str, Tensor]:
        history = [given.pop(f"age {age}") for age in range(n_history)]
        results = solver_step(history=history, remember=True, return_x0=True, **given)
        return dict(zip(("x", "x0", "y"), results))

    return Call(function=function, arguments=arguments, dtype=dtype)


CALLS = (
    normal_call,
    uniform_call,
    dropout_call,
    q_sample_call,
    mse_call,
    group_norm_call,
    p_sample_call,
    solver_step_call,
)
