"""What the group-norm kernels share: sums over the groups of a program's channels, and SiLU."""

from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET, tl, triton

if HAS_TRITON:
    from triton.language.extra import libdevice

# The interpreter knows no libdevice.
FAST_DIVISION = tl.constexpr(not INTERPRET)


@triton.jit
def sum_groups(tile, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr):
    """[rows, lanes] to the [GROUPS_PADDED] sums of the groups; lanes past the last group must be 0."""
    ROWS: tl.constexpr = tile.shape[0]
    LANES: tl.constexpr = tile.shape[1]
    if GROUPS == 1:
        return tl.sum(tl.sum(tl.reshape(tile, [ROWS, 1, LANES]), 2), 0)
    # neighbours first, as many as a power of two takes without crossing groups: they share a thread
    UNIT: tl.constexpr = GROUP & -GROUP
    units = tl.sum(tl.sum(tl.reshape(tile, [ROWS, LANES // UNIT, UNIT]), 2), 0)
    if GROUP == UNIT:
        return units
    own = _unit_is_of_group(GROUP // UNIT, GROUPS_PADDED, LANES // UNIT)
    return tl.sum(tl.where(own, units[:, None], 0.0), 0)


@triton.jit
def spread_groups(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, LANES: tl.constexpr):
    """[GROUPS_PADDED] values of groups to [LANES] channels."""
    if GROUPS == 1:
        return tl.broadcast_to(values, [LANES])
    UNIT: tl.constexpr = GROUP & -GROUP
    if GROUP != UNIT:
        own = _unit_is_of_group(GROUP // UNIT, GROUPS_PADDED, LANES // UNIT)
        values = tl.sum(tl.where(own, values[None, :], 0.0), 1)
    return tl.reshape(tl.broadcast_to(values[:, None], [LANES // UNIT, UNIT]), [LANES])


@triton.jit
def _unit_is_of_group(UNITS_OF_GROUP: tl.constexpr, GROUPS_PADDED: tl.constexpr, UNITS: tl.constexpr):
    return (tl.arange(0, UNITS) // UNITS_OF_GROUP)[:, None] == tl.arange(0, GROUPS_PADDED)[None, :]


@triton.jit
def load_row(ptr, channel, keep):
    """float32 values of the channels."""
    return tl.load(ptr + channel, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, stride_scale, stride_shift, channel, keep):
    """The factor and the offset that take a normalised channel to the input of SiLU."""
    factor, offset = load_row(weight_ptr, channel, keep), load_row(bias_ptr, channel, keep)
    if scale_ptr is not None:
        scale = 1.0 + load_row(scale_ptr + b * stride_scale, channel, keep)
        offset = tl.fma(offset, scale, load_row(shift_ptr + b * stride_shift, channel, keep))
        factor *= scale
    return factor, offset


@triton.jit
def _divide(x, y):
    """x / y for y >= 1, to 2 units in the last place, 0 beyond 2^126; a third of the instructions of x / y."""
    if FAST_DIVISION:
        return libdevice.fast_dividef(x, y)
    else:
        return x / y


@triton.jit
def _one_plus_exp_minus(z):
    return 1.0 + tl.exp2(z * -1.4426950408889634)


@triton.jit
def silu_of(z):
    return _divide(z, _one_plus_exp_minus(z))


@triton.jit
def sigmoid_of(z):
    return _divide(1.0, _one_plus_exp_minus(z))


@triton.jit
def gradient_of_z(dy, xhat, factor, offset, SILU: tl.constexpr):
    """dy * silu'(z)"""
    if SILU:
        z = tl.fma(xhat, factor, offset)
        sigmoid = sigmoid_of(z)
        return dy * (sigmoid * tl.fma(z, 1.0 - sigmoid, 1.0))
    else:
        return dy


@triton.jit
def store_channel_gradients(
    ptr,
    stride_row,
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
    CHANNEL_BIAS: tl.constexpr,
):
    """The rows dbias, dweight, dshift and dscale if there is a scale, dchannel_bias if it is asked for."""
    ptr += channel
    weight = load_row(weight_ptr, channel, present)
    factor, scale = weight, 1.0
    if scale_ptr is not None:
        scale += load_row(scale_ptr + b * stride_scale, channel, present)
        factor *= scale
    tl.store(ptr, scale * s1, mask=present)
    ptr += stride_row
    tl.store(ptr, scale * s2, mask=present)
    if scale_ptr is not None:
        ptr += stride_row
        tl.store(ptr, s1, mask=present)
        ptr += stride_row
        tl.store(ptr, tl.fma(weight, s2, load_row(bias_ptr, channel, present) * s1), mask=present)
    if CHANNEL_BIAS:
        ptr += stride_row
        total = tl.fma(-m2, s3, tl.fma(factor, s1, -m1 * positions))
        tl.store(ptr, rstd * total, mask=present)
