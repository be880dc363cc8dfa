"""diffusers' DPMSolverSinglestepScheduler, one fused pass a step."""

from __future__ import annotations

import torch
from diffusers import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.exponential import ExponentialScheduler
from fastdiff.compat.diffusers.fused import Timestep, result_dtype
from fastdiff.solvers.dpm_single import singlestep
from fastdiff.table import Row


class FastDPMSolverSinglestepScheduler(ExponentialScheduler, DPMSolverSinglestepScheduler):
    """`DPMSolverSinglestepScheduler`; it keeps state, so it takes one timestep for the batch.

    The steps of a group start from its first sample, kept in `sample` as in the original, and not, as the engine's
    "dpmpp_single" may, from what the step before returned: a pipeline may have changed that in between.
    """

    sample: Tensor | None
    order_list: list[int]

    def _check_config(self) -> None:
        super()._check_config()
        self._check_order(3)
        if self.config.algorithm_type == "dpmsolver":
            self._check_noise_form("algorithm_type")

    def _order_at(self, index: int) -> int:
        """A walk that starts within a group makes a shorter one of what is left."""
        return min(self.order_list[index], index - self._walk_begin + 1)

    def _rows_for_walk(self, begin: int) -> list[Row]:
        algorithm = self.config.algorithm_type
        rows = singlestep(
            self._grid(begin),
            form="noise" if algorithm == "dpmsolver" else "data",
            orders=[self._order_at(index) for index in range(begin, len(self._listed))],
            solver_type=self.config.solver_type,
            eta=1.0 if algorithm.startswith("sde-") else 0.0,
            third_order="diffusers",
            save_start=True,
        )
        walk: list[Row] = []
        places: dict[int, int | None] = {}  # of a row among those that evaluate the model; the others save a sample
        for k, row in enumerate(rows):
            places[k] = len(walk) if row.ev else None
            if row.ev:
                oldest = self._oldest(len(walk))
                named = {places[source]: h for source, h in row.history.items()}
                row.history = {oldest if place is None else place: h for place, h in named.items()}
                walk.append(row)
        return walk

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector, or set_timesteps was not called.
        """
        self._check_ready()
        index = self._next(timestep, sample)
        dtype = result_dtype(sample, model_output)
        noise = None
        if self.config.algorithm_type.startswith("sde-"):
            noise = self._noise(sample, generator, timestep, dtype)
        if self._order_at(index) == 1:
            self.sample = sample
        prev_sample = self._walk_from(
            self.sample,
            model_output,
            timestep,
            sample,
            noise=noise,
            thresholding=self.config.thresholding,
            out_dtype=dtype,
        )
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
