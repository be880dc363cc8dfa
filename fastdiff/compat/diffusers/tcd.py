"""diffusers' TCDScheduler, one fused pass a step."""

from __future__ import annotations

import torch
from diffusers import TCDScheduler
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.forward_noising import ForwardNoising
from fastdiff.compat.diffusers.fused import FusedScheduler, Timestep, result_dtype
from fastdiff.compat.diffusers.process_grid import process_points
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.solvers.consistency import tcd
from fastdiff.solvers.grid import Grid


class FastTCDScheduler(ForwardNoising, FusedScheduler, TCDScheduler):
    """`TCDScheduler` whose `step` also takes a timestep [B], one a sample.

    As in the original the last step leads to timestep 0 and not to the data, and clip_sample, thresholding and
    set_alpha_to_one change nothing.
    """

    prediction_types = ("epsilon", "sample", "v_prediction")

    def _rows(self, eta: float) -> RowTable:
        alphas, sigmas = process_points(self.alphas_cumprod.double().cpu().numpy())
        following = torch.tensor([*self._listed[1:], 0])
        # in float32, as in the original: the product is rounded before it is cut
        through = torch.floor((1 - eta) * following).long().numpy()
        points = [*self._listed, 0]
        grid = Grid.from_points(
            alphas[points], sigmas[points], self._listed, prediction_type=self.config.prediction_type
        )
        rows = tcd(grid, eta=eta, through=list(zip(alphas[through].tolist(), sigmas[through].tolist())))
        for row, part in zip(rows, alphas[points[1:]] / alphas[through]):
            # what is remembered is the state before it is noised, an output of the step
            row.ux, row.u0, row.um = row.cx / part, row.c0 / part, row.cm / part
        return RowTable(rows, self._listed)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: set_timesteps was not called; eta is not in [0, 1].
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: run set_timesteps before step")
        place = self._place_or_find(timestep, sample)
        dtype = result_dtype(sample, model_output)
        noise = None
        if eta > 0 and (isinstance(place, Tensor) or place != self.num_inference_steps - 1):
            noise = self._noise(model_output, generator, timestep, dtype)
        prev_sample, pred_noised_sample = self._run(
            self._table(eta, lambda: self._rows(eta)),
            place,
            model_output,
            sample,
            noise=noise,
            remember=True,
            out_dtype=dtype,
        )
        self._advance(place)
        if not return_dict:
            return prev_sample, pred_noised_sample
        return TCDSchedulerOutput(prev_sample=prev_sample, pred_noised_sample=pred_noised_sample)
