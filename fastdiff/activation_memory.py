"""How many bytes a forward pass keeps for its backward pass."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn


class ActivationMemory:
    """`with ActivationMemory(model, device) as memory: loss = ...`, then `memory.bytes`.

    On a GPU: what the allocator holds more at the end of the block than at its start. Elsewhere: the distinct storages
    that autograd saves, without those of the model's weights; the hooks that see them would compile a compiled model
    anew, so there it is of no use.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self._saved: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def __enter__(self) -> ActivationMemory:
        if self._device.type == "cuda":
            self.bytes = -torch.cuda.memory_allocated(self._device)
        else:
            self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes += torch.cuda.memory_allocated(self._device)
        else:
            self._hooks.__exit__(kind, error, traceback)
            self.bytes = sum(self._saved.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # what is saved stays allocated until the backward pass, so no two of these addresses are alike
        if storage.data_ptr() not in self._weights:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor
