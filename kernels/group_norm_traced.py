"""Group normalisation as a compiler for CPUs makes fast loops of it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.layout import is_channels_last

# below this many positions a sample, torch's own decomposition is as fast and has fewer loops
MIN_POSITIONS = 512


def compiles_to_loops(x: Tensor) -> bool:
    """Whether `group_norm_silu_traced` is what a compiler should see for x: on a CPU, without gradients."""
    compiling = torch.compiler.is_compiling() and x.device.type == "cpu" and not torch.is_grad_enabled()
    return compiling and x.ndim > 2 and math.prod(x.shape[2:]) >= MIN_POSITIONS and is_channels_last(x)


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

    Inductor vectorises loops over neighbouring channels, but none that asks for the group of each. So sums run over one
    spatial axis at a time with the channels side by side, and a group's figure reaches its channels by a sum with one
    term that is not zero: the result of a sum is stored, it is not computed anew inside the next loop. Variances are
    taken around the mean, in float32 (float64 for a float64 x).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels = x.shape[:2]
    group = torch.arange(channels, device=x.device) // (channels // num_groups)
    belongs = group == torch.arange(num_groups, device=x.device)[:, None]  # [G, C]
    inner = (-1, *(1,) * (x.ndim - 2), channels)

    def group_mean(values: Tensor) -> Tensor:
        """The mean of values [B, *spatial, C] over each group, for all its channels: [B, C]."""
        while values.ndim > 2:
            values = values.sum(-2) / values.shape[-2]
        means = values.unflatten(1, (num_groups, -1)).mean(2)
        return torch.where(belongs, means[:, :, None], 0).sum(1)

    rows = x.movedim(1, -1).to(dtype)
    mean = group_mean(rows)
    if channel_bias is not None:
        # what is added before the norm moves the mean, and with it all values of a channel alike
        added = channel_bias.to(dtype).expand(batch, -1)
        mean = mean + group_mean(added) - added
    centred = rows - mean.reshape(inner)
    factor = torch.rsqrt(group_mean(centred.square()) + eps) * weight.to(dtype)
    offset = bias.to(dtype).expand(batch, -1)
    if scale is not None and shift is not None:
        factor, offset = factor * (1 + scale.to(dtype)), offset * (1 + scale.to(dtype)) + shift.to(dtype)
    y = centred * factor.reshape(inner) + offset.reshape(inner)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype).movedim(-1, 1)
