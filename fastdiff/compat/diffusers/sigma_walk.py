"""What the façades in k-diffusion's coordinates share: x = x0 + sigma * eps, scaled to become the model's input."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastdiff.compat.diffusers.forward_noising import WideNoising
from fastdiff.compat.diffusers.fused import FusedScheduler, Timestep
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.prediction import FloatArray
from fastdiff.solvers.euler import euler
from fastdiff.solvers.grid import Grid
from fastdiff.table import Row

logger = logging.getLogger(__name__)


def refuse_index(timestep: Timestep) -> None:
    """ValueError for a whole number as timestep: a place in the list of timesteps, which are floats here."""
    if isinstance(timestep, (int, np.integer)) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
        raise ValueError(
            f"timestep must be one of the scheduler's timesteps, which are floats, got {timestep!r}: an index, such as "
            "enumerate gives, does not name one"
        )


class SigmaWalk(WideNoising, FusedScheduler):
    """A walk along `sigmas` [n + 1] at float `timesteps` [n]."""

    row_sources: tuple[str, ...] = ("timesteps", "sigmas")
    sigmas: Tensor
    is_scale_input_called: bool

    def _grid(self, sigma: FloatArray, timesteps: Sequence[float]) -> Grid:
        """The grid over any sigma [m + 1] and timesteps [m]."""
        raise NotImplementedError

    def _walk_table(self) -> RowTable:
        """The rows of `step` without options, one a timestep."""
        raise NotImplementedError

    def _levels(self) -> FloatArray:
        return self.sigmas.double().cpu().numpy()

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """sample * c_in, the model's input; timestep may be [B] where `step` takes one a sample."""
        place = self._place_or_find(timestep, sample)
        table = self._walk_table()
        self.is_scale_input_called = True
        if isinstance(place, Tensor):
            scale = table.c_in_on(sample.device)[place].view(-1, *[1] * (sample.ndim - 1))
            return (sample * scale).to(sample.dtype)
        return sample * table.c_in[place]

    def _check_step(self, timestep: Timestep) -> None:
        refuse_index(timestep)
        self._check_scaled()

    def _check_scaled(self) -> None:
        if not self.is_scale_input_called:
            logger.warning("scale_model_input was not called before step: was the model given a sample in its scale?")


class CountedSigmaWalk(SigmaWalk):
    """A walk that keeps state, and so goes from place to place: the timestep of its first step says where it begins."""

    per_sample = False

    def _locate(self, timestep: Timestep) -> int:
        if self._step_index is None:
            self._init_step_index(timestep)
            assert self._step_index is not None
        return self._step_index


class ChurnedEuler(SigmaWalk):
    """Euler's method with the churn of Karras et al. 2022, algorithm 2, as diffusers has it: the model has seen the
    sample before the noise is added."""

    def _walk_table(self) -> RowTable:
        return self._table(None, lambda: RowTable(euler(self._grid(self._levels(), self._listed))))

    def _churn_tables(self, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> tuple[RowTable, RowTable]:
        """Rows that raise the noise from sigma to sigma_hat, and rows from there to the next sigma."""
        sigma = self._levels()
        start, end = sigma[:-1], sigma[1:]
        gamma = min(s_churn / len(start), math.sqrt(2) - 1)
        hat = start * (1 + gamma * ((s_tmin <= start) & (start <= s_tmax)))
        raised = [
            Row(cx=1.0, cz=s_noise * math.sqrt(high**2 - low**2), draws=bool(high > low), ev=False)
            for low, high in zip(start, hat)
        ]
        rows = [self._churned_row(*at) for at in zip(start, hat, end, self._listed)]
        return RowTable(raised), RowTable(rows)

    def _churned_row(self, sigma: float, sigma_hat: float, sigma_next: float, timestep: float) -> Row:
        return euler(self._grid(np.array([sigma_hat, sigma_next]), [timestep]))[0]

    def _churn_step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        options: tuple[float, float, float, float],
        generator: torch.Generator | list[torch.Generator] | None,
        denoised: Tensor | None = None,
    ) -> list[Tensor]:
        """[prev_sample, pred_original_sample]: one op, and one more, with the noise, where a step churns.

        Args:
            options: s_churn, s_tmin, s_tmax, s_noise.
            denoised: x0 where the caller has it already, in place of what the model's output says.
        """
        self._check_step(timestep)
        place = self._place_or_find(timestep, sample)
        table = self._walk_table()
        if options[0] > 0:
            raised, table = self._tables_for(options)
            if isinstance(place, Tensor) or raised.rows[place].draws:
                noise = self._noise(model_output, generator, timestep)
                wide = torch.promote_types(sample.dtype, torch.float32)
                (sample,) = self._run(raised, place, None, sample, noise=noise, out_dtype=wide)
        out_dtype = model_output.dtype
        if denoised is not None:
            rows, model_output = table.rows, denoised
            key = ("denoised", options if options[0] > 0 else None)
            table = self._table(key, lambda: RowTable([replace(row, px=0.0, pm=1.0) for row in rows]))
        results = self._run(table, place, model_output, sample, return_x0=True, out_dtype=out_dtype)
        self._advance(place)
        return results

    def _tables_for(self, options: tuple[float, float, float, float]) -> tuple[RowTable, RowTable]:
        build: Callable[[], tuple[RowTable, RowTable]] = functools.cache(lambda: self._churn_tables(*options))
        raised = self._table(("raise", *options), lambda: build()[0])
        return raised, self._table(options, lambda: build()[1])
