"""diffusers' KDPM2DiscreteScheduler and KDPM2AncestralDiscreteScheduler, one fused pass a stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.euler import vp_input_grid
from fastdiff.compat.diffusers.fused import Timestep, result_dtype
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.compat.diffusers.sigma_walk import CountedSigmaWalk
from fastdiff.prediction import FloatArray
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.line import euler_step
from fastdiff.table import Row


class _Midpoint(CountedSigmaWalk):
    """Stages in turns: from the sample to a level in between, and from that same sample along the slope found there.

    A second stage starts from the first one's sample, as in the original, and not, as the engine's "kdpm2" may, from
    the state the first stage returned: a pipeline may have changed that in between.
    The tables of levels, of which the rows are made, stay on the CPU as `sigmas` does.
    """

    prediction_types = ("epsilon", "v_prediction")
    sample: Tensor | None
    state_in_first_order: bool

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        """The original's."""
        super().set_timesteps(num_inference_steps, device, num_train_timesteps)  # type: ignore[misc]
        for name in self.row_sources[2:]:
            setattr(self, name, getattr(self, name).cpu())

    def _middles(self) -> tuple[FloatArray, FloatArray]:
        """[n] the level that a first stage at each place leads to, and the one that a second stage there is at."""
        raise NotImplementedError

    def _ends(self) -> tuple[FloatArray, FloatArray]:
        """[n] the level that a second stage at each place leads to, and the noise it adds."""
        raise NotImplementedError

    def _host(self, name: str) -> FloatArray:
        """[n] a table of the original in the order of the timesteps."""
        return getattr(self, name)[: len(self._listed)].double().cpu().numpy()

    def _grid(self, sigma: FloatArray, timesteps: Sequence[float]) -> Grid:
        return vp_input_grid(sigma, timesteps, self.config.prediction_type)

    def _walk_table(self) -> RowTable:
        """The rows of the stage to take."""
        if self.state_in_first_order:
            return self._table("first", lambda: RowTable(self._first_stages()))
        return self._table("second", lambda: RowTable(self._second_stages()))

    def _first_stages(self) -> list[Row]:
        middle, _ = self._middles()
        grid = self._grid(np.append(self._host("sigmas"), 0.0), self._listed)
        return [
            grid.row(i, **euler_step((1.0, float(sigma)), (1.0, float(level))))
            for i, (sigma, level) in enumerate(zip(grid.sigma, middle))
        ]

    def _second_stages(self) -> list[Row]:
        _, middle = self._middles()
        end, noise = self._ends()
        length = end[1:] - self._host("sigmas")[:-1]
        grid = self._grid(np.append(middle, 0.0), self._listed)
        rows = [Row()]
        for i in range(1, len(grid)):
            # the slope as the model's output tells it: (x - x0) / sigma loses digits where sigma is small
            from_sample, _, from_output = (float(length[i - 1]) * part for part in grid.epsilon(i))
            rows.append(grid.row(i, cx=from_sample, cm=from_output, cz=float(noise[i]), history={-1: 1.0}))
        return rows

    def _stage(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, noise: Tensor | None = None
    ) -> list[Tensor]:
        """[prev_sample, pred_original_sample]."""
        place, table = self._locate(timestep), self._walk_table()
        history = [] if self.sample is None else [self.sample]
        dtype = result_dtype(sample, model_output)
        results = self._run(
            table, place, model_output, sample, history=history, noise=noise, return_x0=True, out_dtype=dtype
        )
        self.sample = sample if self.sample is None else None
        self._step_index = place + 1
        return results


class FastKDPM2DiscreteScheduler(_Midpoint, KDPM2DiscreteScheduler):
    """`KDPM2DiscreteScheduler`; its two stages keep state, so it takes one timestep for the batch."""

    row_sources = ("timesteps", "sigmas", "sigmas_interpol")
    sigmas_interpol: Tensor

    def _middles(self) -> tuple[FloatArray, FloatArray]:
        middle = self.sigmas_interpol[: len(self._listed) + 1].double().cpu().numpy()
        return middle[1:], middle[:-1]

    def _ends(self) -> tuple[FloatArray, FloatArray]:
        end = self._host("sigmas")
        return end, np.zeros_like(end)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> KDPM2DiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector.
        """
        self._is_vector(timestep, sample)
        prev_sample, pred_original_sample = self._stage(model_output, timestep, sample)
        if not return_dict:
            return prev_sample, pred_original_sample
        return KDPM2DiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)


class FastKDPM2AncestralDiscreteScheduler(_Midpoint, KDPM2AncestralDiscreteScheduler):
    """`KDPM2AncestralDiscreteScheduler`; its two stages keep state, so it takes one timestep for the batch."""

    row_sources = ("timesteps", "sigmas", "sigmas_interpol", "sigmas_down", "sigmas_up")

    def _middles(self) -> tuple[FloatArray, FloatArray]:
        middle = self._host("sigmas_interpol")
        return middle, np.roll(middle, 1)

    def _ends(self) -> tuple[FloatArray, FloatArray]:
        return np.roll(self._host("sigmas_down"), 1), np.roll(self._host("sigmas_up"), 1)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> KDPM2AncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; a second stage draws noise.

        Raises:
            ValueError: timestep is a vector.
        """
        self._is_vector(timestep, sample)
        noise = None
        if not self.state_in_first_order:
            noise = self._noise(model_output, generator, timestep)
        prev_sample, pred_original_sample = self._stage(model_output, timestep, sample, noise)
        if not return_dict:
            return prev_sample, pred_original_sample
        return KDPM2AncestralDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
