"""The step table: what a solver is to the rest of the engine.

A row stands for one pass of the `p_sample` kernel, normally one model evaluation. For state x and model output m:

    m      = m_u + g * (m_c - m_u)                     classifier-free guidance
    m      = rescale * m + mg * grad                   guidance rescale; gradient of a classifier (score form)
    x0     = clip(px * x + pm * m)                     data prediction, clipped to [-lim, lim]
    y      = ux * x + u0 * x0 + um * m                 what a multistep method remembers
    std    = cz * exp(lv * v)                          v: the learned-variance channels
    x_next = cx * x + c0 * x0 + cm * m + sum_k h[k] * slot_k + std * z + vg * exp(2 * lv * v) * grad
    x_next = mask * (k0 * known + kz * z) + (1 - mask) * x_next       unless k0 = kz = 0
    slot   = y                                         after the reads
    next model input = c_in of the next row * x_next

Rows are made in float64 by `fastdiff.solvers` and cast to float32 once, when they are packed for a device.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET, INT_COLUMNS, DeviceTable
from fastdiff.kernels.philox import STREAMS

ROW_COLUMNS: tuple[str, ...] = ("t", "c_in", "px", "pm", "lim", "g", "mg", "vg", "cx", "c0", "cm", "cz", "lv")
ROW_COLUMNS += ("ux", "u0", "um", "k0", "kz")


@dataclass(kw_only=True)
class Row:
    """One row while a solver builds its table: coefficients of the module's formulas, all float64.

    `history` maps the index of the row that produced a remembered value to its coefficient; packing turns it into
    physical slots. `draws` says that the row consumes a draw of noise from `stream`; `ev` that it evaluates the model.
    """

    t: float = 0.0
    c_in: float = 1.0
    px: float = 0.0
    pm: float = 0.0
    lim: float = math.inf
    g: float = 1.0
    mg: float = 0.0
    vg: float = 0.0
    cx: float = 0.0
    c0: float = 0.0
    cm: float = 0.0
    cz: float = 0.0
    lv: float = 0.0
    ux: float = 0.0
    u0: float = 0.0
    um: float = 0.0
    k0: float = 0.0
    kz: float = 0.0
    history: dict[int, float] = field(default_factory=dict)
    draws: bool = False
    stream: str = "step"
    ev: bool = True
    at: tuple[float, float] | None = None


def _allocate_slots(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Linear scan over the rows: h [R, K] by physical slot and the slot each row writes (-1: its value is not read).

    A row reads before it writes, so a slot whose last reader is this row is free for this row's own value.
    """
    last_read = {source: i for i, row in enumerate(rows) for source, h in row.history.items() if h != 0.0}
    for source, reader in last_read.items():
        if not 0 <= source < reader:
            raise ValueError(f"row {reader} reads the value of row {source}, which is not an earlier row")
    slot_of: dict[int, int] = {}
    free: list[int] = []
    n_slots = 0
    written, reads = [], []
    for i, row in enumerate(rows):
        reads.append({slot_of[source]: h for source, h in row.history.items() if h != 0.0})
        for source in [source for source in slot_of if last_read[source] == i]:
            free.append(slot_of.pop(source))
        if i in last_read:
            if not free:
                free.append(n_slots)
                n_slots += 1
            slot_of[i] = free.pop()
        written.append(slot_of.get(i, -1))
    h = np.zeros((len(rows), n_slots))
    for i, read in enumerate(reads):
        for slot, coefficient in read.items():
            h[i, slot] = coefficient
    return h, np.array(written, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTable:
    """A solver's whole walk, one row a pass of the kernel; made by `from_rows`, executed by `fastdiff.Sampler`.

    Attributes:
        columns: float64 [R] by name (`ROW_COLUMNS`).
        h: float64 [R, K] coefficients of the K history slots.
        slot: int32 [R] slot that takes the row's y, -1 for none.
        draw: int32 [R] 0, 1, 2, ... over the rows of each stream that consume noise, -1 for none.
        stream: int32 [R] the noise stream (`fastdiff.kernels.philox.STREAMS`).
        ev: bool [R] the row evaluates the model.
        init_noise_sigma: a walk from pure noise starts at init_noise_sigma * unit noise.
        start: (alpha, sigma) of the first point: a walk from an image starts at alpha * image + sigma * unit noise.
        end: (alpha, sigma) of the last point, (1, 0) for a walk to clean data.
    """

    columns: dict[str, np.ndarray]
    h: np.ndarray
    slot: np.ndarray
    draw: np.ndarray
    stream: np.ndarray
    ev: np.ndarray
    init_noise_sigma: float = 1.0
    start: tuple[float, float] = (0.0, 1.0)
    end: tuple[float, float] = (1.0, 0.0)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row],
        *,
        init_noise_sigma: float = 1.0,
        start: tuple[float, float] = (0.0, 1.0),
        end: tuple[float, float] = (1.0, 0.0),
    ) -> "StepTable":
        """Pack rows: assign history slots and number the draws.

        Raises:
            ValueError: no rows, a coefficient that is NaN or infinite (except lim), a row that reads a later row.
        """
        rows = list(rows)
        if not rows:
            raise ValueError("rows must hold at least one row, got none")
        columns = {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in ROW_COLUMNS}
        h, slot = _allocate_slots(rows)
        for name, column in [*columns.items(), ("h", h)]:
            if np.isnan(column).any() or (name != "lim" and np.isinf(column).any()):
                row = int(np.argwhere(~np.isfinite(column))[0][0])
                raise ValueError(f"column {name} of row {row} is {column[row]}: this solver cannot walk this grid")
        count: dict[str, int] = {}
        draw = []
        for one in rows:
            draw.append(count.get(one.stream, 0) if one.draws else -1)
            count[one.stream] = count.get(one.stream, 0) + one.draws
        return cls(
            columns=columns,
            h=h,
            slot=slot,
            draw=np.array(draw, dtype=np.int32),
            stream=np.array([STREAMS[row.stream] for row in rows], dtype=np.int32),
            ev=np.array([row.ev for row in rows]),
            init_noise_sigma=float(init_noise_sigma),
            start=start,
            end=end,
        )

    def __len__(self) -> int:
        return len(self.slot)

    @property
    def n_slots(self) -> int:
        """History slots needed: K."""
        return self.h.shape[1]

    @property
    def draws_noise(self) -> bool:
        """True if any row consumes noise."""
        return bool((self.draw >= 0).any())

    @property
    def keeps_known(self) -> bool:
        """True if rows blend in the known part of an image."""
        return bool(self.columns["k0"].any() or self.columns["kz"].any())

    @cached_property
    def timesteps(self) -> np.ndarray:
        """[R] what the model is told: int64 if all are whole numbers, else float64."""
        t = self.columns["t"]
        whole = t[self.ev]
        return t.astype(np.int64) if np.array_equal(whole, np.round(whole)) else t

    @cached_property
    def guided(self) -> bool:
        """True if some row's guidance scale is not 1."""
        return bool((self.columns["g"][self.ev] != 1.0).any())

    def to(self, device: torch.device | str) -> DeviceTable:
        """Pack for the kernel: float32 and int32 rows, each with the c_in of the row after it."""
        columns = dict(self.columns)
        # the row after the last one is never run: its model input is written as the plain state
        columns["c_next"] = np.append(columns["c_in"][1:], 1.0)
        floats = np.concatenate([np.stack([columns[name] for name in FLOAT_COLUMNS], 1), self.h], axis=1)
        assert floats.shape[1] == HISTORY_OFFSET + self.n_slots
        integers = np.stack([getattr(self, name) for name in INT_COLUMNS], axis=1)
        return DeviceTable(
            torch.tensor(floats, dtype=torch.float32, device=device),
            torch.tensor(integers, dtype=torch.int32, device=device),
        )


