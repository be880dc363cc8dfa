"""Kernels take anything: every layout gives what a contiguous one gives, and nothing beside a tensor is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.kernels import dispatch, uniform
from fastdiff.verify import Path
from soak.kernel_calls import CALLS, Call, Random
from soak.kernel_layouts import Layout, Placed
from soak.trial import Attempt, NotSurvived, require, trial

ANYTHING = "Kernels take anything"
REFERENCE = Path("reference, CPU", "cpu", False)


def kernel_path() -> Path | None:
    """Where Triton runs: on a GPU, or in its interpreter if this process decorated the kernels for it."""
    if torch.cuda.is_available() and dispatch.HAS_TRITON:
        return Path("Triton, GPU", "cuda", True)
    interpreted = type(uniform._uniform_kernel).__name__ == "InterpretedFunction"
    return Path("Triton's interpreter", "cpu", True) if interpreted else None


def taken(path: Path, call: Call, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The results of the call by this way."""
    with path.taken():
        before, dispatch.INTERPRET = dispatch.INTERPRET, path.triton and path.device == "cpu"
        try:
            return call.function(**arguments)
        finally:
            dispatch.INTERPRET = before


def in_float32(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values, contiguous, for a result that is not rounded to a smaller dtype."""
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.float() if value.is_floating_point() else value
            value = value.clone(memory_format=torch.contiguous_format)
        plain[name] = torch.float32 if isinstance(value, torch.dtype) else value
    return plain


def laid_out(random: Random, call: Call, device: str) -> dict[str, Placed]:
    """Every tensor of the call somewhere in memory."""
    layouts: dict[str, Layout] = {}
    placed = {}
    for name, value in call.arguments.items():
        if not isinstance(value, Tensor):
            continue
        if name in call.alike:
            layout = layouts[call.written[0]]
            layout = layout.within() if name == "history" else layout
        else:
            layout = layouts[call.like[name]] if name in call.like else Layout.of(random, value.ndim)
        layouts[name] = layout
        placed[name] = layout.place(value.to(device))
    return placed


def require_right(got: Tensor, expected: Tensor, call: Call, path: Path, what: str) -> None:
    """Equal up to a rounding to the dtype, twice that where the interpreter cuts bfloat16 off, and float32 errors."""
    got = got.detach().cpu()
    require(got.shape == expected.shape, f"{what} is of shape {list(got.shape)}, not {list(expected.shape)}")
    if not expected.dtype.is_floating_point:
        require(torch.equal(got, expected), f"{what} differs")
        return
    expected = expected.double()
    size = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    unit = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0.0
    bound = unit * expected.abs() + (call.error + unit * 2**-4) * max(size, 1.0)
    wrong = (got.double() - expected).abs().gt(bound) | got.isnan().ne(expected.isnan())
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        values = f"{got[tuple(place)].item()} and not {expected[tuple(place)].item()}"
        raise NotSurvived(f"{what} is wrong in {int(wrong.sum())} places by {path.name}, the first {place}: {values}")


def require_refused(random: Random, call: Call, path: Path) -> None:
    """An argument of another dtype or, but for the first, of a larger batch is an error that names one."""
    names = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]
    name = str(random.choice(names))
    value = call.arguments[name]
    changed = value.to(torch.complex64)
    # a table may have any number of rows, one row stands for all samples, a guided model takes two batches
    if name not in (names[0], "schedule_table", "floats", "row", "model_input_out") and random.random() < 0.5:
        changed = torch.cat([value, value.new_zeros(2, *value.shape[1:])])
    arguments = {**call.arguments, name: changed}
    arguments = {key: value.to(path.device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    try:
        taken(path, call, arguments)
    except (ValueError, TypeError) as error:
        require(any(name in str(error) for name in (*names, "history")), f"a wrong {name} is reported as: {error}")
        return
    raise NotSurvived(f"{name} of {changed.dtype} and shape {list(changed.shape)} was taken")


@trial(promise=ANYTHING, tried="random call by every path", short=40, full=500)
def random_calls(folder: File) -> Iterator[Attempt]:
    paths = [path for path in (kernel_path(), REFERENCE) if path is not None]

    def attempt(number: int) -> str | None:
        build = CALLS[number % len(CALLS)]
        call = build(np.random.default_rng(number))
        title = f"{build.__name__} {[list(v.shape) for v in call.arguments.values() if isinstance(v, Tensor)]}"
        try:
            expected = taken(REFERENCE, call, in_float32(call.arguments))
        except ValueError as error:
            # there is no mean of nothing
            require("at least one element in each sample" in str(error), f"{title}: {error}")
            return "refused"
        refused = False
        for path in paths:
            random = np.random.default_rng(number + 2**32)
            placed = laid_out(random, call, path.device)
            arguments = {**call.arguments, **{name: value.tensor for name, value in placed.items()}}
            try:
                results = taken(path, call, arguments)
            except ValueError as error:
                # a volume whose axes do not merge
                require("do not merge into two axes" in str(error), f"{title} by {path.name}: {error}")
                refused = True
                continue
            for name, value in results.items():
                require_right(value, expected[name], call, path, f"{name} of {title}")
            for name, value in placed.items():
                intact = not value.changed(written=name in call.written)
                require(intact, f"{title} by {path.name} wrote where it should not, at {name}")
            if all(value.numel() for value in results.values()):
                require_refused(random, call, path)
        if refused:
            return "refused by one of the paths"
        return None if any(value.numel() for value in expected.values()) else "empty"

    yield attempt
