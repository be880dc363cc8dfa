"""Tensors of which each process holds a part (FSDP2's), next to ordinary ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of this process, of an ordinary tensor all of it; a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; where each process holds a part, all must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write a whole `value`, which every process has, into `target`, each process its part.

    Raises ValueError for another shape: copying would broadcast.
    """
    if target.shape != value.shape:
        raise ValueError(f"value must have shape {list(target.shape)}, got {list(value.shape)}")
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)