def run_table(
    table: StepTable,
    model: Callable[[Tensor, float], Tensor],
    x: Tensor,
    noise: Callable[[int, int], Tensor] | None = None,
    *,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Execute a table row by row in the dtype of x (float64 in tests): the plain meaning of the rows.

    Args:
        model: called as model(c_in * x, t).
        x: the starting state, already scaled by `table.init_noise_sigma`.
        noise: noise(stream, draw) -> tensor like x, asked once for each row that draws.
        known, mask: tensors that broadcast with x, for a table with k0 or kz.

    Returns:
        the state after the last row.
    """
    slots: dict[int, Tensor] = {}
    for i in range(len(table)):
        c = {name: float(column[i]) for name, column in table.columns.items()}
        m = model(c["c_in"] * x, c["t"]) if table.ev[i] else torch.zeros_like(x)
        x0 = (c["px"] * x + c["pm"] * m).clamp(-c["lim"], c["lim"])
        x_next = c["cx"] * x + c["c0"] * x0 + c["cm"] * m
        for k, h in enumerate(table.h[i]):
            if h != 0.0:
                x_next = x_next + h * slots[k]
        z = torch.zeros_like(x)
        if table.draw[i] >= 0:
            if noise is None:
                raise ValueError(f"noise is needed: row {i} draws")
            z = noise(int(table.stream[i]), int(table.draw[i]))
        x_next = x_next + c["cz"] * z
        if mask is not None and known is not None and (c["k0"] or c["kz"]):
            x_next = mask * (c["k0"] * known + c["kz"] * z) + (1 - mask) * x_next
        if table.slot[i] >= 0:
            slots[int(table.slot[i])] = c["ux"] * x + c["u0"] * x0 + c["um"] * m
        x = x_next
    return x
