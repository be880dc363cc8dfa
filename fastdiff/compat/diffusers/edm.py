"""diffusers' EDMEulerScheduler, one fused pass a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import EDMEulerScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.sigma_walk import ChurnedEuler
from fastdiff.prediction import FloatArray
from fastdiff.solvers.grid import Grid


def edm_grid(sigma: FloatArray, timesteps: Sequence[float], config: Any) -> Grid:
    """The grid over sigma [n + 1] at timesteps [n] of a model with EDM's preconditioning, by its configuration."""
    grid = Grid.from_points(np.ones_like(sigma), sigma, timesteps, prediction_type="edm", sigma_data=config.sigma_data)
    if config.prediction_type == "epsilon":
        return grid
    # diffusers' EDM v-prediction is the same preconditioning with the sign of c_out turned
    return dataclasses.replace(grid, x0_from=grid.x0_from * np.array([1.0, -1.0]))


class FastEDMEulerScheduler(ChurnedEuler, EDMEulerScheduler):
    """`EDMEulerScheduler` whose `step` also takes a timestep [B], one a sample. With s_churn a step that adds noise is
    two ops."""

    prediction_types = ("epsilon", "v_prediction")

    def _grid(self, sigma: FloatArray, timesteps: Sequence[float]) -> Grid:
        return edm_grid(sigma, timesteps, self.config)

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
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: an integer as timestep.
        """
        options = (s_churn, s_tmin, s_tmax, s_noise)
        results = self._churn_step(model_output, timestep, sample, options, generator, pred_original_sample)
        prev_sample, denoised = results[0], results[1] if pred_original_sample is None else pred_original_sample
        if not return_dict:
            return prev_sample, denoised
        return EDMEulerSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)
