"""diffusers' UniPCMultistepScheduler, one fused pass a step."""

from __future__ import annotations

from diffusers import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.exponential import ExponentialScheduler
from fastdiff.compat.diffusers.fused import Timestep
from fastdiff.solvers.unipc import unipc
from fastdiff.table import Row


class FastUniPCMultistepScheduler(ExponentialScheduler, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler`; it keeps state, so it takes one timestep for the batch.

    Prediction and correction are one pass: the corrected sample is the last one returned plus a combination of
    remembered values. As in the original, a sample that a pipeline changed in between (not in place) is what the model
    output belongs to, and the corrector takes no other notice of it. solver_p must be None. Steps to sigma = 0 give x0
    in every form, where the original has NaN for "bh1" and for predict_x0=False.
    """

    disable_corrector: list[int]
    predict_x0: bool
    _returned: Tensor | None = None

    def _check_config(self) -> None:
        super()._check_config()
        self._check_order(4)
        self._accept("solver_p", (None,))
        if not self.config.predict_x0:
            self._check_noise_form("predict_x0")

    def _rows_for_walk(self, begin: int) -> list[Row]:
        grid = self._grid(begin)
        skipped = [index - begin for index in self.disable_corrector]
        rows = unipc(
            grid,
            order=self.config.solver_order,
            solver_type=self.config.solver_type,
            predict_x0=self.predict_x0,
            lower_order_final=self.config.lower_order_final,
            disable_corrector=skipped,
        )
        shrink = grid.sigma if self.predict_x0 else grid.alpha
        for i, row in enumerate(rows):
            if i > 0 and i - 1 not in skipped:
                decay = float(shrink[i + 1] / shrink[i])
                row.cx -= decay
                row.history[self._oldest(i)] = decay
        return rows

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector, or set_timesteps was not called.
        """
        self._check_ready()
        prev_sample = self._walk_from(
            self._returned,
            model_output,
            timestep,
            sample,
            thresholding=self.config.thresholding and self.predict_x0,
            out_dtype=sample.dtype,
        )
        self._returned = prev_sample
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
