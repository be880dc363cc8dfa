"""What the group-norm kernels share: sums over the groups of a program's channels, and SiLU."""

from fastdiff.kernels.dispatch import tl, triton


@triton.jit
def sum_groups(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, LANES: tl.constexpr):
    """[LANES] values of channels to [GROUPS_PADDED] sums; channels past the last group reach no group of it."""
    if GROUPS * GROUP == LANES:
        return tl.sum(tl.reshape(values, [GROUPS, GROUP]), 1)
    else:
        own = (tl.arange(0, LANES) // GROUP)[:, None] == tl.arange(0, GROUPS_PADDED)[None, :]
        return tl.sum(tl.where(own, values[:, None], 0.0), 0)


@triton.jit
def spread_groups(values, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, LANES: tl.constexpr):
    """[GROUPS_PADDED] values of groups to [LANES] channels."""
    if GROUPS * GROUP == LANES:
        return tl.reshape(tl.broadcast_to(values[:, None], [GROUPS, GROUP]), [LANES])
    else:
        own = (tl.arange(0, LANES) // GROUP)[:, None] == tl.arange(0, GROUPS_PADDED)[None, :]
        return tl.sum(tl.where(own, values[None, :], 0.0), 1)


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
def silu_of(z):
    return z / (1.0 + tl.exp(-z))
