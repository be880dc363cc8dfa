"""Group normalisation in two passes, for planes that no tile holds: sums over chunks of positions, then the result."""

from fastdiff.kernels.dispatch import tl, triton
from fastdiff.kernels.group_tile import (
    affine,
    gradient_of_z,
    load_row,
    silu_of,
    spread_groups,
    store_channel_gradients,
    sum_groups,
)


@triton.jit
def _group_norm_moments_kernel(
    x_ptr,
    channel_bias_ptr,
    moments_ptr,
    positions,
    chunks,
    stride_xb,
    stride_cb,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Mean and sum of squares around it of each group in a chunk of positions, [B, chunks, 2, groups]."""
    b = (tl.program_id(0) // (chunks * BLOCKS)).to(tl.int64)
    chunk = tl.program_id(0) // BLOCKS % chunks
    block = tl.program_id(0) % BLOCKS
    lane, row = tl.arange(0, LANES), chunk * (ROWS * STEPS) + tl.arange(0, ROWS)
    channel = block * (GROUPS * GROUP) + lane
    present = (lane < GROUPS * GROUP) & (channel < CHANNELS)
    x_ptr += b * stride_xb
    # every element of the tile keeps the moments of what passed it (Welford): no shift that an outlier could spoil
    mean = tl.zeros([ROWS, LANES], tl.float32)
    m2 = tl.zeros([ROWS, LANES], tl.float32)
    if channel_bias_ptr is not None:
        shift = load_row(channel_bias_ptr + b * stride_cb, channel, present)[None, :]
    for step in range(STEPS):
        inside = row + step * ROWS < positions
        keep = inside[:, None] & present[None, :]
        offset = (row + step * ROWS)[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_ptr + offset, mask=keep, other=0.0).to(tl.float32)
        if channel_bias_ptr is not None:
            x += shift
        delta = tl.where(inside[:, None], x - mean, 0.0)
        mean = tl.fma(delta, 1.0 / (step + 1.0), mean)
        m2 = tl.fma(delta, x - mean, m2)
    # Chan: the moments of all elements around the mean of their group
    count = tl.minimum(tl.maximum((positions - row + ROWS - 1) // ROWS, 0), STEPS).to(tl.float32)[:, None]
    n = (tl.minimum(positions - chunk * (ROWS * STEPS), ROWS * STEPS) * GROUP).to(tl.float32)
    group_mean = sum_groups(mean * count, GROUP, GROUPS, GROUPS_PADDED) / n
    delta = mean - spread_groups(group_mean, GROUP, GROUPS, GROUPS_PADDED, LANES)[None, :]
    m2 = tl.where(present[None, :], m2 + count * delta * delta, 0.0)
    group_m2 = sum_groups(m2, GROUP, GROUPS, GROUPS_PADDED)
    in_block = tl.arange(0, GROUPS_PADDED)
    group = block * GROUPS + in_block
    owned = (in_block < GROUPS) & (group < CHANNELS // GROUP)
    moments_ptr += (b * chunks + chunk) * (2 * (CHANNELS // GROUP))
    tl.store(moments_ptr + group, group_mean, mask=owned)
    tl.store(moments_ptr + CHANNELS // GROUP + group, group_m2, mask=owned)


@triton.jit
def _group_norm_normalise_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    moments_ptr,
    mean_ptr,
    rstd_ptr,
    positions,
    chunks,
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
    CHUNKS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The second pass: combines the chunks' moments (Chan et al. 1979), normalises one chunk."""
    # from the end: what the first pass read last is still in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (program // (chunks * BLOCKS)).to(tl.int64)
    chunk = program // BLOCKS % chunks
    block = program % BLOCKS
    n_groups: tl.constexpr = CHANNELS // GROUP
    in_block = tl.arange(0, GROUPS_PADDED)
    group = block * GROUPS + in_block
    owned = (in_block < GROUPS) & (group < n_groups)
    other = tl.arange(0, CHUNKS_PADDED)
    moments_ptr += b * chunks * (2 * n_groups) + (other * (2 * n_groups))[:, None] + group[None, :]
    means = tl.load(moments_ptr, mask=(other < chunks)[:, None] & owned[None, :], other=0.0)
    m2s = tl.load(moments_ptr + n_groups, mask=(other < chunks)[:, None] & owned[None, :], other=0.0)
    rows = tl.minimum(tl.maximum(positions - other * (ROWS * STEPS), 0), ROWS * STEPS).to(tl.float32)[:, None]
    mean = tl.sum(means * rows, 0) / positions
    delta = means - mean[None, :]
    variance = tl.sum(m2s + delta * delta * (rows * GROUP), 0) / (positions * GROUP).to(tl.float32)
    rstd = tl.rsqrt(variance + eps)
    if chunk == 0:
        tl.store(mean_ptr + b * n_groups + group, mean, mask=owned)
        tl.store(rstd_ptr + b * n_groups + group, rstd, mask=owned)

    lane, row = tl.arange(0, LANES), chunk * (ROWS * STEPS) + tl.arange(0, ROWS)
    channel = block * (GROUPS * GROUP) + lane
    present = (lane < GROUPS * GROUP) & (channel < CHANNELS)
    centre = spread_groups(mean, GROUP, GROUPS, GROUPS_PADDED, LANES)
    if channel_bias_ptr is not None:
        centre -= load_row(channel_bias_ptr + b * stride_cb, channel, present)
    factor, offset_z = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, stride_scale, stride_shift, channel, present
    )
    factor *= spread_groups(rstd, GROUP, GROUPS, GROUPS_PADDED, LANES)
    for step in range(STEPS):
        keep = (row + step * ROWS < positions)[:, None] & present[None, :]
        offset = (row + step * ROWS)[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_ptr + b * stride_xb + offset, mask=keep, other=0.0).to(tl.float32)
        z = tl.fma(x - centre[None, :], factor[None, :], offset_z[None, :])
        y = silu_of(z) if SILU else z
        tl.store(y_ptr + b * positions * CHANNELS + offset, y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _group_norm_backward_sums_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    channel_sums_ptr,
    group_sums_ptr,
    positions,
    chunks,
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
    STEPS: tl.constexpr,
):
    """S1, S2 (and S3) of each channel in a chunk, [B, chunks, 3, C], and of each group, [B, chunks, 2, groups]."""
    b = (tl.program_id(0) // (chunks * BLOCKS)).to(tl.int64)
    chunk = tl.program_id(0) // BLOCKS % chunks
    block = tl.program_id(0) % BLOCKS
    n_groups: tl.constexpr = CHANNELS // GROUP
    lane, row = tl.arange(0, LANES), chunk * (ROWS * STEPS) + tl.arange(0, ROWS)
    channel = block * (GROUPS * GROUP) + lane
    present = (lane < GROUPS * GROUP) & (channel < CHANNELS)
    centre = load_row(mean_ptr + b * n_groups, channel // GROUP, present)
    if channel_bias_ptr is not None:
        centre -= load_row(channel_bias_ptr + b * stride_cb, channel, present)
    rstd = load_row(rstd_ptr + b * n_groups, channel // GROUP, present)
    factor, offset = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, stride_scale, stride_shift, channel, present)
    sum1 = tl.zeros([ROWS, LANES], tl.float32)
    sum2 = tl.zeros([ROWS, LANES], tl.float32)
    sum3 = tl.zeros([ROWS, LANES], tl.float32)
    for step in range(STEPS):
        keep = (row + step * ROWS < positions)[:, None] & present[None, :]
        i = (row + step * ROWS)[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_ptr + b * stride_xb + i, mask=keep, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + b * stride_dyb + i, mask=keep, other=0.0).to(tl.float32)
        xhat = (x - centre[None, :]) * rstd[None, :]
        dz = tl.where(keep, gradient_of_z(dy, xhat, factor[None, :], offset[None, :], SILU), 0.0)
        sum1 += dz
        sum2 = tl.where(keep, tl.fma(dz, xhat, sum2), sum2)
        if CHANNEL_BIAS:
            sum3 += tl.where(keep, xhat, 0.0)
    s1, s2 = tl.sum(sum1, 0), tl.sum(sum2, 0)
    channel_sums_ptr += (b * chunks + chunk) * (3 * CHANNELS) + channel
    tl.store(channel_sums_ptr, s1, mask=present)
    tl.store(channel_sums_ptr + CHANNELS, s2, mask=present)
    if CHANNEL_BIAS:
        tl.store(channel_sums_ptr + 2 * CHANNELS, tl.sum(sum3, 0), mask=present)
    in_block = tl.arange(0, GROUPS_PADDED)
    group = block * GROUPS + in_block
    owned = (in_block < GROUPS) & (group < n_groups)
    group_sums_ptr += (b * chunks + chunk) * (2 * n_groups) + group
    tl.store(group_sums_ptr, sum_groups((factor * s1)[None, :], GROUP, GROUPS, GROUPS_PADDED), mask=owned)
    tl.store(group_sums_ptr + n_groups, sum_groups((factor * s2)[None, :], GROUP, GROUPS, GROUPS_PADDED), mask=owned)


@triton.jit
def _group_norm_backward_dx_kernel(
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
    channel_sums_ptr,
    group_sums_ptr,
    gradients_ptr,
    positions,
    chunks,
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
    CHUNKS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The second pass: adds up the chunks' sums in their order, writes dx of one chunk."""
    # from the end: what the first pass read last is still in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (program // (chunks * BLOCKS)).to(tl.int64)
    chunk = program // BLOCKS % chunks
    block = program % BLOCKS
    n_groups: tl.constexpr = CHANNELS // GROUP
    lane, row = tl.arange(0, LANES), chunk * (ROWS * STEPS) + tl.arange(0, ROWS)
    channel = block * (GROUPS * GROUP) + lane
    present = (lane < GROUPS * GROUP) & (channel < CHANNELS)
    in_block, other = tl.arange(0, GROUPS_PADDED), tl.arange(0, CHUNKS_PADDED)
    group = block * GROUPS + in_block
    owned = (other < chunks)[:, None] & ((in_block < GROUPS) & (group < n_groups))[None, :]
    group_sums_ptr += b * chunks * (2 * n_groups) + (other * (2 * n_groups))[:, None] + group[None, :]
    count = (positions * GROUP).to(tl.float32)
    m1 = tl.sum(tl.load(group_sums_ptr, mask=owned, other=0.0), 0) / count
    m2 = tl.sum(tl.load(group_sums_ptr + n_groups, mask=owned, other=0.0), 0) / count
    m1 = spread_groups(m1, GROUP, GROUPS, GROUPS_PADDED, LANES)
    m2 = spread_groups(m2, GROUP, GROUPS, GROUPS_PADDED, LANES)

    centre = load_row(mean_ptr + b * n_groups, channel // GROUP, present)
    if channel_bias_ptr is not None:
        centre -= load_row(channel_bias_ptr + b * stride_cb, channel, present)
    rstd = load_row(rstd_ptr + b * n_groups, channel // GROUP, present)
    factor, offset = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, stride_scale, stride_shift, channel, present)
    for step in range(STEPS):
        keep = (row + step * ROWS < positions)[:, None] & present[None, :]
        i = (row + step * ROWS)[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_ptr + b * stride_xb + i, mask=keep, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + b * stride_dyb + i, mask=keep, other=0.0).to(tl.float32)
        xhat = (x - centre[None, :]) * rstd[None, :]
        dz = gradient_of_z(dy, xhat, factor[None, :], offset[None, :], SILU)
        dx = tl.fma(dz, (rstd * factor)[None, :], tl.fma(xhat, (-rstd * m2)[None, :], (-rstd * m1)[None, :]))
        tl.store(dx_ptr + b * positions * CHANNELS + i, dx.to(dx_ptr.dtype.element_ty), mask=keep)

    if chunk == 0:
        every = (other < chunks)[:, None] & present[None, :]
        sums_ptr = channel_sums_ptr + b * chunks * (3 * CHANNELS) + (other * (3 * CHANNELS))[:, None] + channel[None, :]
        s1 = tl.sum(tl.load(sums_ptr, mask=every, other=0.0), 0)
        s2 = tl.sum(tl.load(sums_ptr + CHANNELS, mask=every, other=0.0), 0)
        s3 = s1
        if CHANNEL_BIAS:
            s3 = tl.sum(tl.load(sums_ptr + 2 * CHANNELS, mask=every, other=0.0), 0)
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
