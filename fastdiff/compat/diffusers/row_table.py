"""A walk's rows for a façade: packed once, looked up by timestep, copied to a device when they are first used there."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.compat.packed_rows import pack_rows
from fastdiff.table import Row


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Finder:
    """Finds timesteps among those listed, on the device they are on."""

    def __init__(self, timesteps: Sequence[float]) -> None:
        self._timesteps = list(timesteps)
        self._on: dict[torch.device, Tensor] = {}

    def __call__(self, timesteps: Tensor, device: torch.device) -> Tensor:
        """int64 [B] the place of each of the timesteps [B], -1 for one that is not listed."""
        listed = self._on.get(device)
        if listed is None:
            listed = self._on[device] = _upload(torch.tensor(self._timesteps, dtype=torch.float64), device)
        hits = timesteps.to(device)[:, None] == listed
        return hits.byte().argmax(1).masked_fill(~hits.any(1), -1)


class RowTable:
    """Rows packed in float64, and their copies on devices.

    Attributes:
        rows: as they came from the solver.
        index: row number by timestep, for the timesteps given; of a repeated one the last.
        find: the same for a tensor of timesteps.
        c_in: of each row the scale that makes the state the model's input.
        reads: for each row the earlier rows whose remembered values it reads, newest first.
    """

    def __init__(self, rows: Sequence[Row], timesteps: Sequence[float] = ()) -> None:
        floats, self.reads = pack_rows(rows)
        bad = np.isnan(floats).any(axis=1)
        if bad.any():
            raise ValueError(f"row {int(bad.argmax())} holds a NaN: this solver cannot walk this grid")
        self._floats = torch.from_numpy(floats)
        self.rows = list(rows)
        self.index = {t: i for i, t in enumerate(timesteps)}
        self.find = Finder(timesteps)
        self.c_in = [row.c_in for row in rows]
        self._on: dict[Hashable, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._c_in_on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The packed rows for states of a dtype, and int64 [1] tensors with the number of each row."""
        packed = self._on.get((device, dtype))
        if packed is None:
            floats = _upload(self._floats.to(torch.float64 if dtype == torch.float64 else torch.float32), device)
            packed = self._on[device, dtype] = floats, torch.arange(len(floats), device=device).split(1)
        return packed

    def c_in_on(self, device: torch.device) -> Tensor:
        """float32 [R + 1] c_in of the rows and, for row -1, NaN."""
        scales = self._c_in_on.get(device)
        if scales is None:
            scales = torch.tensor([*self.c_in, math.nan], dtype=torch.float32)
            scales = self._c_in_on[device] = _upload(scales, device)
        return scales
