"""Group normalisation with its neighbours in a U-Net: channel bias before it, scale-shift and SiLU after it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES, check_tensor
from fastdiff.kernels.layout import is_channels_last

_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _per_channel(value: Tensor, ndim: int) -> Tensor:
    """[C] or [B, C] as [1 or B, C, 1, ...]."""
    return value.reshape(-1, value.shape[-1], *[1] * (ndim - 2))


def group_norm_silu_ref(
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
    """`group_norm_silu` in plain PyTorch."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(dtype)
    if channel_bias is not None:
        h = h + _per_channel(channel_bias.to(dtype), x.ndim)
    y = F.group_norm(h, num_groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None and shift is not None:
        y = y * (1 + _per_channel(scale.to(dtype), x.ndim)) + _per_channel(shift.to(dtype), x.ndim)
    if silu:
        y = F.silu(y)
    y = y.to(x.dtype)
    if is_channels_last(x):
        # on CUDA torch's group_norm returns NCHW
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y


def group_norm_silu(
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
    """silu(group_norm(x + channel_bias) * (1 + scale) + shift) in one operation.

    Wu & He 2018, "Group Normalization"; with scale and shift the "adaptive group normalization" of Dhariwal & Nichol
    2021. Arithmetic and statistics are float32, whatever the dtypes, under autocast too. Differentiable in all tensors.

    Args:
        x: [B, C, *spatial], float32, float16 or bfloat16 of any strides; float64 runs the reference.
        num_groups: divides C.
        weight, bias: [C], any float dtype.
        eps: added to the variance, >= 0.
        channel_bias: [C] or [B, C], any float dtype: added before the normalisation.
        scale, shift: [B, C], any float dtype, both or neither. Rows may lie apart, as in the halves of one projection.
        silu: False leaves the activation out.

    Returns:
        Of x's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device than the above.
    """
    _check(x, num_groups, weight, bias, eps, channel_bias, scale, shift)
    return group_norm_silu_ref(
        x, num_groups, weight, bias, eps, channel_bias=channel_bias, scale=scale, shift=shift, silu=silu
    )


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if not isinstance(x, Tensor) or x.ndim < 2:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a tensor [B, C, *spatial], got {got}")
    check_tensor("x", x, x.shape, _DTYPES, x.device)
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    check_tensor("weight", weight, (channels,), _DTYPES, x.device)
    check_tensor("bias", bias, (channels,), _DTYPES, x.device)
    if channel_bias is not None:
        shape = (channels,) if channel_bias.ndim == 1 else (batch, channels)
        check_tensor("channel_bias", channel_bias, shape, _DTYPES, x.device)
    if (scale is None) != (shift is None):
        raise ValueError(
            f"scale and shift come together, got only {'shift' if scale is None else 'scale'}; pass both or neither"
        )
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            check_tensor(name, value, (batch, channels), _DTYPES, x.device)
