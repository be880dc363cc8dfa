"""The buffers of an engine: the states of all requests under way, densely at the front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff import noise as noise_contract
from fastdiff.engine_request import Request
from fastdiff.kernels.layout import empty
from fastdiff.model_arguments import is_plain
from fastdiff.table import StepTable


class Places:
    """Places for `capacity` samples of `shape`; what is at place i is row i of every tensor.

    x: [capacity, C, *spatial] float32. model_input: the same in the model's `dtype`. history: [K, capacity, C,
    *spatial] float32. seeds, sample_indices: int64 [capacity]. cond, uncond: the model's tensors by path, [capacity,
    ...], once `arguments` is known: the model's other arguments, with a TensorAt for each tensor.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.capacity, self.shape, self.device = capacity, shape, device
        self.x = empty((capacity, *shape), torch.float32, device, channels_last=True)
        self.model_input = empty((capacity, *shape), dtype, device, channels_last=True)
        self.history = self._allocate_history(0)
        self.seeds, self.sample_indices = torch.zeros(2, capacity, dtype=torch.int64, device=device)
        self.cond: dict[str, Tensor] = {}
        self.uncond: dict[str, Tensor] = {}
        self.arguments: dict[str, Any] | None = None

    def accept(self, arguments: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The first request decides what the model is called with; ValueError for one that does not fit it."""
        for path, value in tensors.items():
            if value.ndim == 0 or value.shape[0] != 1:
                raise ValueError(f"model_kwargs must hold {path} of shape [1, ...], got {list(value.shape)}")
        if not is_plain(arguments):
            raise ValueError(f"model_kwargs must hold tensors and plain values, got {arguments!r}")
        if self.arguments is None:
            self.arguments = arguments
            for path, value in tensors.items():
                self.cond[path] = value.new_zeros((self.capacity, *value.shape[1:]))
                self.uncond[path] = torch.zeros_like(self.cond[path])
        expected = {path: (value.dtype, (1, *value.shape[1:])) for path, value in self.cond.items()}
        got = {path: (value.dtype, tuple(value.shape)) for path, value in tensors.items()}
        if arguments != self.arguments or got != expected:
            raise ValueError(
                f"model_kwargs must be like those of the first request, {self.arguments} with {expected}, "
                f"got {arguments} with {got}"
            )

    def forget_arguments(self) -> None:
        """The next request decides anew; there must be none here."""
        self.arguments, self.cond, self.uncond = None, {}, {}

    def start(
        self,
        place: int,
        request: Request,
        table: StepTable,
        cond: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor],
    ) -> None:
        """Write the start of a request's walk into a place."""
        here = slice(place, place + 1)
        self.seeds[place] = request.seed
        self.sample_indices[place] = request.sample_index
        start = noise_contract.normal(
            (1, *self.shape), seed=self.seeds[here], sample_indices=self.sample_indices[here], stream="initial"
        )
        torch.mul(start, table.init_noise_sigma, out=self.x[here])
        self.model_input[here].copy_(self.x[here] * float(table.columns["c_in"][0]))
        for kept, given in ((self.cond, cond), (self.uncond, uncond)):
            for path, value in given.items():
                kept[path][here].copy_(value)

    def move(self, source: int, target: int) -> None:
        """What is at one place takes another."""
        states = [self.x, self.model_input, self.seeds, self.sample_indices, *self.history]
        for value in (*states, *self.cond.values(), *self.uncond.values()):
            value[target].copy_(value[source])

    def need_slots(self, n_slots: int) -> None:
        """Have at least so many history slots; those that are there keep what they hold."""
        if n_slots > len(self.history):
            history = self._allocate_history(n_slots)
            history[: len(self.history)].copy_(self.history)
            self.history = history

    def _allocate_history(self, n_slots: int) -> Tensor:
        """[K, capacity, C, *spatial], each slot laid out as the state."""
        slots = empty((n_slots * self.capacity, *self.shape), torch.float32, self.device, channels_last=True)
        return slots.unflatten(0, (n_slots, self.capacity))
