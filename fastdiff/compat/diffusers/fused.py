"""What the façades of diffusers' schedulers share: packed rows, timesteps known on the host, noise, one fused step.

A façade subclasses diffusers' scheduler and replaces its `step`; configuration, timesteps and outputs stay diffusers'.
Its rows come from the engine's solvers in float64 and are packed once for each `set_timesteps`. A step then looks up
its row on the host and runs one op. No step synchronises with a device: the timesteps are copied to the host when
`set_timesteps` sets them, and a timestep that is a view of them is known by its address. Only the first step of a walk
with another device tensor and without `set_begin_index` reads that tensor, as the original does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.compat.diffusers.row_table import Finder, RowTable
from fastdiff.compat.diffusers.threshold import dynamic_threshold
from fastdiff.kernels.solver_step import solver_step
from fastdiff.noise import normal
from fastdiff.table import Row

MAX_TABLES = 16
MAX_WALKS = 16
Timestep = int | float | Tensor


def result_dtype(sample: Tensor, model_output: Tensor) -> torch.dtype:
    """What arithmetic between the two gives."""
    if sample.dtype == model_output.dtype:
        return sample.dtype
    return torch.promote_types(sample.dtype, model_output.dtype)


def _checking(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also checks the configuration; diffusers reads its options from the original's signature."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._check_config()

    return __init__


def _contents(source: Tensor | np.ndarray) -> Hashable:
    """What tells a tensor's values from others'."""
    array = source.cpu().numpy() if isinstance(source, Tensor) else source
    return array.dtype.str, array.tobytes()


def _version(source: Any) -> int | None:
    """A number that changes when a tensor is written to, such as `scheduler.sigmas *= 0.9`."""
    return source._version if isinstance(source, Tensor) and not source.is_inference() else None


class FusedScheduler:
    """Comes before diffusers' scheduler among the bases of a façade.

    Class attributes:
        row_sources: names of the tensors that rows are made of: another tensor under one of them means other rows.
        per_sample: `step` also takes a timestep [B], one for each sample.
        prediction_types: those this façade can honour; (): its configuration has no such option.
    """

    row_sources: tuple[str, ...] = ("timesteps", "alphas_cumprod")
    per_sample = True
    prediction_types: tuple[str, ...] = ()

    # of diffusers' scheduler
    config: Any
    num_inference_steps: int | None
    _step_index: int | None
    _begin_index: int | None
    _init_step_index: Callable[[Any], None]

    _noise_contract: tuple[int | Tensor, Tensor | None] | None = None
    # the tables in use and what they are made of; those of earlier walks, by the contents of the same
    _tables: dict[Hashable, RowTable]
    _tables_of: Sequence[tuple[str, Any, int | None]] = (("timesteps", None, None),)
    _kept: dict[Hashable, dict[Hashable, RowTable]]
    _kept_for: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # the module that a saved pipeline names: it has SchedulerMixin, by which the pipeline loader knows a scheduler
        package = __name__.rpartition(".")[0]
        if cls.__module__.startswith(package + "."):
            cls.__module__ = package
        if issubclass(cls, SchedulerMixin) and "__init__" not in cls.__dict__:
            cls.__init__ = _checking(cls.__init__)  # type: ignore[method-assign]

    # A property, so that each set_timesteps (and each assignment) leaves a copy on the host and no stale rows.
    @property
    def timesteps(self) -> Tensor:
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._timesteps = value
        # PNDMScheduler has None before set_timesteps
        self._listed: list[Any] = [] if value is None else value.tolist()
        self._find = Finder(self._listed)
        self._place = {t: i for i, t in enumerate(self._listed)}

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """The original's: diffusers looks a class up by its name among its own, where a façade's is none."""
        original: Any = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
        return original._get_compatibles()

    def use_noise_contract(self, seed: int | Tensor | None, sample_indices: Tensor | None = None) -> None:
        """Draw the noise of steps from `fastdiff.noise` instead of a generator: the same on every device, in any batch.

        The noise of a sample depends on its seed, its index and the position of the timestep in `timesteps`.

        Args:
            seed: int in [0, 2^63), int64 [B] with one a sample, or None to go back to generators.
            sample_indices: int64 [B]; 0..B-1 by default.

        Raises:
            ValueError: a seed that is neither.
        """
        if not (seed is None or isinstance(seed, Tensor) or (type(seed) is int and 0 <= seed < 2**63)):
            raise ValueError(f"seed must be an int in [0, 2^63), an int64 tensor or None, got {seed!r}")
        self._noise_contract = None if seed is None else (seed, sample_indices)

    def _check_config(self) -> None:
        """Called when a façade was constructed: ValueError for an option that it cannot honour."""
        if self.prediction_types:
            self._accept("prediction_type", self.prediction_types)

    def _accept(self, option: str, accepted: Sequence[Any]) -> None:
        """ValueError unless the configuration's option is one of those accepted."""
        value = getattr(self.config, option)
        if value not in accepted:
            names = ", ".join(repr(one) for one in accepted)
            raise ValueError(f"{option} is {value!r}, {type(self).__name__} accepts {names}")

    def _table(self, key: Hashable, build: Callable[[], RowTable]) -> RowTable:
        """The table of some options of `step`, built when it is first needed or what it is made of has changed."""
        for name, source, version in self._tables_of:
            current = getattr(self, name)
            if current is not source or _version(current) != version:
                self._choose_tables()
                break
        tables = self._tables
        table = tables.get(key)
        if table is None:
            if len(tables) >= MAX_TABLES:
                tables.clear()
            table = tables[key] = build()
        return table

    def _choose_tables(self) -> None:
        """The tables of the walk that is set now, kept from an earlier one like it if there was one."""
        if self._kept_for is not self.config:
            self._kept, self._kept_for = {}, self.config
        sources = [(name, getattr(self, name)) for name in self.row_sources]
        self._tables_of = [(name, source, _version(source)) for name, source in sources]
        others = [_contents(source) for name, source in sources if name != "timesteps"]
        contents = getattr(self, "num_inference_steps", None), tuple(self._listed), *others
        if contents not in self._kept and len(self._kept) >= MAX_WALKS:
            self._kept.clear()
        self._tables = self._kept.setdefault(contents, {})

    def _known(self, timestep: Timestep) -> float | None:
        """A scalar timestep as a Python number, None where only the device knows it."""
        if not isinstance(timestep, Tensor):
            if isinstance(timestep, float) and self._timesteps.dtype == torch.float32:
                return float(np.float32(timestep))
            return timestep
        if timestep.device.type == "cpu":
            return timestep.item()
        listed = self._timesteps
        if timestep.device == listed.device and timestep.dtype == listed.dtype:
            place, rest = divmod(timestep.data_ptr() - listed.data_ptr(), listed.element_size())
            if rest == 0 and 0 <= place < len(self._listed):
                return self._listed[place]
        return None

    def _is_vector(self, timestep: Timestep, sample: Tensor) -> bool:
        """True for a timestep a sample; ValueError where this scheduler takes one for the batch or the shape is off."""
        if not isinstance(timestep, Tensor) or timestep.ndim == 0 or timestep.numel() == 1:
            return False
        if not self.per_sample:
            raise ValueError(
                f"timestep has the shape {list(timestep.shape)}: {type(self).__name__} remembers earlier steps and "
                "takes one timestep for the batch"
            )
        if timestep.shape != sample.shape[:1]:
            raise ValueError(
                f"timestep must be a scalar or [{sample.shape[0]}], one a sample, got {list(timestep.shape)}"
            )
        return True

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands among the timesteps; of a repeated one the second place (as in diffusers).

        Raises:
            IndexError: it is not one of them.
        """
        if schedule_timesteps is None or schedule_timesteps is self._timesteps:
            known, listed = self._known(timestep), self._listed
        else:
            known, listed = None, schedule_timesteps.tolist()
        if known is None:
            known = timestep.item() if isinstance(timestep, Tensor) else timestep
        places = [i for i, t in enumerate(listed) if t == known]
        return places[1 if len(places) > 1 else 0]

    def _locate(self, timestep: Timestep) -> int:
        """The step index of a scalar timestep: its place where it is listed once, else where the walk has come to.

        Unlike the original's counter this lets calls from several threads share a scheduler.
        """
        known = self._known(timestep)
        place = self._place.get(known) if known is not None and len(self._place) == len(self._listed) else None
        if place is None:
            if self._step_index is None:
                self._init_step_index(timestep)
            place = self._step_index
            assert place is not None
        self._step_index = place
        return place

    def _row(self, table: RowTable, timestep: Timestep, sample: Tensor) -> int | Tensor:
        """The row of a timestep in a table with timesteps: its number, or int64 [1] or [B] where a device finds it.

        Raises:
            ValueError: a scalar that is not one of the table's, or a vector of another length than the batch.
        """
        if not self._is_vector(timestep, sample):
            known = self._known(timestep)
            if known is not None:
                row = table.index.get(known)
                if row is None:
                    raise ValueError(f"timestep {known} is not one of the {len(table.index)} that are set")
                return row
        assert isinstance(timestep, Tensor)
        return table.find(timestep.reshape(-1), sample.device)

    def _place_or_find(self, timestep: Timestep, sample: Tensor) -> int | Tensor:
        """The step index of a scalar timestep (`_locate`), or int64 [B] the places of a timestep a sample."""
        if self._is_vector(timestep, sample):
            assert isinstance(timestep, Tensor)
            return self._find(timestep, sample.device)
        return self._locate(timestep)

    def _advance(self, place: int | Tensor) -> None:
        """After a step from a place; timesteps a sample leave the walk's own index alone."""
        if isinstance(place, int):
            self._step_index = place + 1

    def _noise(
        self,
        like: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        timestep: Timestep,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Step noise: as diffusers draws it, or by the noise contract, with the step's position as the draw.

        Raises:
            ValueError: under `use_noise_contract`, a generator, or a timestep that is not listed.
        """
        dtype = like.dtype if dtype is None else dtype
        if self._noise_contract is None:
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
        if generator is not None:
            raise ValueError("generator must be None under use_noise_contract, which draws the noise from its seed")
        seed, sample_indices = self._noise_contract
        noise = normal(
            tuple(like.shape),
            seed=seed,
            sample_indices=sample_indices,
            draw=self._position(timestep, like),
            device=like.device,
            memory_format=torch.contiguous_format if like.is_contiguous() else torch.channels_last,
        )
        return noise.to(dtype)

    def _position(self, timestep: Timestep, like: Tensor) -> int | Tensor:
        if not self._is_vector(timestep, like):
            known = self._known(timestep)
            if known is not None:
                place = self._place.get(known)
                if place is None:
                    raise ValueError(f"timestep {known} is not one of the {len(self._listed)} that are set")
                # of a repeated timestep only the walk itself knows which one it has come to
                return place if len(self._place) == len(self._listed) else self._step_index or 0
        assert isinstance(timestep, Tensor)
        return self._find(timestep.reshape(-1), like.device).clamp(min=0).expand(like.shape[0])

    def _run(
        self,
        table: RowTable,
        row: int | Tensor,
        model_output: Tensor | None,
        sample: Tensor,
        *,
        history: Sequence[Tensor] = (),
        noise: Tensor | None = None,
        thresholding: bool = False,
        remember: bool = False,
        return_x0: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """One row on a batch: `solver_step`, after the reduction that finds the dynamic threshold where it is on."""
        floats, numbers = table.on(sample.device, sample.dtype)
        number = numbers[row] if isinstance(row, int) else row
        threshold = None
        if thresholding:
            assert model_output is not None
            config = self.config
            threshold = dynamic_threshold(
                sample, model_output, floats, number, config.dynamic_thresholding_ratio, config.sample_max_value
            )
        return solver_step(
            sample,
            model_output,
            floats,
            number,
            history=history,
            noise=noise,
            threshold=threshold,
            remember=remember,
            return_x0=return_x0,
            out_dtype=out_dtype,
        )


class MultistepScheduler(FusedScheduler):
    """A façade that remembers one value a step: diffusers' per-instance state, `model_outputs` with the newest last.

    A subclass gives `_rows_for_walk`; every row must remember (a non-zero ux, u0 or um), and the value of a row is what
    the original keeps in `model_outputs`.
    """

    row_sources = ("timesteps", "sigmas")
    per_sample = False
    model_outputs: list[Tensor | None]
    _walk_begin = 0

    def _rows_for_walk(self, begin: int) -> list[Row]:
        """One row for each of `timesteps[begin:]`, of a walk that starts there without history."""
        raise NotImplementedError

    def _walk(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        noise: Tensor | None = None,
        thresholding: bool = False,
        return_x0: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """One step of the walk: `_run` of its next row, and the state moved on."""
        index = self._next(timestep, sample)
        table = self._table(self._walk_begin, lambda: RowTable(self._rows_for_walk(self._walk_begin)))
        row = index - self._walk_begin
        history = [self.model_outputs[source - row] for source in table.reads[row]]
        *results, value = self._run(
            table,
            row,
            model_output,
            sample,
            history=history,  # type: ignore[arg-type]
            noise=noise,
            thresholding=thresholding,
            remember=True,
            return_x0=return_x0,
            out_dtype=out_dtype,
        )
        self.model_outputs = [*self.model_outputs[1:], value]
        self._step_index = index + 1
        return results

    def _next(self, timestep: Timestep, sample: Tensor) -> int:
        """The step index of the step to take; the first one of a walk begins it."""
        self._is_vector(timestep, sample)
        if self._step_index is None:
            self._init_step_index(timestep)
            assert self._step_index is not None
            self._walk_begin = self._step_index
        return self._step_index
