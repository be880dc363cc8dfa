"""What the engine is asked for, and the step tables that requests walk."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import solvers
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET, DeviceTable
from fastdiff.model_arguments import is_plain
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import StepTable

# tables that are kept for requests to come
MAX_TABLES = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to draw. Its options mean what they mean to `fastdiff.Sampler`.

    Attributes:
        seed, sample_index: the noise is that of `Sampler.sample((1, ...), seed=seed, sample_indices=[sample_index])`.
        guidance_scale: None for one place in a model call, a number for two.
        model_kwargs, uncond_kwargs: tensors [1, ...], of the same names, shapes and dtypes in all requests of one
            engine; other values must be equal in all of them.
    """

    solver: str | StepTable = "dpmpp_2m"
    num_inference_steps: int | None = None
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    timestep_spacing: str = "trailing"
    sigma_spacing: str | None = None
    clip_sample: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    sample_index: int = 0
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    uncond_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Packed:
    """A table on the host and on the device, and what every step asks of it.

    evaluates, guided: of each row, whether it calls the model, and with both halves of guidance. whole: its timesteps
    are integers.
    """

    table: StepTable
    rows: DeviceTable
    evaluates: tuple[bool, ...]
    guided: tuple[bool, ...]
    whole: bool
    draws_noise: bool
    learns_variance: bool

    @classmethod
    def of(cls, table: StepTable, device: torch.device) -> Packed:
        """Pack `table` for `device`."""
        return cls(
            table=table,
            rows=table.to(device),
            evaluates=tuple(table.ev.tolist()),
            guided=tuple((table.ev & (table.columns["g"] != 1.0)).tolist()),
            whole=table.timesteps.dtype.kind == "i",
            draws_noise=table.draws_noise,
            learns_variance=bool(table.columns["lv"].any()),
        )


class JoinedTables(NamedTuple):
    """The tables of all requests under way as one.

    timesteps: [R], int64 if those of all tables are whole, else float32. first: the number of a table's first row, by
    the id of its Packed.
    """

    rows: DeviceTable
    timesteps: Tensor
    first: dict[int, int]

    @classmethod
    def of(cls, tables: Iterable[Packed]) -> JoinedTables:
        """One after the other, each once; history coefficients padded with zeros."""
        kinds = {id(packed): packed for packed in tables}
        width = max(packed.rows.floats.shape[1] for packed in kinds.values())
        floats = torch.cat([F.pad(kind.rows.floats, (0, width - kind.rows.floats.shape[1])) for kind in kinds.values()])
        integers = torch.cat([kind.rows.integers for kind in kinds.values()])
        t = floats[:, FLOAT_COLUMNS.index("t")]
        whole = all(kind.whole for kind in kinds.values())
        lengths = [len(kind.table) for kind in kinds.values()]
        first = dict(zip(kinds, itertools.accumulate(lengths[:-1], initial=0)))
        return cls(DeviceTable(floats, integers), t.long() if whole else t.contiguous(), first)

    @property
    def n_slots(self) -> int:
        """History slots that some table needs."""
        return self.rows.floats.shape[1] - HISTORY_OFFSET


class RequestTables:
    """Builds the tables of requests, and keeps those of the last MAX_TABLES kinds."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, device: torch.device) -> None:
        self.schedule, self.prediction_type, self.device = schedule, prediction_type, device
        self._kept: OrderedDict[str, Packed] = OrderedDict()

    def table_of(self, request: Request) -> Packed:
        """Raises ValueError where the request's options have no walk, or not one that starts from noise."""
        options = {
            "timestep_spacing": request.timestep_spacing,
            "sigma_spacing": request.sigma_spacing,
            "clip_sample": request.clip_sample,
            "guidance_scale": request.guidance_scale,
            "guidance_interval": request.guidance_interval,
            **request.solver_options,
        }
        steps = request.num_inference_steps
        if not is_plain(options):
            raise ValueError(f"solver_options must hold plain values, got {dict(request.solver_options)!r}")
        if isinstance(request.solver, StepTable):
            if steps is not None or request.solver_options:
                raise ValueError("num_inference_steps and solver_options go with a solver's name, not with a StepTable")
            packed = Packed.of(request.solver, self.device)
        elif steps is None:
            raise ValueError(f"num_inference_steps is needed with solver {request.solver!r}")
        else:
            key = repr((request.solver, steps, sorted(options.items())))
            if key not in self._kept:
                table = solvers.build(
                    request.solver, self.schedule, steps, prediction_type=self.prediction_type, **options
                )
                self._kept[key] = Packed.of(table, self.device)
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_TABLES:
                self._kept.popitem(last=False)
            packed = self._kept[key]
        if packed.table.start[1] == 0 or packed.table.keeps_known:
            raise ValueError(f"solver {request.solver!r} starts from an image or keeps one: a request has none")
        return packed
