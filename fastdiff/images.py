"""Pixels for looking at: float images in [-1, 1] to uint8, and many of them to one picture."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """round((clamp(x, -1, 1) + 1) * 127.5) as uint8: the inverse of what training reads."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int, *, padding: int = 1) -> Tensor:
    """uint8 [N, C, H, W] as one picture uint8 [C, H', W'], row by row, on a black ground."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = images.new_zeros(channels, rows * (height + padding) + padding, columns * (width + padding) + padding)
    for index in range(count):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        grid[:, top : top + height, left : left + width] = images[index]
    return grid


def save_png(picture: Tensor, file: str | Path | IO[bytes], *, scale: int = 1) -> None:
    """Write uint8 [C, H, W] with 1 or 3 channels to `file`, every pixel as a square of `scale` pixels."""
    from PIL import Image

    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"picture must be uint8 [1 or 3, H, W], got {picture.dtype} {list(picture.shape)}")
    pixels = picture.cpu().repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(file, format="PNG")
