"""diffusers' HeunDiscreteScheduler, one fused pass a stage."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.euler import vp_input_grid
from fastdiff.compat.diffusers.fused import Timestep, result_dtype
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.compat.diffusers.sigma_walk import CountedSigmaWalk
from fastdiff.prediction import FloatArray
from fastdiff.solvers.euler import euler
from fastdiff.solvers.grid import Grid
from fastdiff.table import Row


class FastHeunDiscreteScheduler(CountedSigmaWalk, HeunDiscreteScheduler):
    """`HeunDiscreteScheduler`; its two stages keep state, so it takes one timestep for the batch.

    A second stage starts from the first one's sample, as in the original, and not, as the engine's "heun" may, from the
    state the first stage returned: a pipeline may have changed that in between.
    """

    state_in_first_order: bool
    prev_derivative: Tensor | None
    sample: Tensor | None
    dt: float | None

    prediction_types = ("epsilon", "sample", "v_prediction")

    def _grid(self, sigma: FloatArray, timesteps: Sequence[float]) -> Grid:
        clip_sample = self.config.clip_sample_range if self.config.clip_sample else None
        return vp_input_grid(sigma, timesteps, self.config.prediction_type, clip_sample)

    def _walk_table(self) -> RowTable:
        return self._table(None, lambda: RowTable(self._first_stages()))

    def _first_stages(self) -> list[Row]:
        grid = self._grid(self._levels(), self._listed)
        rows = euler(grid)
        for row, sigma in zip(rows, grid.sigma):
            # remembered is the derivative (x - x0) / sigma
            row.ux, row.u0 = 1 / float(sigma), -1 / float(sigma)
        return rows

    def _second_stages(self) -> list[Row]:
        sigma = self._levels()
        grid = self._grid(sigma, self._listed)
        rows = [Row()]
        for i in range(1, len(grid)):
            half = float(sigma[i] - sigma[i - 1]) / 2
            slope = half / float(sigma[i])
            # values newest first: the derivative of the first stage, then the sample it started from
            rows.append(grid.row(i, cx=slope, c0=-slope, history={-1: half, -2: 1.0}))
        return rows

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector.
        """
        self._is_vector(timestep, sample)
        place = self._locate(timestep)
        out_dtype = result_dtype(sample, model_output)
        if self.state_in_first_order:
            table = self._walk_table()
            prev_sample, pred_original_sample, derivative = self._run(
                table, place, model_output, sample, remember=True, return_x0=True, out_dtype=out_dtype
            )
            self.prev_derivative, self.sample = derivative, sample
            row = table.rows[place]
            # sigma' - sigma, of cx = sigma' / sigma and ux = 1 / sigma
            self.dt = (row.cx - 1) / row.ux
        else:
            table = self._table("second", lambda: RowTable(self._second_stages()))
            assert self.prev_derivative is not None
            assert self.sample is not None
            history = [self.prev_derivative, self.sample]
            prev_sample, pred_original_sample = self._run(
                table, place, model_output, sample, history=history, return_x0=True, out_dtype=out_dtype
            )
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = place + 1
        if not return_dict:
            return prev_sample, pred_original_sample
        return HeunDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
