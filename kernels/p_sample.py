"""One row of a step table in one pass: guidance, data prediction, clipping, history, noise, in-painting, next model input.

`fastdiff.table` defines what a row means; this file executes it for any mixture of rows in a batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.layout import is_channels_last
from fastdiff.kernels.philox import normal_ref, per_sample, sample_index

FLOAT_COLUMNS = ("t", "c_next", "px", "pm", "lim", "g", "mg", "vg", "cx", "c0", "cm", "cz", "lv")
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


def p_sample_ref(
    x: Tensor,
    model_output: Tensor | None,
    table: DeviceTable,
    row: Tensor,
    *,
    model_output_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    sample_indices: Tensor | None = None,
    threshold: Tensor | None = None,
    rescale: Tensor | None = None,
    grad: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    model_input_out: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> None:
    """`p_sample_` in plain PyTorch, operation by operation; seed and sample_indices are int64 [B] here."""
    batch, channels = x.shape[0], x.shape[1]
    valid = (row >= 0) & (row < table.floats.shape[0])
    index = torch.where(valid, row, 0).long()

    def spread(value: Tensor) -> Tensor:
        return value.view(batch, *[1] * (x.ndim - 1))

    columns = [spread(column) for column in table.floats[index].unbind(1)]
    c = dict(zip(FLOAT_COLUMNS, columns))
    slot, draw, stream = table.integers[index].unbind(1)

    state = x.float()
    px = torch.where(spread(valid), c["px"], torch.nan)
    x0 = px * state
    uses_model = (c["pm"] != 0) | (c["cm"] != 0) | (c["um"] != 0)
    m = None
    if model_output is not None:
        m = model_output[:, :channels].float()
        if model_output_uncond is not None:
            m_uncond = model_output_uncond[:, :channels].float()
            m = m_uncond + c["g"] * (m - m_uncond)
        if rescale is not None:
            m = spread(rescale) * m
    if grad is not None:
        grad = grad.float()
        guide = torch.where(c["mg"] != 0, c["mg"] * grad, 0.0)
        m = guide if m is None else m + guide
    if m is not None:
        m = torch.where(uses_model, m, 0.0)
        x0 = x0 + c["pm"] * m
    if threshold is None:
        x0 = torch.clamp(x0, -c["lim"], c["lim"])
    else:
        limit = spread(threshold)
        x0 = torch.clamp(x0, -limit, limit) / limit

    x_next = c["cx"] * state + c["c0"] * x0
    if m is not None:
        x_next = x_next + c["cm"] * m
    if history is not None:
        for h, value in zip(columns[HISTORY_OFFSET:], history.unbind(0)):
            x_next = x_next + torch.where(h != 0, h * value.float(), 0.0)

    draws = spread(draw >= 0) & ((c["cz"] != 0) | (c["kz"] != 0))
    std, variance = c["cz"], c["vg"]
    if model_output is not None and model_output.shape[1] != channels:
        reads = (c["lv"] != 0) & (draws | (c["vg"] != 0))
        factor = torch.exp(c["lv"] * torch.where(reads, model_output[:, channels:].float(), 0.0))
        std, variance = std * factor, variance * (factor * factor)
    z = None
    if noise is not None:
        z = torch.where(draws, noise.float(), 0.0)
    elif seed is not None and sample_indices is not None:
        z = normal_ref(seed, sample_indices, draw.long(), stream.long(), tuple(x.shape), is_channels_last(x))
        z = torch.where(draws, z, 0.0)
    if z is not None:
        x_next = x_next + std * z
    if grad is not None:
        x_next = x_next + torch.where(c["vg"] != 0, variance * grad, 0.0)
    if mask is not None and known is not None:
        kept = torch.where(c["k0"] != 0, c["k0"] * known.float(), 0.0)
        if z is not None:
            kept = kept + c["kz"] * z
        mask = mask.float()
        x_next = mask * kept + (1.0 - mask) * x_next

    if history is not None and history.shape[0] > 0:
        y = c["ux"] * state + c["u0"] * x0
        if m is not None:
            y = y + c["um"] * m
        sample = torch.arange(batch, device=x.device)
        keeps = valid & (slot >= 0)
        target = torch.where(keeps, slot, 0).long()
        y = torch.where(spread(keeps), y.to(history.dtype), history[target, sample])
        history.index_put_((target, sample), y)
    if x0_out is not None:
        x0_out.copy_(x0)
    if model_input_out is not None:
        model_input_out.view(-1, *x.shape).copy_((c["c_next"] * x_next).to(model_input_out.dtype))
    x.copy_(x_next)


def p_sample_(
    x: Tensor,
    model_output: Tensor | None,
    table: DeviceTable,
    row: Tensor,
    *,
    model_output_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_indices: Tensor | None = None,
    threshold: Tensor | None = None,
    rescale: Tensor | None = None,
    grad: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    model_input_out: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> None:
    """Execute one row of a step table per sample, in place on x."""
    if seed is not None:
        seed = per_sample(seed, x.shape[0], x.device, "seed")
        sample_indices = sample_index(sample_indices, x.shape[0], x.device)
    p_sample_ref(
        x,
        model_output,
        table,
        row,
        model_output_uncond=model_output_uncond,
        history=history,
        noise=noise,
        seed=seed,
        sample_indices=sample_indices,
        threshold=threshold,
        rescale=rescale,
        grad=grad,
        mask=mask,
        known=known,
        model_input_out=model_input_out,
        x0_out=x0_out,
    )
