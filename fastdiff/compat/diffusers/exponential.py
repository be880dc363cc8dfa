"""What the façades of diffusers' exponential integrators share: the grid over their sigmas, and the quirks of both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastdiff.compat.diffusers.forward_noising import WideNoising
from fastdiff.compat.diffusers.fused import MultistepScheduler, Timestep
from fastdiff.prediction import FloatArray
from fastdiff.solvers.dpm import FEW_STEPS
from fastdiff.solvers.grid import Grid


class ExponentialScheduler(WideNoising, MultistepScheduler):
    """A walk along `sigmas` [n + 1] in the state's own coordinates: alpha² + sigma² = 1, or alpha = 1 - sigma for flow.

    The attributes of the original that only its own step reads (`last_sample`, `timestep_list`, `this_order`) stay as
    `set_timesteps` leaves them.
    """

    prediction_types: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction")

    num_inference_steps: int | None
    sigmas: Tensor

    def _levels(self, begin: int) -> FloatArray:
        return self.sigmas[begin:].double().cpu().numpy()

    def _grid(self, begin: int) -> Grid:
        """The points from the step index `begin` on, with what the original takes for x0 at each of them."""
        level = self._levels(begin)
        alpha = 1 - level if self.config.use_flow_sigmas else 1 / np.hypot(1, level)
        sigma = level if self.config.use_flow_sigmas else level * alpha
        grid = Grid.from_points(alpha, sigma, self._listed[begin:], prediction_type="sample")
        at, sd, one = alpha[:-1], sigma[:-1], np.ones(len(grid))
        # x0 = px * x + pm * m. Off their own paths diffusers scales v and flow predictions by neither norm nor alpha.
        px, pm = {
            "epsilon": (1 / at, -sd / at),
            "sample": (0 * one, one),
            "v_prediction": (at, -sd),
            "flow_prediction": (one, -level[:-1]),
        }[self.config.prediction_type]
        return replace(grid, x0_from=np.stack([px, pm], axis=1))

    def _falls(self) -> bool:
        """The last steps fall in order: decided by the whole walk, wherever it starts."""
        return bool(self.config.lower_order_final) and len(self._listed) < FEW_STEPS

    def _check_order(self, highest: int) -> None:
        self._accept("solver_order", range(1, highest + 1))

    def _check_noise_form(self, option: str) -> None:
        """ValueError for predictions that the original's noise form does not know; option: what asks for that form."""
        kind = self.config.prediction_type
        if kind == "flow_prediction" or (kind == "v_prediction" and self.config.use_flow_sigmas):
            raise ValueError(
                f"prediction_type is {kind!r}, which {type(self).__name__} cannot walk with "
                f"{option}={getattr(self.config, option)!r}, a form for predictions of the noise"
            )

    def _walk_from(
        self,
        kept: Tensor | None,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        noise: Tensor | None = None,
        thresholding: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A step of rows that read one more tensor: `kept`, a value older than any in `model_outputs` (`_oldest`)."""
        remembered = len(self.model_outputs)
        self.model_outputs = [kept, *self.model_outputs]
        try:
            (prev_sample,) = self._walk(
                model_output, timestep, sample, noise=noise, thresholding=thresholding, out_dtype=out_dtype
            )
        finally:
            self.model_outputs = self.model_outputs[-remembered:]
        return prev_sample

    def _oldest(self, row: int) -> int:
        """What a row's history calls the tensor that `_walk_from` adds."""
        return row - self.config.solver_order - 1

    def _check_ready(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands among the timesteps; one that is not among them is taken for the last (diffusers)."""
        try:
            return super().index_for_timestep(timestep, schedule_timesteps)
        except IndexError:
            return len(self._listed) - 1
