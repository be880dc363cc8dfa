"""diffusers' DDPMScheduler, one fused pass a step."""

from __future__ import annotations

import math

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.forward_noising import ForwardNoising
from fastdiff.compat.diffusers.fused import FusedScheduler, Timestep, result_dtype
from fastdiff.compat.diffusers.process_grid import NO_SIGNAL, process_grid
from fastdiff.compat.diffusers.row_table import RowTable

# diffusers clamps the posterior's variance from below, and so has noise of this variance on a last step with t > 0
MIN_VARIANCE = 1e-20


class FastDDPMScheduler(ForwardNoising, FusedScheduler, DDPMScheduler):
    """`DDPMScheduler` whose `step` also takes a timestep [B], one a sample.

    As in the original, a walk that ends at a timestep above 0 draws noise there too, and an unknown variance_type means
    "fixed_small". "learned" (a variance, not its logarithm, from the model) and "fixed_large_log" (the square root of a
    negative number, NaN in the original) raise ValueError.
    """

    prediction_types = ("epsilon", "sample", "v_prediction")

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.variance_type in ("learned", "fixed_large_log"):
            raise ValueError(
                f"variance_type is {self.config.variance_type!r}, FastDDPMScheduler accepts 'fixed_small', "
                "'fixed_small_log', 'fixed_large' and 'learned_range'"
            )

    def _rows(self) -> RowTable:
        config = self.config
        levels = torch.cat([self.alphas_cumprod.cpu()[[int(t) for t in self._listed]], torch.ones(1)])
        levels[levels == 0] = NO_SIGNAL
        # Of a beta of 1e-4 float32 leaves three digits. The images are the original's with those, not with better ones.
        betas = (1 - levels[:-1] / levels[1:]).tolist()
        grid = process_grid(levels.double().numpy(), self._listed, config)
        variance = (grid.sigma**2).tolist()
        rows = []
        for i, (t, beta) in enumerate(zip(self._listed, betas)):
            # equations 6 and 7 of Ho et al. 2020
            share = variance[i + 1] / variance[i]
            row = grid.row(i, cx=math.sqrt(1 - beta) * share, c0=float(grid.alpha[i + 1]) * beta / variance[i])
            rows.append(row)
            if t <= 0:
                continue
            row.draws = True
            small = max(beta * share, MIN_VARIANCE)
            large = max(beta, small)
            if config.variance_type == "learned_range":
                row.cz, row.lv = (small * large) ** 0.25, math.log(large / small) / 4
            else:
                row.cz = math.sqrt(large if config.variance_type == "fixed_large" else small)
        return RowTable(rows, self._listed)

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """The original's step; timestep may be [B].

        Raises:
            ValueError: a timestep that is not set; a model_output without the channels that variance_type needs.
        """
        learned = self.config.variance_type == "learned_range"
        if (model_output.shape != sample.shape) != learned:
            raise ValueError(
                f"model_output has the shape {list(model_output.shape)} for a sample {list(sample.shape)} and "
                f"variance_type={self.config.variance_type!r}: 'learned_range' needs twice the channels, the others "
                "as many"
            )
        table = self._table(None, self._rows)
        row = self._row(table, timestep, sample)
        noise = None
        if isinstance(row, Tensor) or table.rows[row].draws:
            like = model_output[:, : sample.shape[1]] if learned else model_output
            noise = self._noise(like, generator, timestep)
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
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
