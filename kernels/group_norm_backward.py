"""The gradients of `fastdiff.kernels.group_norm.group_norm_silu`.

With h = x + channel_bias, xhat = (h - mean) * rstd, factor = weight * (1 + scale), z = factor * xhat + offset,
y = silu(z) and dz = dy * silu'(z), all gradients follow from three sums over the P positions of each channel of a
sample, S1 = sum dz, S2 = sum dz * xhat and S3 = sum xhat:

    dx = rstd * (factor * dz - m1 - m2 * xhat), with the means m1 of factor * S1 and m2 of factor * S2 in a group
    dchannel_bias = sum dx = rstd * (factor * S1 - P * m1 - m2 * S3)
    dshift = S1, dscale = weight * S2 + bias * S1
    dbias = (1 + scale) * S1 and dweight = (1 + scale) * S2, summed over the samples

so only dx needs the plane once more. x, mean and rstd are saved, SiLU is recomputed.
"""

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import device_guard, tl, triton
from fastdiff.kernels.group_norm_plan import choose_plan, multiprocessors_of
from fastdiff.kernels.group_norm_split import _group_norm_backward_dx_kernel, _group_norm_backward_sums_kernel
from fastdiff.kernels.group_tile import (
    affine,
    gradient_of_z,
    load_row,
    spread_groups,
    store_channel_gradients,
    sum_groups,
)
from fastdiff.kernels.layout import channel_rows, empty, is_channels_last, sample_extent


@triton.jit
def _group_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    gradients_ptr,
    positions,
    stride_gradients,
    stride_dyb,
    stride_xb,
    stride_cb,
    stride_scale,
    stride_shift,
    SILU: tl.constexpr,
    CHANNEL_BIAS: tl.constexpr,
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
    i = row[:, None] * CHANNELS + channel[None, :]
    x = tl.load(x_ptr + b * stride_xb + i, mask=keep, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + b * stride_dyb + i, mask=keep, other=0.0).to(tl.float32)
    centre = load_row(mean_ptr + b * (CHANNELS // GROUP), channel // GROUP, present)
    if channel_bias_ptr is not None:
        centre -= load_row(channel_bias_ptr + b * stride_cb, channel, present)
    rstd = load_row(rstd_ptr + b * (CHANNELS // GROUP), channel // GROUP, present)
    factor, offset = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, stride_scale, stride_shift, channel, present)

    xhat = tl.where(keep, (x - centre[None, :]) * rstd[None, :], 0.0)
    dz = tl.where(keep, gradient_of_z(dy, xhat, factor[None, :], offset[None, :], SILU), 0.0)
    s1, s2 = tl.sum(dz, 0), tl.sum(dz * xhat, 0)
    s3 = tl.sum(xhat, 0) if CHANNEL_BIAS else s1
    count = (positions * GROUP).to(tl.float32)
    m1 = sum_groups((factor * s1)[None, :], GROUP, GROUPS, GROUPS_PADDED) / count
    m2 = sum_groups((factor * s2)[None, :], GROUP, GROUPS, GROUPS_PADDED) / count
    m1 = spread_groups(m1, GROUP, GROUPS, GROUPS_PADDED, LANES)
    m2 = spread_groups(m2, GROUP, GROUPS, GROUPS_PADDED, LANES)
    dx = tl.fma(dz, (rstd * factor)[None, :], tl.fma(xhat, (-rstd * m2)[None, :], (-rstd * m1)[None, :]))
    tl.store(dx_ptr + b * positions * CHANNELS + i, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    store_channel_gradients(
        gradients_ptr + b * CHANNELS,
        stride_gradients,
        s1,
        s2,
        s3,
        m1,
        m2,
        rstd,
        weight_ptr,
        bias_ptr,
        scale_ptr,
        b,
        stride_scale,
        positions,
        channel,
        present,
        CHANNEL_BIAS,
    )


@torch.library.custom_op("fastdiff::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward_op(
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    channel_bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and float32 [rows, B, C]: each sample's dbias, dweight, dshift and dscale if scaled, dchannel_bias."""
    batch, channels, positions = sample_extent(x.shape)
    dx, gradients = _outputs(x, scale, channel_bias_gradient)
    if x.numel() == 0:
        return dx, gradients.zero_()
    dy, x = (
        value
        if is_channels_last(value)
        else empty(value.shape, value.dtype, value.device, channels_last=True).copy_(value)
        for value in (dy, x)
    )
    plan = choose_plan(batch, positions, channels, num_groups, x.element_size(), multiprocessors_of(x.device), 2)
    tile = plan.options(channels, num_groups)
    tile |= {"SILU": silu, "CHANNEL_BIAS": channel_bias_gradient}
    (channel_bias, stride_cb), (scale, stride_scale), (shift, stride_shift) = map(
        channel_rows, (channel_bias, scale, shift)
    )
    rows = (weight.contiguous(), bias.contiguous(), channel_bias, scale, shift, mean, rstd)
    strides = (dy.stride(0), x.stride(0), stride_cb, stride_scale, stride_shift)
    grid, stride_gradients = (batch * plan.chunks * plan.blocks,), batch * channels
    with device_guard(x):
        if plan.one_pass:
            _group_norm_backward_kernel[grid](
                dy, x, dx, *rows, gradients, positions, stride_gradients, *strides, **tile
            )
        else:
            channel_sums = gradients.new_empty((batch, plan.chunks, 3, channels))
            group_sums = gradients.new_empty((batch, plan.chunks, 2, num_groups))
            sums = (channel_sums, group_sums)
            _group_norm_backward_sums_kernel[grid](
                dy, x, *rows, *sums, positions, plan.chunks, *strides, STEPS=plan.steps, **tile
            )
            _group_norm_backward_dx_kernel[grid](
                dy,
                x,
                dx,
                *rows,
                *sums,
                gradients,
                positions,
                plan.chunks,
                stride_gradients,
                *strides,
                STEPS=plan.steps,
                CHUNKS_PADDED=triton.next_power_of_2(plan.chunks),
                **tile,
            )
    return dx, gradients


def _outputs(x: Tensor, scale: Tensor | None, channel_bias_gradient: bool) -> tuple[Tensor, Tensor]:
    n_rows = 2 + 2 * (scale is not None) + channel_bias_gradient
    gradients = torch.empty((n_rows, *x.shape[:2]), dtype=torch.float32, device=x.device)
    return empty(x.shape, x.dtype, x.device, channels_last=True), gradients


@group_norm_silu_backward_op.register_fake
def _(dy, x, num_groups, weight, bias, channel_bias, scale, shift, mean, rstd, silu, channel_bias_gradient):
    return _outputs(x, scale, channel_bias_gradient)
