"""Group normalisation as a compiler for CPUs makes fast loops of it, forward and backward.

Inductor vectorises loops over neighbouring channels, but none that asks for the group of each. So sums run over one
spatial axis at a time with the channels side by side, and a group's figure reaches its channels by a sum with one term
that is not zero: the result of a sum is stored, it is not computed anew inside the next loop.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.layout import is_channels_last

# below these numbers of positions a sample, torch's own decomposition is as fast and has fewer loops
MIN_POSITIONS, MIN_POSITIONS_BACKWARD = 512, 64


def compiles_to_loops(x: Tensor) -> bool:
    """Whether `group_norm_silu_traced` is what a compiler should see for x."""
    compiling = torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype != torch.float64
    least = MIN_POSITIONS_BACKWARD if torch.is_grad_enabled() else MIN_POSITIONS
    return compiling and x.ndim > 2 and math.prod(x.shape[2:]) >= least and is_channels_last(x)


def group_norm_silu_traced(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`group_norm_silu` of a channels-last x [B, C, *spatial] with at least one spatial axis, for Inductor on a CPU.

    Statistics are float32, variances taken around the mean. Differentiable once.
    """
    return _GroupNormSiLU.apply(x, num_groups, weight, bias, eps, channel_bias, scale, shift, silu)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        num_groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        channel_bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
    ) -> Tensor:
        rows = x.movedim(1, -1).float()  # [B, *spatial, C]
        channel_mean = _spatial_mean(rows)
        mean = _group_mean(channel_mean, num_groups)
        if channel_bias is not None:
            # what is added before the norm moves the mean, and with it all values of a channel alike
            added = channel_bias.float().expand(len(x), -1)
            mean = mean + _group_mean(added, num_groups) - added
        centred = rows - _inner(mean, rows)
        rstd = torch.rsqrt(_group_mean(_spatial_mean(centred.square()), num_groups) + eps)
        factor, offset = _affine(weight, bias, scale, shift)
        y = centred * _inner(rstd * factor, rows) + _inner(offset, rows)
        ctx.num_groups, ctx.silu = num_groups, silu
        ctx.save_for_backward(x, weight, bias, channel_bias, scale, shift, channel_mean, mean, rstd)
        return (F.silu(y) if silu else y).to(x.dtype).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, channel_bias, scale, shift, channel_mean, mean, rstd = ctx.saved_tensors
        rows, upstream = x.movedim(1, -1).float(), grad.movedim(1, -1).float()
        positions = math.prod(rows.shape[1:-1])
        factor, offset = _affine(weight, bias, scale, shift)
        normed = (rows - _inner(mean, rows)) * _inner(rstd, rows)
        if ctx.silu:
            y = normed * _inner(factor, rows) + _inner(offset, rows)
            sigmoid = torch.sigmoid(y)
            upstream = upstream * sigmoid * (1 + y * (1 - sigmoid))
        # [B, C]: the sums of all that the small gradients are made of
        plain, weighted = positions * _spatial_mean(upstream), positions * _spatial_mean(upstream * normed)
        # how the mean and the variance of a group move with x
        by_mean = _group_mean(plain * factor, ctx.num_groups) / positions
        by_variance = _group_mean(weighted * factor, ctx.num_groups) / positions
        pulled = upstream * _inner(factor, rows) - _inner(by_mean, rows) - normed * _inner(by_variance, rows)
        grad_x = (pulled * _inner(rstd, rows)).to(x.dtype).movedim(-1, 1)
        grad_channel_bias = grad_scale = grad_shift = None
        if channel_bias is not None:
            # the sum of grad_x over the positions
            normed_sum = positions * (channel_mean - mean) * rstd
            summed = rstd * (plain * factor - positions * by_mean - normed_sum * by_variance)
            grad_channel_bias = summed.sum_to_size(channel_bias.shape).to(channel_bias.dtype)
        if scale is not None:
            grad_scale = (weighted * weight.float() + plain * bias.float()).to(scale.dtype)
            grad_shift = plain.to(shift.dtype)
            plain, weighted = plain * (1 + scale.float()), weighted * (1 + scale.float())
        grad_weight, grad_bias = weighted.sum(0).to(weight.dtype), plain.sum(0).to(bias.dtype)
        return grad_x, None, grad_weight, grad_bias, None, grad_channel_bias, grad_scale, grad_shift, None


def _inner(values: Tensor, rows: Tensor) -> Tensor:
    """values [B or 1, C] beside rows [B, *spatial, C]."""
    return values.reshape(-1, *(1,) * (rows.ndim - 2), rows.shape[-1])


def _affine(weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(factor, offset), each [B or 1, C]: what follows the normalisation."""
    factor, offset = weight.float()[None], bias.float()[None]
    if scale is None or shift is None:
        return factor, offset
    return factor * (1 + scale.float()), offset * (1 + scale.float()) + shift.float()


def _spatial_mean(rows: Tensor) -> Tensor:
    """[B, *spatial, C] -> [B, C]."""
    while rows.ndim > 2:
        rows = rows.sum(-2) / rows.shape[-2]
    return rows


def _group_mean(values: Tensor, num_groups: int) -> Tensor:
    """The mean of values [B, C] over each group, for all its channels: [B, C]."""
    channels = values.shape[1]
    group = torch.arange(channels, device=values.device) // (channels // num_groups)
    belongs = group == torch.arange(num_groups, device=values.device)[:, None]  # [G, C]
    means = values.unflatten(1, (num_groups, -1)).mean(2)
    return torch.where(belongs, means[:, :, None], 0).sum(1)
