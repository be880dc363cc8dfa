"""diffusers' DEISMultistepScheduler, one fused pass a step."""

from __future__ import annotations

from diffusers import DEISMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.exponential import ExponentialScheduler
from fastdiff.compat.diffusers.fused import Timestep, result_dtype
from fastdiff.solvers.deis import deis
from fastdiff.table import Row


class FastDEISMultistepScheduler(ExponentialScheduler, DEISMultistepScheduler):
    """`DEISMultistepScheduler`; it keeps state, so it takes one timestep for the batch.

    Its weights are exact, where the original's, from differences of float32 logarithms, lose digits in many steps.
    """

    def _check_config(self) -> None:
        super()._check_config()
        self._check_order(3)
        if self.config.prediction_type == "flow_prediction":
            self._accept("use_flow_sigmas", (True,))

    def _rows_for_walk(self, begin: int) -> list[Row]:
        return deis(self._grid(begin), order=self.config.solver_order, lower_order_final=self._falls())

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector, or set_timesteps was not called.
        """
        self._check_ready()
        (prev_sample,) = self._walk(
            model_output,
            timestep,
            sample,
            thresholding=self.config.thresholding,
            out_dtype=result_dtype(sample, model_output),
        )
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
