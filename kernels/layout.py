"""How a launch walks its tensors: the canonical element order, merged strides, and the two ways through memory.

All tensors are [B, C, *spatial] with up to three spatial axes ([B, C] and [B] count as having none). The canonical
order of a sample's elements is channels-last, e = p * C + c with p over the spatial axes in order; the counter of the
noise is this e, whatever the memory format. Spatial axes are merged into (outer, inner), which covers every layout of
images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import tl, triton

MAX_ELEMENTS = 2**31 - 1  # per sample: offsets within a sample are int32, bases are int64


@triton.jit
def element_offset(c, p, inner, stride_c, stride_o, stride_i):
    """Offset within a sample, int64: a view may reach further than `MAX_ELEMENTS`."""
    outer = (p // inner).to(tl.int64) * stride_o
    return c.to(tl.int64) * stride_c + outer + (p % inner).to(tl.int64) * stride_i


class Extent(NamedTuple):
    """Sizes of one sample: channels, positions (product of the spatial axes) and the merged inner spatial axis."""

    channels: int
    positions: int
    inner: int


def sample_extent(shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """(batch, channels, positions) of a [B], [B, C] or [B, C, *spatial] shape."""
    batch = shape[0]
    channels = shape[1] if len(shape) > 1 else 1
    positions = 1
    for size in shape[2:]:
        positions *= size
    if channels * positions > MAX_ELEMENTS:
        raise ValueError(
            f"a sample of shape {tuple(shape[1:])} has {channels * positions} elements, "
            f"at most {MAX_ELEMENTS} are accepted"
        )
    return batch, channels, positions


def is_channels_last(x: Tensor) -> bool:
    """True if every sample lies densely in canonical order; the batch stride is free."""
    expected = 1
    for axis in (1, *range(x.ndim - 1, 1, -1)):
        if axis < x.ndim and x.shape[axis] != 1:
            if x.stride(axis) != expected:
                return False
            expected *= x.shape[axis]
    return True


def in_lane_order(x: Tensor, channels_last: bool) -> bool:
    """True if every sample lies densely in the order of the lanes: canonical, or the order of its axes."""
    return is_channels_last(x) if channels_last else x.select(0, 0).is_contiguous()


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """An uninitialised dense tensor, channels-last for any number of spatial axes or in the order of its axes."""
    if not channels_last or len(shape) < 3:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype, device=device).movedim(-1, 1)


def channel_rows(value: Tensor | None) -> tuple[Tensor | None, int]:
    """A [C] or [B, C] tensor whose rows are dense, copied only where they are not, and the distance of its rows."""
    if value is None:
        return None, 0
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        value = value.contiguous()
    return value, value.stride(0) if value.ndim == 2 else 0


def _merged(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one stride that walks these axes in order, or None."""
    step = None
    expected = 0
    for size, stride in zip(reversed(sizes), reversed(strides)):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return step or 0


def merge_strides(*tensors: Tensor) -> tuple[Extent, list[tuple[int, int, int, int]]]:
    """Extent and (batch, channel, outer, inner) strides of tensors of one shape (channel counts may differ).

    Raises:
        ValueError: more than three spatial axes, or axes that cannot be merged into two (a crop of a volume).
    """
    first = tensors[0]
    _, channels, positions = sample_extent(first.shape)
    spatial = tuple(first.shape[2:])
    for split in range(len(spatial) + 1):
        pairs = [
            (_merged(spatial[:split], x.stride()[2 : 2 + split]), _merged(spatial[split:], x.stride()[2 + split :]))
            for x in tensors
        ]
        if all(outer is not None and inner is not None for outer, inner in pairs):
            inner_size = 1
            for size in spatial[split:]:
                inner_size *= size
            strides = [
                (x.stride(0), x.stride(1) if x.ndim > 1 else 0, int(outer or 0), int(inner or 0))
                for x, (outer, inner) in zip(tensors, pairs)
            ]
            return Extent(channels, positions, inner_size), strides
    raise ValueError(
        f"the spatial axes of strides {[x.stride() for x in tensors]} and sizes {spatial} do not merge into two axes; "
        "pass contiguous or channels-last tensors"
    )
