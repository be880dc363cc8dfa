"""The step table as the `p_sample` kernel reads it, and the arguments that fit it."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES, check_tensor, strides_match
from fastdiff.kernels.layout import sample_extent

FLOAT_COLUMNS: tuple[str, ...] = ("t", "c_next", "px", "pm", "lim", "g", "mg", "vg", "cx", "c0", "cm", "cz", "lv")
FLOAT_COLUMNS += ("ux", "u0", "um", "k0", "kz")
HISTORY_OFFSET = len(FLOAT_COLUMNS)
INT_COLUMNS = ("slot", "draw", "stream")


class DeviceTable(NamedTuple):
    """A step table packed for the kernel.

    Attributes:
        floats: float32 [R, HISTORY_OFFSET + K], the columns of `FLOAT_COLUMNS` and the K history coefficients.
        integers: int32 [R, 3], the columns of `INT_COLUMNS`.
    """

    floats: Tensor
    integers: Tensor


def check_arguments(
    x: Tensor,
    model_output: Tensor | None,
    table: DeviceTable,
    row: Tensor,
    model_output_uncond: Tensor | None,
    history: Tensor | None,
    inputs: dict[str, Tensor | None],
    scales: dict[str, Tensor | None],
    outputs: dict[str, Tensor | None],
) -> None:
    """The arguments of p_sample_ before anything is written; inputs are like x, scales [B], outputs laid out as x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim < 2 or x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"x must be a float32, float16 or bfloat16 tensor [B, C, *spatial], got {x.dtype} of {list(x.shape)}"
        )
    batch, channels, _ = sample_extent(x.shape)
    floats, integers = table
    n_rows, n_slots = floats.shape[0], floats.shape[-1] - HISTORY_OFFSET
    if floats.ndim != 2 or n_slots < 0 or n_rows < 1:
        raise ValueError(f"table.floats must be [R, {HISTORY_OFFSET} + K] with R >= 1, got {list(floats.shape)}")
    check_tensor("table.floats", floats, floats.shape, [torch.float32], x.device)
    check_tensor("table.integers", integers, (n_rows, len(INT_COLUMNS)), [torch.int32], x.device)
    check_tensor("row", row, (batch,), [torch.int32], x.device)
    any_float = (*FLOAT_DTYPES, torch.float64)
    if model_output is not None:
        doubled = model_output.ndim == x.ndim and model_output.shape[1] == 2 * channels
        shape = (batch, channels * (2 if doubled else 1), *x.shape[2:])
        check_tensor("model_output", model_output, shape, any_float, x.device)
    if model_output_uncond is not None:
        if model_output is None:
            raise ValueError("model_output must be given with model_output_uncond, got None")
        check_tensor("model_output_uncond", model_output_uncond, model_output.shape, any_float, x.device)
        if not strides_match(model_output_uncond, model_output):
            raise ValueError(
                f"model_output_uncond must have the strides of model_output, {model_output.stride()}, "
                f"got {model_output_uncond.stride()}"
            )
    for name, value in inputs.items():
        if value is not None:
            check_tensor(name, value, x.shape, any_float, x.device)
    for name, value in scales.items():
        if value is not None:
            check_tensor(name, value, (batch,), any_float, x.device)
    if (history is not None or n_slots > 0) and (history is None or history.shape != (n_slots, *x.shape)):
        got = None if history is None else list(history.shape)
        raise ValueError(f"history must have the shape [K, *x.shape] = {[n_slots, *x.shape]} of this table, got {got}")
    if history is not None:
        check_tensor("history", history, history.shape, any_float, x.device)
    written = {"x": x, **{f"history[{k}]": history[k] for k in range(n_slots) if history is not None}}
    for name, value in outputs.items():
        if value is not None:
            doubled = name == "model_input_out" and value.shape[0] == 2 * batch
            shape = (batch * (2 if doubled else 1), *x.shape[1:])
            check_tensor(name, value, shape, any_float, x.device)
            written[name] = value
    for name, value in written.items():
        if not strides_match(value[:1], x[:1]):
            raise ValueError(f"{name} must be laid out as x, with strides {x.stride()}, got {value.stride()}")
        if value.numel() and any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride())):
            raise ValueError(f"{name} is written and must not be an expanded tensor, got strides {value.stride()}")
