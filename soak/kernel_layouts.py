"""Tensors anywhere in memory: axes in any order, gaps between elements, an offset; and who wrote beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Random = np.random.Generator


@dataclass(frozen=True)
class Layout:
    """How the axes of a tensor lie in memory.

    order: the axes from the outermost to the innermost. steps, gaps: for each axis, elements from one to the next in
    units of what lies within, and elements left out at its end. offset: elements before the first.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    gaps: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, random: Random, ndim: int) -> Layout:
        """Dense in a usual order, or anything; samples come first or not."""
        kind = random.choice(["channels_last", "contiguous", "any"])
        order = list(range(ndim))
        if kind == "channels_last" and ndim > 2:
            order = [0, *range(2, ndim), 1]
        if kind == "any":
            random.shuffle(order)
        dense = kind != "any" or random.random() < 0.3
        steps = [1 if dense else int(random.integers(1, 3)) for _ in order]
        gaps = [0 if dense else int(random.integers(0, 2)) for _ in order]
        return cls(tuple(order), tuple(steps), tuple(gaps), int(random.integers(0, 3)))

    def within(self) -> Layout:
        """The same for tensors with one more axis, outermost."""
        return Layout((0, *(axis + 1 for axis in self.order)), (1, *self.steps), (0, *self.gaps), self.offset)

    def place(self, value: Tensor) -> Placed:
        """A copy of value that lies like this in a storage of its own."""
        strides, extent = [0] * value.ndim, 1
        for axis in reversed(self.order):
            strides[axis] = extent * self.steps[axis]
            extent = strides[axis] * max(value.shape[axis] + self.gaps[axis], 1)
        storage = _filled(extent + self.offset + 3, value.dtype, value.device)
        tensor = storage.as_strided(value.shape, strides, self.offset)
        tensor.copy_(value)
        return Placed(tensor, storage)


class Placed:
    """A tensor and the storage around it, as it was before a call."""

    def __init__(self, tensor: Tensor, storage: Tensor) -> None:
        self.tensor, self.storage = tensor, storage
        self._before = storage.clone()

    def changed(self, *, written: bool) -> bool:
        """Whether anything beside the tensor was written, or anything at all unless it is one to write to."""
        free = torch.zeros_like(self.storage, dtype=torch.bool)
        if written:
            free.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(True)
        different = self.storage.view(torch.uint8).ne(self._before.view(torch.uint8))
        return bool((different.view(len(self.storage), -1).any(1) & ~free).any())


def _filled(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A storage whose every element would be noticed in a result."""
    if dtype.is_floating_point:
        return torch.full((length,), float("nan"), dtype=dtype, device=device)
    return torch.full((length,), 77, dtype=dtype, device=device)
