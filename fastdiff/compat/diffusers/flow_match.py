"""diffusers' FlowMatchEulerDiscreteScheduler, one fused pass a step."""

from __future__ import annotations

import itertools
import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.fused import FusedScheduler
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.compat.diffusers.sigma_walk import refuse_index
from fastdiff.table import Row


class FastFlowMatchEulerDiscreteScheduler(FusedScheduler, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` whose `step` also takes a timestep [B], one a sample.

    The sigmas are the original's, which shifts sigma_min twice. `s_churn`, `s_tmin`, `s_tmax` and `s_noise` have no
    effect in the original either.
    """

    row_sources = ("timesteps", "_levels")

    # The original's sigmas lie on the device: a property, so that set_timesteps leaves a copy on the host.
    @property
    def sigmas(self) -> Tensor:
        return self._sigmas

    @sigmas.setter
    def sigmas(self, value: Tensor) -> None:
        self._sigmas = value
        self._levels = value.double().cpu().numpy()

    def _rows(self) -> RowTable:
        sigma, rows = self._levels, []
        for here, there in itertools.pairwise(sigma):
            if self.config.stochastic_sampling:
                # x0 = x - sigma * m, noised anew
                rows.append(Row(cx=1 - there, cm=-(1 - there) * here, cz=there, draws=True))
            else:
                # in the velocity itself: the two parts of x0 and eps would cancel in float32
                rows.append(Row(cx=1.0, cm=there - here))
        return RowTable(rows)

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: an integer as timestep; per_token_timesteps.
        """
        refuse_index(timestep)
        if per_token_timesteps is not None:
            raise ValueError(
                "per_token_timesteps must be None: a fused step has one timestep a sample, "
                "FlowMatchEulerDiscreteScheduler has one a token"
            )
        place = self._place_or_find(timestep, sample)
        noise = None
        if self.config.stochastic_sampling:
            noise = self._noise(sample, generator, timestep, torch.float32)
        table = self._table(None, self._rows)
        (prev_sample,) = self._run(table, place, model_output, sample, noise=noise, out_dtype=model_output.dtype)
        self._advance(place)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)  # type: ignore[arg-type]
