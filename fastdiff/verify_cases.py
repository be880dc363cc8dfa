"""Inputs for every kernel, dtype, layout and feature: what the kernels make of them, and `verify_formulas`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import noise, verify_formulas
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET, DeviceTable
from fastdiff.kernels.mse import TARGETS, mse
from fastdiff.kernels.p_sample import p_sample_
from fastdiff.kernels.philox import STREAMS
from fastdiff.kernels.q_sample import q_sample
from fastdiff.table import Row, StepTable
from fastdiff.verify_formulas import Rounded

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("channels_last", "contiguous", "strided")
# Odd sizes, so that no block, group of four normals or row of memory is whole.
SHAPE = (3, 3, 5, 7)
P_SAMPLE_FEATURES = (
    "plain",
    "guidance",
    "rescale",
    "clip",
    "threshold",
    "history",
    "learned variance",
    "gradient",
    "noise in kernel",
    "noise given",
    "in-painting",
    "state in dtype",
    "everything",
)

Outputs = dict[str, Tensor]
Expected = dict[str, Rounded]


@dataclass(frozen=True, eq=False)
class Case:
    """One call of a kernel.

    run(device, nudge) -> its outputs, with `nudge` added to one coefficient that `expect` does not know of.
    expect() -> the same by formula, and under "d" what that coefficient is multiplied with in the output "nudged".
    """

    kernel: str
    dtype: str
    layout: str
    feature: str
    run: Callable[[torch.device, float], Outputs]
    expect: Callable[[], Expected]
    nudged: str = ""

    @property
    def name(self) -> str:
        """For the option `only`."""
        return f"{self.kernel} {self.dtype} {self.layout} {self.feature}"

    @cached_property
    def expected(self) -> Expected:
        """Computed once, for all paths."""
        return self.expect()


class Inputs:
    """Random tensors of one case: the same values on every device, and in float64 for the formulas."""

    def __init__(self, *name: str, layout: str) -> None:
        self.random = np.random.default_rng(zlib.crc32(" ".join(name).encode()))
        self.layout = layout

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
        """Normals on the CPU in a dtype (uint8: all bytes)."""
        if dtype == torch.uint8:
            return torch.from_numpy(self.random.integers(0, 256, shape, dtype=np.uint8))
        return torch.from_numpy(self.random.standard_normal(shape)).to(dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 in [low, high)."""
        return torch.from_numpy(self.random.uniform(low, high, shape)).float()

    def counters(self) -> dict[str, Tensor]:
        """Seeds, sample numbers and draws int64 [B], large ones among them."""
        batch = SHAPE[0]
        return {
            "seed": torch.from_numpy(self.random.integers(0, 2**63 - 1, batch)),
            "sample_indices": torch.from_numpy(self.random.integers(0, 2**32, batch)),
            "draw": torch.from_numpy(self.random.integers(0, 2**32, batch)),
        }

    def place(self, value: Tensor, device: torch.device) -> Tensor:
        """A copy of [B, C, H, W] on the device in this layout."""
        return place(value, device, self.layout)


def place(value: Tensor, device: torch.device, layout: str) -> Tensor:
    """A copy of [..., C, H, W]; "strided" is every second column of a wider tensor, one element into its storage."""
    *leading, width = value.shape
    if layout == "strided":
        wide = torch.zeros((*leading, 2 * width + 1), dtype=value.dtype, device=device)
        result = wide[..., 1::2]
    elif layout == "channels_last":
        result = torch.empty_like(value.movedim(-3, -1), device=device, memory_format=torch.contiguous_format)
        result = result.movedim(-1, -3)
    else:
        result = torch.empty(value.shape, dtype=value.dtype, device=device)
    return result.copy_(value)


def exact(value: Tensor) -> Rounded:
    """A kernel's input for the formulas."""
    return Rounded.exact(value.double().numpy())


def cases() -> Iterator[Case]:
    """All of them; a case's kernels are only called when it runs."""
    for layout in ("channels_last", "contiguous"):
        for stream in STREAMS:
            yield normal_case(layout, stream)
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for source in ("noise in kernel", "noise given", "uint8, noise in kernel"):
                yield q_sample_case(dtype, layout, source)
            for target in TARGETS:
                for source in ("noise in kernel", "noise given", "uint8, noise in kernel"):
                    yield mse_case(dtype, layout, target, source)
            for feature in P_SAMPLE_FEATURES:
                yield p_sample_case(dtype, layout, feature)


def normal_case(layout: str, stream: str) -> Case:
    """`fastdiff.noise.normal`."""
    counters = Inputs("normal", layout, stream, layout=layout).counters()
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def run(device: torch.device, nudge: float) -> Outputs:
        on_device: dict[str, Any] = {name: value.to(device) for name, value in counters.items()}
        return {"noise": noise.normal(SHAPE, stream=stream, memory_format=memory_format, **on_device)}

    def expect() -> Expected:
        return {"noise": _normals(counters, STREAMS[stream])}

    return Case("normal", "float32", layout, stream, run, expect)


def q_sample_case(dtype: str, layout: str, feature: str) -> Case:
    """x_start of the dtype, or bytes; the result in the dtype."""
    inputs = Inputs("q_sample", dtype, layout, feature, layout=layout)
    x_start = inputs.tensor(torch.uint8 if "uint8" in feature else DTYPES[dtype])
    given = inputs.tensor(DTYPES[dtype]) if feature == "noise given" else None
    counters, table, t = inputs.counters(), inputs.uniform(-1, 1, 6, 4), torch.tensor([5, 0, 3])
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

    def run(device: torch.device, nudge: float) -> Outputs:
        nudged = table.clone()
        nudged[t, 0] += nudge
        x_t = q_sample(
            inputs.place(x_start, device),
            t.to(device),
            nudged.to(device),
            out_dtype=DTYPES[dtype],
            memory_format=formats.get(layout, torch.preserve_format),
            **_noise_arguments(inputs, given, counters, device),
        )
        return {"x_t": x_t}

    def expect() -> Expected:
        pixels = _pixels(x_start)
        eps = exact(given) if given is not None else _normals(counters, STREAMS["train"])
        return {"x_t": verify_formulas.q_sample(pixels, eps, table[t].double().numpy()), "d": pixels}

    return Case("q_sample", dtype, layout, feature, run, expect, nudged="x_t")


def mse_case(dtype: str, layout: str, target: str, source: str) -> Case:
    """The model's output in the dtype, x_start in it or bytes; weights and a loss scale."""
    inputs = Inputs("mse", dtype, layout, target, source, layout=layout)
    output = inputs.tensor(DTYPES[dtype])
    x_start = inputs.tensor(torch.uint8 if "uint8" in source else DTYPES[dtype])
    given = inputs.tensor(DTYPES[dtype]) if source == "noise given" else None
    counters, table, t = inputs.counters(), inputs.uniform(-1, 1, 6, 4), torch.tensor([5, 0, 3])
    uses_x_start, uses_noise = TARGETS[target]
    table[:, 2] *= uses_x_start
    table[:, 3] *= uses_noise
    weight, grad_scale = inputs.uniform(0.5, 2, SHAPE[0]), 3.0

    def run(device: torch.device, nudge: float) -> Outputs:
        nudged = table.clone()
        nudged[t, 2 if uses_x_start else 3] += nudge
        loss, grad = mse(
            inputs.place(output, device),
            inputs.place(x_start, device),
            t.to(device),
            nudged.to(device),
            target=target,
            weight=weight.to(device),
            grad_scale=grad_scale,
            **_noise_arguments(inputs, given, counters, device),
        )
        return {"loss": loss, "grad": grad}

    def expect() -> Expected:
        eps = exact(given) if given is not None else _normals(counters, STREAMS["train"])
        pixels, weights = _pixels(x_start), weight.double().numpy()
        columns = table[t].double().numpy()
        loss, grad = verify_formulas.mse(exact(output), pixels, eps, columns, weights, grad_scale)
        factor = Rounded.exact((weights * grad_scale * 2 / np.prod(SHAPE[1:]))[:, None, None, None])
        return {"loss": loss, "grad": grad, "d": (pixels if uses_x_start else eps) * factor}

    return Case("mse", dtype, layout, f"{target}, {source}", run, expect, nudged="grad")


def p_sample_case(dtype: str, layout: str, feature: str) -> Case:
    """Three samples at three different rows of one table; the model's output in the dtype."""
    inputs = Inputs("p_sample", dtype, layout, feature, layout=layout)

    def has(*features: str) -> bool:
        return feature in (*features, "everything")

    model_dtype = DTYPES[dtype]
    state_dtype = model_dtype if feature == "state in dtype" else torch.float32
    table = random_table(inputs, history=has("history"))
    device_table = table.to("cpu")
    batch, channels = SHAPE[:2]
    learned = has("learned variance")
    model_shape = (batch, (2 if learned else 1) * channels, *SHAPE[2:])
    given: dict[str, Tensor] = {"x": inputs.tensor(state_dtype), "m": inputs.tensor(model_dtype, model_shape)}
    if has("guidance"):
        given["uncond"] = inputs.tensor(model_dtype, model_shape)
    if has("history"):
        given["history"] = inputs.tensor(torch.float32, (table.n_slots, *SHAPE))
    if feature == "noise given":
        given["noise"] = inputs.tensor(torch.float32)
    if has("gradient"):
        given["grad"] = inputs.tensor(torch.float32)
    if has("in-painting"):
        given["known"] = inputs.tensor(torch.float32)
        given["mask"] = inputs.uniform(0, 1, *SHAPE)
    scales = {}
    if feature == "threshold":
        scales["threshold"] = inputs.uniform(0.3, 1.5, batch)
    if has("rescale"):
        scales["rescale"] = inputs.uniform(0.5, 1.5, batch)
    if not has("clip"):
        device_table.floats[:, FLOAT_COLUMNS.index("lim")] = torch.inf
    if not has("guidance", "rescale"):
        device_table.floats[:, FLOAT_COLUMNS.index("g")] = 1.0
    row = torch.tensor([2, 0, 1], dtype=torch.int32)
    draws = has("noise in kernel", "in-painting", "learned variance", "state in dtype")
    counters = inputs.counters() if draws else {}
    counters.pop("draw", None)

    def run(device: torch.device, nudge: float) -> Outputs:
        floats = device_table.floats.clone()
        floats[:, FLOAT_COLUMNS.index("cx")] += nudge
        placed = {name: inputs.place(value, device) for name, value in given.items()}
        x = placed["x"]
        # filled with NaN: an element that is not written shows
        x0 = inputs.place(torch.full(SHAPE, torch.nan, dtype=state_dtype), device)
        doubled = (2 * batch, *SHAPE[1:])
        model_input = inputs.place(torch.full(doubled, torch.nan, dtype=model_dtype), device)
        p_sample_(
            x,
            placed["m"],
            DeviceTable(floats.to(device), device_table.integers.to(device)),
            row.to(device),
            model_output_uncond=placed.get("uncond"),
            history=placed.get("history"),
            noise=placed.get("noise"),
            grad=placed.get("grad"),
            mask=placed.get("mask"),
            known=placed.get("known"),
            model_input_out=model_input,
            x0_out=x0,
            **{name: value.to(device) for name, value in (scales | counters).items()},
        )
        first, second = model_input.chunk(2)
        outputs = {"x": x, "x0": x0, "model input": first, "model input, second half": second}
        return outputs | ({"history": placed["history"]} if has("history") else {})

    def expect() -> Expected:
        index = row.long()
        columns = device_table.floats[index].double()[:, :, None, None, None].numpy()
        coefficients = {name: Rounded.exact(columns[:, i]) for i, name in enumerate(FLOAT_COLUMNS)}
        h = [Rounded.exact(columns[:, i]) for i in range(HISTORY_OFFSET, columns.shape[1])]
        slot, draw, stream = device_table.integers[index].long().unbind(1)
        values = {name: exact(value) for name, value in given.items() if name not in ("m", "uncond", "history")}
        z = values.pop("noise", None)
        if counters:
            z = _normals(counters | {"draw": draw}, stream.numpy())
        for name, value in scales.items():
            values[name] = Rounded.exact(value.double().numpy()[:, None, None, None])
        if "uncond" in given:
            values["m_uncond"] = exact(given["uncond"][:, :channels])
        if learned:
            values["v"] = exact(given["m"][:, channels:])
        slots = [exact(value) for value in given.get("history", torch.empty(0))]
        m = exact(given["m"][:, :channels])
        result = verify_formulas.p_sample(coefficients, h, m=m, slots=slots, z=z, **values)
        expected = {"x": result["x"], "x0": result["x0"], "d": _nudge_reach(values)}
        expected |= dict.fromkeys(("model input", "model input, second half"), result["model_input"])
        if slots:
            number = slot.numpy()[:, None, None, None]
            kept = [result["y"].where(number == k, value) for k, value in enumerate(slots)]
            expected["history"] = Rounded(np.stack([k.value for k in kept]), np.stack([k.error for k in kept]))
        return expected

    return Case("p_sample", dtype, layout, feature, run, expect, nudged="x")


def random_table(inputs: Inputs, *, history: bool) -> StepTable:
    """Three rows with every coefficient set, and for history a fourth that reads what the second wrote."""

    def random_row(i: int) -> Row:
        names = ("px", "pm", "mg", "vg", "cx", "c0", "cm", "cz", "lv", "ux", "u0", "um", "k0", "kz", "c_in")
        signs = inputs.random.choice([-1, 1], len(names))
        values = dict(zip(names, signs * inputs.random.uniform(0.3, 1.3, len(names))))
        values |= {"g": inputs.random.uniform(1.5, 4), "lim": inputs.random.uniform(0.4, 0.9)}
        read = {j: inputs.random.uniform(-1, 1) for j in range(i)} if history else {}
        return Row(**values, t=float(9 - i), draws=True, history=read)

    return StepTable.from_rows([random_row(i) for i in range(4)])


def _nudge_reach(values: dict[str, Any]) -> Rounded:
    """What cx is multiplied with in the new state: x, less the share of the known image."""
    x = values["x"]
    if "mask" not in values:
        return x
    return x * verify_formulas.total(Rounded.exact(1.0), -values["mask"])


def _pixels(x_start: Tensor) -> Rounded:
    if x_start.dtype == torch.uint8:
        return verify_formulas.pixels(x_start.double().numpy())
    return exact(x_start)


def _normals(counters: dict[str, Tensor], stream: Any) -> Rounded:
    seed, index, draw = (counters[name].numpy() for name in ("seed", "sample_indices", "draw"))
    return verify_formulas.normals(seed, index, draw, np.broadcast_to(stream, seed.shape), SHAPE)


def _noise_arguments(
    inputs: Inputs, given: Tensor | None, counters: dict[str, Tensor], device: torch.device
) -> dict[str, Any]:
    if given is not None:
        return {"noise": inputs.place(given, device)}
    return {name: value.to(device) for name, value in counters.items()}
