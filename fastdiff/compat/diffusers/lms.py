"""diffusers' LMSDiscreteScheduler, one fused pass a step."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.euler import vp_input_grid
from fastdiff.compat.diffusers.fused import Timestep, result_dtype
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.compat.diffusers.sigma_walk import CountedSigmaWalk
from fastdiff.prediction import FloatArray
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.lms import lms


class FastLMSDiscreteScheduler(CountedSigmaWalk, LMSDiscreteScheduler):
    """`LMSDiscreteScheduler`; it remembers derivatives, so it takes one timestep for the batch.

    The weights of a step are those of a walk from the first sigma on, as in the original: after a late start the terms
    of derivatives that are not there yet are missing. A step's order is 1 to 4.
    """

    prediction_types = ("epsilon", "sample", "v_prediction")
    derivatives: list[Tensor]

    def _grid(self, sigma: FloatArray, timesteps: Sequence[float]) -> Grid:
        return vp_input_grid(sigma, timesteps, self.config.prediction_type)

    def _walk_table(self, order: int = 4) -> RowTable:
        return self._table(order, lambda: RowTable(lms(self._grid(self._levels(), self._listed), order=order)))

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> LMSDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector; order is not 1 to 4.
        """
        self._is_vector(timestep, sample)
        self._check_scaled()
        place = self._locate(timestep)
        table = self._walk_table(order)
        # newest first; those that a late start lacks come last
        ages = [place - source for source in table.reads[place]]
        prev_sample, pred_original_sample, derivative = self._run(
            table,
            place,
            model_output,
            sample,
            history=[self.derivatives[-age] for age in ages if age <= len(self.derivatives)],
            remember=True,
            return_x0=True,
            out_dtype=result_dtype(sample, model_output),
        )
        self.derivatives.append(derivative)
        if len(self.derivatives) > order:
            self.derivatives.pop(0)
        self._step_index = place + 1
        if not return_dict:
            return prev_sample, pred_original_sample
        return LMSDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
