"""Group normalisation with its neighbours in a U-Net: channel bias before it, scale-shift and SiLU after it.

`group_norm_plan` chooses between the one-pass kernel here and the two of `group_norm_split`. Both take statistics in
float32 around the mean, add without atomics in a fixed order, and keep the mean and rstd of a group for the backward.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES, check_tensor
from fastdiff.kernels.dispatch import device_guard, tl, triton, use_triton
from fastdiff.kernels.group_norm_backward import group_norm_silu_backward_op
from fastdiff.kernels.group_norm_plan import MAX_GROUP, choose_plan, multiprocessors_of
from fastdiff.kernels.group_norm_split import _group_norm_moments_kernel, _group_norm_normalise_kernel
from fastdiff.kernels.group_norm_traced import compiles_to_loops, group_norm_silu_traced
from fastdiff.kernels.group_tile import affine, load_row, silu_of, spread_groups, sum_groups
from fastdiff.kernels.layout import channel_rows, empty, is_channels_last, sample_extent

_DTYPES = (*FLOAT_DTYPES, torch.float64)


@triton.jit
def _group_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    positions,
    stride_xb,
    stride_cb,
    stride_scale,
    stride_shift,
    eps,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One pass: all positions of a program's groups are in its tile."""
    b = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    lane, row = tl.arange(0, LANES), tl.arange(0, ROWS)
    channel = block * (GROUPS * GROUP) + lane
    present = (lane < GROUPS * GROUP) & (channel < CHANNELS)
    keep = (row < positions)[:, None] & present[None, :]
    offset = row[:, None] * CHANNELS + channel[None, :]
    x = tl.load(x_ptr + b * stride_xb + offset, mask=keep, other=0.0).to(tl.float32)
    if channel_bias_ptr is not None:
        x += load_row(channel_bias_ptr + b * stride_cb, channel, present)[None, :]
        x = tl.where(keep, x, 0.0)

    count = (positions * GROUP).to(tl.float32)
    mean = sum_groups(x, GROUP, GROUPS, GROUPS_PADDED) / count
    deviation = x - spread_groups(mean, GROUP, GROUPS, GROUPS_PADDED, LANES)[None, :]
    deviation = tl.where(keep, deviation, 0.0)
    m2 = sum_groups(deviation * deviation, GROUP, GROUPS, GROUPS_PADDED)
    rstd = tl.rsqrt(m2 / count + eps)

    factor, offset_z = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, stride_scale, stride_shift, channel, present
    )
    factor *= spread_groups(rstd, GROUP, GROUPS, GROUPS_PADDED, LANES)
    z = tl.fma(deviation, factor[None, :], offset_z[None, :])
    y = silu_of(z) if SILU else z
    tl.store(y_ptr + b * positions * CHANNELS + offset, y.to(y_ptr.dtype.element_ty), mask=keep)
    in_block = tl.arange(0, GROUPS_PADDED)
    group = block * GROUPS + in_block
    owned = (in_block < GROUPS) & (group < CHANNELS // GROUP)
    tl.store(mean_ptr + b * (CHANNELS // GROUP) + group, mean, mask=owned)
    tl.store(rstd_ptr + b * (CHANNELS // GROUP) + group, rstd, mask=owned)


@torch.library.custom_op("fastdiff::group_norm_silu", mutates_args=())
def _group_norm_silu_op(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, positions = sample_extent(x.shape)
    y = empty(x.shape, x.dtype, x.device, channels_last=True)
    mean, rstd = (torch.empty((batch, num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(0), rstd.fill_(0)
    if not is_channels_last(x):
        x = empty(x.shape, x.dtype, x.device, channels_last=True).copy_(x)
    plan = choose_plan(batch, positions, channels, num_groups, x.element_size(), multiprocessors_of(x.device))
    tile = plan.options(channels, num_groups)
    (channel_bias, stride_cb), (scale, stride_scale), (shift, stride_shift) = map(
        channel_rows, (channel_bias, scale, shift)
    )
    rows = (weight.contiguous(), bias.contiguous(), channel_bias, scale, shift)
    strides = (x.stride(0), stride_cb, stride_scale, stride_shift)
    grid = (batch * plan.chunks * plan.blocks,)
    with device_guard(x):
        if plan.one_pass:
            _group_norm_kernel[grid](x, y, *rows, mean, rstd, positions, *strides, eps, SILU=silu, **tile)
        else:
            moments = torch.empty((batch, plan.chunks, 2, num_groups), dtype=torch.float32, device=x.device)
            _group_norm_moments_kernel[grid](
                x, channel_bias, moments, positions, plan.chunks, x.stride(0), stride_cb, STEPS=plan.steps, **tile
            )
            _group_norm_normalise_kernel[grid](
                x,
                y,
                *rows,
                moments,
                mean,
                rstd,
                positions,
                plan.chunks,
                *strides,
                eps,
                SILU=silu,
                STEPS=plan.steps,
                CHUNKS_PADDED=triton.next_power_of_2(plan.chunks),
                **tile,
            )
    return y, mean, rstd


@_group_norm_silu_op.register_fake
def _(x, num_groups, weight, bias, eps, channel_bias, scale, shift, silu):
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    return empty(x.shape, x.dtype, x.device, channels_last=True), mean, rstd


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, _, channel_bias, scale, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, channel_bias, scale, shift, mean, rstd)


def _backward(ctx, dy, *_):
    x, weight, bias, channel_bias, scale, shift, mean, rstd = ctx.saved_tensors
    needs_channel_bias = channel_bias is not None and ctx.needs_input_grad[5]
    dx, rows = group_norm_silu_backward_op(
        dy, x, ctx.num_groups, weight, bias, channel_bias, scale, shift, mean, rstd, ctx.silu, needs_channel_bias
    )
    dweight = dbias = dchannel_bias = dscale = dshift = None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        sums = rows[:2].sum(1)
        dbias, dweight = sums[0].to(bias.dtype), sums[1].to(weight.dtype)
    if scale is not None:
        dshift, dscale = rows[2].to(shift.dtype), rows[3].to(scale.dtype)
    if needs_channel_bias:
        dchannel_bias = (rows[-1].sum(0) if channel_bias.ndim == 1 else rows[-1]).to(channel_bias.dtype)
    return dx, None, dweight, dbias, None, dchannel_bias, dscale, dshift, None


_group_norm_silu_op.register_autograd(_backward, setup_context=_setup_context)


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
    """`group_norm_silu` in plain PyTorch.

    Eager statistics are torch's: its kernel for channels-last tensors on CPUs takes E[x^2] - E[x]^2, which cancels
    where the mean is a thousand times the spread.
    """
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
    2021. Arithmetic and statistics are float32, whatever the dtypes, under autocast too. Differentiable in all tensors,
    once.

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
    runs = use_triton(x) and x.dtype in FLOAT_DTYPES and x.shape[1] // num_groups <= MAX_GROUP
    if runs and is_channels_last(x):
        return _group_norm_silu_op(x, num_groups, weight, bias, eps, channel_bias, scale, shift, silu)[0]
    reference = group_norm_silu_traced if compiles_to_loops(x) else group_norm_silu_ref
    return reference(x, num_groups, weight, bias, eps, channel_bias=channel_bias, scale=scale, shift=shift, silu=silu)


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
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one element in each sample, got shape {list(x.shape)}")
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
