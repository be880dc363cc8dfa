"""The conv over a doubled image against doubling the image, and when the U-Net takes it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff import upsampled_conv as module
from fastdiff.unet_blocks import Upsample
from fastdiff.upsampled_conv import computes, upsampled_conv


def _doubled_first(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 1, 1), (0, 3, 2, 2), (3, 8, 7, 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_conv_of_the_doubled_image(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(6, shape[1], 3, 3, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64) if biased else None
    result = upsampled_conv(x, weight, bias)
    torch.testing.assert_close(result, _doubled_first(x, weight, bias), rtol=1e-12, atol=1e-12)
    assert result.shape[2:] == (2 * shape[2], 2 * shape[3])
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_those_of_the_conv_of_the_doubled_image() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 5), (4, 3, 3, 3), (4,))]
    upstream = torch.randn(2, 4, 8, 10, dtype=torch.float64)
    ours, expected = (torch.autograd.grad(f(*tensors), tensors, upstream) for f in (upsampled_conv, _doubled_first))
    for ours_one, expected_one in zip(ours, expected):
        torch.testing.assert_close(ours_one, expected_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"padding_mode": "circular"},
        {"padding": (0, 0)},
        {"dilation": (2, 2)},
        {"stride": (2, 2)},
        {"groups": 2},
        {"kernel_size": (1, 1)},
    ],
)
def test_any_other_conv_is_left_to_itself(change: dict[str, object]) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert computes(conv)
    for name, value in change.items():
        setattr(conv, name, value)
    assert not computes(conv)


def test_upsample_takes_it_where_it_pays_and_the_conv_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    upsample, x = Upsample(4), torch.randn(1, 4, 16, 16)
    taken = []

    def spy(*arguments: torch.Tensor) -> torch.Tensor:
        taken.append(arguments)
        return upsampled_conv(*arguments)

    monkeypatch.setattr(module, "upsampled_conv", spy)
    expected = upsample(x)
    assert not taken  # eager
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    # each sum of 4 * 9 products, each of a magnitude of about 1, in another order
    torch.testing.assert_close(upsample(x), expected, rtol=0, atol=2 * 36 * 2**-24)
    assert len(taken) == 1
    upsample(x[:, :, :15, :15])
    assert len(taken) == 1  # too few pixels
    calls = []
    upsample.conv.register_forward_hook(lambda *_: calls.append(1))
    upsample(x)
    assert len(taken) == 1
    assert calls == [1]
