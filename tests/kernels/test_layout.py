"""How tensors are walked: canonical order, merged strides, dense allocation, limits."""

import pytest
import torch

from fastdiff.kernels.layout import MAX_ELEMENTS, empty, in_lane_order, is_channels_last, merge_strides, sample_extent

VIEWS = {
    "channels_last": lambda: torch.arange(2 * 3 * 4 * 5).view(2, 4, 5, 3).permute(0, 3, 1, 2),
    "contiguous": lambda: torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5),
    "transposed": lambda: torch.arange(2 * 3 * 4 * 5).view(2, 3, 5, 4).transpose(2, 3),
    "crop": lambda: torch.arange(2 * 6 * 9 * 9).view(2, 6, 9, 9)[:, 1:4, 2:6, 3:8],
    "every other channel": lambda: torch.arange(2 * 6 * 4 * 5).view(2, 6, 4, 5)[:, ::2],
    "expanded": lambda: torch.arange(2 * 4 * 5).view(2, 1, 4, 5).expand(2, 3, 4, 5),
    "volume": lambda: torch.arange(2 * 3 * 2 * 4 * 5).view(2, 3, 2, 4, 5),
    "slices of a volume": lambda: torch.arange(2 * 3 * 8 * 4 * 5).view(2, 3, 8, 4, 5)[:, :, ::3],
    "sequence": lambda: torch.arange(2 * 7 * 3).view(2, 7, 3).transpose(1, 2),
    "row": lambda: torch.arange(2 * 7).view(2, 7),
    "scalars": lambda: torch.arange(4)[::2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_merged_strides_reach_every_element(name):
    x = VIEWS[name]()
    extent, (strides,) = merge_strides(x)
    batch, channels, positions = sample_extent(x.shape)
    assert extent[:2] == (channels, positions)
    b, p, c = torch.meshgrid(torch.arange(batch), torch.arange(positions), torch.arange(channels), indexing="ij")
    inner = extent.inner
    offset = b * strides[0] + c * strides[1] + (p // inner) * strides[2] + (p % inner) * strides[3]
    memory = torch.as_strided(x, (int(offset.max()) + 1,), (1,))
    canonical = x.movedim(1, -1) if x.ndim > 1 else x
    assert torch.equal(memory[offset].flatten(), canonical.flatten())


def test_tensors_are_merged_alike():
    image, transposed = VIEWS["contiguous"](), VIEWS["transposed"]()
    extent, strides = merge_strides(image, transposed)
    assert extent.inner == 5
    assert strides == [(60, 20, 5, 1), (60, 20, 1, 4)]


def test_a_crop_of_a_volume_is_refused():
    with pytest.raises(ValueError, match="do not merge into two axes; pass contiguous or channels-last"):
        merge_strides(torch.zeros(1, 2, 6, 6, 6)[..., 1:4, 1:4, 1:4])


@pytest.mark.parametrize(
    ("name", "channels_last", "contiguous"),
    [
        ("channels_last", True, False),
        ("contiguous", False, True),
        ("transposed", False, False),
        ("crop", False, False),
        ("expanded", False, False),
        ("volume", False, True),
        ("sequence", True, False),
        ("row", True, True),
        ("scalars", True, True),
    ],
)
def test_order_of_a_sample(name, channels_last, contiguous):
    x = VIEWS[name]()
    assert is_channels_last(x) == in_lane_order(x, True) == channels_last
    assert in_lane_order(x, False) == contiguous


def test_the_batch_stride_is_free():
    x = torch.zeros(6, 4, 5, 3).permute(0, 3, 1, 2)[::2]
    assert is_channels_last(x)
    assert in_lane_order(torch.zeros(6, 3, 4, 5)[::2], False)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4), (2, 3, 2, 4, 5), (2, 3), (2,), (2, 1, 4, 5)], ids=str)
def test_empty_is_dense(shape):
    last = empty(shape, torch.float16, torch.device("cpu"), True)
    assert last.shape == shape
    assert last.dtype == torch.float16
    assert is_channels_last(last)
    assert empty(shape, torch.float32, torch.device("cpu"), False).is_contiguous()


def test_a_sample_too_large_is_refused():
    with pytest.raises(ValueError, match=f"has {2**31} elements, at most {MAX_ELEMENTS}"):
        sample_extent((1, 2, 2**30))
