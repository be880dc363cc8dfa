"""diffusers' multistep DPM-Solvers, DPMSolverMultistepScheduler and EDMDPMSolverMultistepScheduler, one fused pass a
step."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.edm import edm_grid
from fastdiff.compat.diffusers.exponential import ExponentialScheduler
from fastdiff.compat.diffusers.fused import Timestep, result_dtype
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.solvers import dpm
from fastdiff.solvers.grid import Grid
from fastdiff.table import Row

SOLVERS = {
    "dpmsolver++": dpm.dpmpp,
    "dpmsolver": dpm.dpm,
    "sde-dpmsolver++": dpm.dpmpp_sde,
    "sde-dpmsolver": dpm.dpm_sde,
}


class _Multistep(ExponentialScheduler):
    # algorithms whose third order the original has, with its own weight of the second difference
    third_orders: tuple[str, ...]

    def _rows_for_walk(self, begin: int) -> list[Row]:
        config = self.config
        return SOLVERS[config.algorithm_type](
            self._grid(begin),
            order=config.solver_order,
            solver_type=config.solver_type,
            lower_order_final=self._falls(),
            euler_at_final=config.euler_at_final,
            third_order="diffusers" if config.algorithm_type in self.third_orders else "exact",
        )

    def _multistep(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: Tensor | None,
        noise_dtype: torch.dtype,
        return_dict: bool,
    ) -> SchedulerOutput | tuple[Tensor]:
        self._check_ready()
        self._next(timestep, sample)
        noise = None
        if self.config.algorithm_type.startswith("sde-"):
            if variance_noise is None:
                noise = self._noise(sample, generator, timestep, noise_dtype)
            else:
                noise = variance_noise.to(sample.device)
        (prev_sample,) = self._walk(
            model_output,
            timestep,
            sample,
            noise=noise,
            thresholding=self.config.thresholding,
            out_dtype=result_dtype(sample, model_output),
        )
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)


class FastDPMSolverMultistepScheduler(_Multistep, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler`; it keeps state, so it takes one timestep for the batch.

    Third order has the original's weight of the second difference, with which it is of second order. "sde-dpmsolver" of
    third order, which the original does not have, is exact.
    """

    third_orders = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")

    def _check_config(self) -> None:
        super()._check_config()
        self._check_order(3)
        if self.config.algorithm_type in ("dpmsolver", "sde-dpmsolver"):
            self._check_noise_form("algorithm_type")

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector, or set_timesteps was not called.
        """
        return self._multistep(model_output, timestep, sample, generator, variance_noise, torch.float32, return_dict)


class FastEDMDPMSolverMultistepScheduler(_Multistep, EDMDPMSolverMultistepScheduler):
    """`EDMDPMSolverMultistepScheduler`; it keeps state, so it takes one timestep for the batch.

    "sde-dpmsolver++" of third order, which the original does not have, is exact.
    """

    prediction_types = ("epsilon", "v_prediction")
    third_orders = ("dpmsolver++",)

    def _check_config(self) -> None:
        super()._check_config()
        self._check_order(3)

    def _grid(self, begin: int) -> Grid:
        return edm_grid(self._levels(begin), self._listed[begin:], self.config)

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """sample * c_in of the step to take."""
        index = self._next(timestep, sample)
        begin = self._walk_begin
        table = self._table(begin, lambda: RowTable(self._rows_for_walk(begin)))
        self.is_scale_input_called = True
        return sample * table.c_in[index - begin]

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The original's step.

        Raises:
            ValueError: timestep is a vector, or set_timesteps was not called.
        """
        dtype = result_dtype(sample, model_output)
        return self._multistep(model_output, timestep, sample, generator, None, dtype, return_dict)
