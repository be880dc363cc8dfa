"""A 3x3 conv of an image doubled by nearest neighbour, without the doubled image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# fewer pixels in a batch do not repay adding the weights
MIN_PIXELS = 256


def pays(x: Tensor) -> bool:
    """Whether `upsampled_conv` is the faster way for x: compiled for a CPU, and large enough. Unmeasured on GPUs."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() >= MIN_PIXELS * x.shape[1]


def computes(conv: nn.Conv2d) -> bool:
    """Whether `upsampled_conv` does what this conv does; a user may have made it circular, for one."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1) with 4/9 of the multiplications.

    x: [B, C, H, W]; weight: [O, C, 3, 3]; bias: [O]. Returns [B, O, 2H, 2W], channels-last.

    A window of 3x3 pixels of the doubled image holds only 2x2 different ones, and which weights meet on one of them
    depends on whether its row and its column are even. So there are four 2x2 convs of x; they run as one with 4 O
    outputs, of which each pixel of the result takes its own.
    """
    height, width = x.shape[2:]
    outputs = weight.shape[0]
    h = F.conv2d(x, _met(weight), padding=1)  # [B, 4 O, H+1, W+1]
    h = h.permute(0, 2, 3, 1).unflatten(3, (2, 2, outputs))  # [B, H+1, W+1, odd row, odd column, O]
    rows = [
        torch.stack([h[:, odd : odd + height, :width, odd, 0], h[:, odd : odd + height, 1:, odd, 1]], dim=3)
        for odd in range(2)
    ]
    image = torch.stack(rows, dim=2)  # [B, H, 2, W, 2, O]
    if bias is not None:
        image = image + bias.to(image.dtype)
    return image.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _met(weight: Tensor) -> Tensor:
    """The weights [4 O, C, 2, 2] of the four convs: for even rows and columns, odd columns, odd rows, both odd."""

    def sums(taps: Tensor, dim: int) -> Tensor:
        first, middle, last = taps.unbind(dim)
        return torch.stack([torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)])

    taps = weight.permute(0, 2, 3, 1)  # neighbouring channels innermost, as in memory
    return sums(sums(taps, 1), 3).transpose(0, 1).flatten(0, 2).permute(0, 3, 1, 2)
