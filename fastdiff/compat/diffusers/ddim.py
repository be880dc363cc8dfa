"""diffusers' DDIMScheduler and DDIMInverseScheduler, one fused pass a step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.schedulers import scheduling_ddim, scheduling_ddim_inverse
from torch import Tensor

from fastdiff.compat.diffusers.forward_noising import ForwardNoising
from fastdiff.compat.diffusers.fused import FusedScheduler, Timestep, result_dtype
from fastdiff.compat.diffusers.process_grid import process_grid
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.prediction import FloatArray
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.grid import Grid
from fastdiff.table import Row

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def _noiseless(grid: Grid) -> list[Row]:
    """`ddim` without noise of its own, whose split divides by the sigma of the start: 0 on data."""
    rows = []
    for i in range(len(grid)):
        ux, u0, um = grid.epsilon(i)
        alpha, sigma = float(grid.alpha[i + 1]), float(grid.sigma[i + 1])
        rows.append(grid.row(i, cx=sigma * ux, c0=alpha + sigma * u0, cm=sigma * um))
    return rows


class StrideScheduler(FusedScheduler):
    """A walk whose step from any timestep is num_train_timesteps // num_inference_steps long.

    That is not always the distance to the next timestep of the list, and a step may start from one that is not listed:
    then rows are made for all timesteps.
    """

    alphas_cumprod: Tensor

    @property
    def _stride(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: run set_timesteps before step")
        return self.config.num_train_timesteps // self.num_inference_steps

    def _levels(self, timesteps: Sequence[int], beyond: Tensor) -> FloatArray:
        """alphas_cumprod at timesteps, those below 0 taking the value beyond the data's end."""
        alphas_cumprod = self.alphas_cumprod.double().cpu().numpy()
        return np.array([alphas_cumprod[t] if t >= 0 else float(beyond) for t in timesteps])

    def _rows(self, timesteps: Sequence[int], *options: Any) -> list[Row]:
        """The rows of steps that start at these timesteps."""
        raise NotImplementedError

    def _stride_row(self, timestep: Timestep, sample: Tensor, *options: Any) -> tuple[RowTable, int | Tensor]:
        """The table for these options of `step`, and the row of a timestep in it."""
        if not self._is_vector(timestep, sample):
            known = self._known(timestep)
            if known is not None and known in self._place:
                table = self._table(options, lambda: RowTable(self._rows(self._listed, *options), self._listed))
                return table, table.index[known]
        table = self._table((*options, "all"), lambda: self._all_rows(*options))
        return table, self._row(table, timestep, sample)

    def _all_rows(self, *options: Any) -> RowTable:
        # neighbours in this order follow on one another, so that they share a grid
        timesteps = sorted(range(self.config.num_train_timesteps), key=lambda t: (t % self._stride, -t))
        return RowTable(self._rows(timesteps, *options), timesteps)

    def _walk(
        self, solver: Callable[[Grid], list[Row]], start: FloatArray, end: FloatArray, timesteps: Sequence[int]
    ) -> list[Row]:
        """Rows from alphas_cumprod start[i] to end[i]: one grid for each run of steps that follow on one another."""
        cuts = [0, *(i for i in range(1, len(start)) if end[i - 1] != start[i]), len(start)]
        rows: list[Row] = []
        for first, last in itertools.pairwise(cuts):
            bar = np.append(start[first:last], end[last - 1])
            rows += solver(process_grid(bar, timesteps[first:last], self.config))
        return rows


class FastDDIMScheduler(ForwardNoising, StrideScheduler, DDIMScheduler):
    """`DDIMScheduler` whose `step` also takes a timestep [B], one a sample.

    As in the original a step goes to t - num_train_timesteps // num_inference_steps, and below 0 to alpha = 1
    (set_alpha_to_one) or to that of timestep 0.
    """

    row_sources = ("timesteps", "alphas_cumprod", "final_alpha_cumprod")
    final_alpha_cumprod: Tensor

    prediction_types = PREDICTION_TYPES

    def _rows(self, timesteps: Sequence[int], *options: Any) -> list[Row]:
        eta, clipped = options
        alphas_cumprod = self.alphas_cumprod.double().cpu().numpy()
        # a listed timestep of -1 (trailing spacing rounds to it at some step counts) means the noisiest one, as there
        start = alphas_cumprod[list(timesteps)]
        end = self._levels([t - self._stride for t in timesteps], self.final_alpha_cumprod)
        solver = functools.partial(ddim, eta=eta, use_clipped_model_output=clipped)
        return self._walk(solver, start, end, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> scheduling_ddim.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: set_timesteps was not called; eta is not in [0, 1]; generator and variance_noise together.
        """
        table, row = self._stride_row(timestep, sample, float(eta), bool(use_clipped_model_output))
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("generator must be None where variance_noise is given, got both")
            noise = variance_noise if variance_noise is not None else self._noise(model_output, generator, timestep)
        prev_sample, pred_original_sample = self._run(
            table,
            row,
            model_output,
            sample,
            noise=noise,
            thresholding=self.config.thresholding,
            return_x0=True,
            out_dtype=result_dtype(sample, model_output),
        )
        if not return_dict:
            return prev_sample, pred_original_sample
        return scheduling_ddim.DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)


class FastDDIMInverseScheduler(StrideScheduler, DDIMInverseScheduler):
    """`DDIMInverseScheduler` whose `step` also takes a timestep [B], one a sample.

    As in the original the step named t starts at t - num_train_timesteps // num_inference_steps and ends at t.
    """

    row_sources = ("timesteps", "alphas_cumprod", "initial_alpha_cumprod")
    initial_alpha_cumprod: Tensor

    prediction_types = PREDICTION_TYPES

    def _rows(self, timesteps: Sequence[int], *options: Any) -> list[Row]:
        last = self.config.num_train_timesteps - 1
        start = self._levels([min(t - self._stride, last) for t in timesteps], self.initial_alpha_cumprod)
        return self._walk(_noiseless, start, self.alphas_cumprod.double().cpu().numpy()[list(timesteps)], timesteps)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> scheduling_ddim_inverse.DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: set_timesteps was not called; prediction_type="sample" from a start without noise.
        """
        table, row = self._stride_row(timestep, sample)
        prev_sample, pred_original_sample = self._run(
            table, row, model_output, sample, return_x0=True, out_dtype=result_dtype(sample, model_output)
        )
        if not return_dict:
            return prev_sample, pred_original_sample
        return scheduling_ddim_inverse.DDIMSchedulerOutput(
            prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )
