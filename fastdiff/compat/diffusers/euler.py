"""diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler, one fused pass a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.compat.diffusers.sigma_walk import ChurnedEuler, SigmaWalk
from fastdiff.prediction import FloatArray
from fastdiff.solvers.euler import euler_ancestral
from fastdiff.solvers.grid import Grid
from fastdiff.table import Row


def vp_input_grid(
    sigma: FloatArray, timesteps: Sequence[float], prediction_type: str, clip_sample: float | None = None
) -> Grid:
    """The grid of x / alpha of a variance-preserving process, whose model sees x itself."""
    return Grid.from_points(
        np.ones_like(sigma),
        sigma,
        timesteps,
        prediction_type="sample" if prediction_type == "original_sample" else prediction_type,
        c_in=1 / np.hypot(1, sigma[:-1]),
        clip_sample=clip_sample,
    )


class FastEulerDiscreteScheduler(ChurnedEuler, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` whose `step` also takes a timestep [B], one a sample.

    With s_churn a step that adds noise is two ops; v-prediction then takes x0 at sigma and not sigma_hat, as in the
    original.
    """

    prediction_types = ("epsilon", "sample", "original_sample", "v_prediction")

    def _grid(self, sigma: FloatArray, timesteps: Sequence[float]) -> Grid:
        return vp_input_grid(sigma, timesteps, self.config.prediction_type)

    def _churned_row(self, sigma: float, sigma_hat: float, sigma_next: float, timestep: float) -> Row:
        row = super()._churned_row(sigma, sigma_hat, sigma_next, timestep)
        if self.config.prediction_type == "v_prediction":
            row.px, row.pm = map(float, self._grid(np.array([sigma, sigma_next]), [timestep]).x0_from[0])
        return row

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: an integer as timestep.
        """
        options = (s_churn, s_tmin, s_tmax, s_noise)
        prev_sample, pred_original_sample = self._churn_step(model_output, timestep, sample, options, generator)
        if not return_dict:
            return prev_sample, pred_original_sample
        return EulerDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)


class FastEulerAncestralDiscreteScheduler(SigmaWalk, EulerAncestralDiscreteScheduler):
    """`EulerAncestralDiscreteScheduler` whose `step` also takes a timestep [B], one a sample."""

    prediction_types = ("epsilon", "v_prediction")

    def _grid(self, sigma: FloatArray, timesteps: Sequence[float]) -> Grid:
        return vp_input_grid(sigma, timesteps, self.config.prediction_type)

    def _walk_table(self) -> RowTable:
        return self._table(None, lambda: RowTable(euler_ancestral(self._grid(self._levels(), self._listed))))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: an integer as timestep.
        """
        self._check_step(timestep)
        place = self._place_or_find(timestep, sample)
        prev_sample, pred_original_sample = self._run(
            self._walk_table(),
            place,
            model_output,
            sample,
            noise=self._noise(model_output, generator, timestep),
            return_x0=True,
            out_dtype=model_output.dtype,
        )
        self._advance(place)
        if not return_dict:
            return prev_sample, pred_original_sample
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
