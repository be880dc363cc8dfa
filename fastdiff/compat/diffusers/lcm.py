"""diffusers' LCMScheduler, one fused pass a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import LCMScheduler
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.forward_noising import ForwardNoising
from fastdiff.compat.diffusers.fused import FusedScheduler, Timestep, result_dtype
from fastdiff.compat.diffusers.process_grid import process_grid
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.solvers.consistency import lcm


class FastLCMScheduler(ForwardNoising, FusedScheduler, LCMScheduler):
    """`LCMScheduler` whose `step` also takes a timestep [B], one a sample."""

    get_scalings_for_boundary_condition_discrete: Callable[[float], tuple[float, float]]
    prediction_types = ("epsilon", "sample", "v_prediction")

    def _rows(self) -> RowTable:
        # the last row keeps the denoised sample
        bar = np.append(self.alphas_cumprod.double().cpu().numpy()[self._listed], 1.0)
        grid = process_grid(bar, self._listed, self.config)
        rows = lcm(grid, timestep_scaling=self.config.timestep_scaling)
        for row in rows:
            # what is remembered is the consistency function itself, an output of the step
            row.ux, row.u0 = self.get_scalings_for_boundary_condition_discrete(row.t)
        return RowTable(rows, self._listed)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: set_timesteps was not called.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: run set_timesteps before step")
        place = self._place_or_find(timestep, sample)
        noise = None
        dtype = result_dtype(sample, model_output)
        if isinstance(place, Tensor) or place != self.num_inference_steps - 1:
            noise = self._noise(model_output, generator, timestep, dtype)
        prev_sample, denoised = self._run(
            self._table(None, self._rows),
            place,
            model_output,
            sample,
            noise=noise,
            thresholding=self.config.thresholding,
            remember=True,
            out_dtype=dtype,
        )
        self._advance(place)
        if not return_dict:
            return prev_sample, denoised
        return LCMSchedulerOutput(prev_sample=prev_sample, denoised=denoised)
