"""The loop of all sampling functions: steps are packed and copied to the device once, then run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from fastdiff.compat.k_diffusion.noise import NoiseSampler
from fastdiff.compat.k_diffusion.steps import Interval, Step
from fastdiff.compat.packed_rows import pack_rows
from fastdiff.kernels.solver_step import COLUMN, solver_step

Callback = Callable[[dict[str, Any]], Any]


def _ask(noise_sampler: NoiseSampler, levels: Interval, like: Tensor) -> Tensor:
    """Noise between two levels, which the sampler gets as scalars on the CPU: it may look at them without waiting."""
    sigma, sigma_next = (torch.tensor(level, dtype=like.dtype) for level in levels)
    return noise_sampler(sigma, sigma_next)


@torch.no_grad()
def walk(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    steps: Sequence[Step],
    noise_sampler: NoiseSampler,
    extra_args: dict[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
) -> Tensor:
    """x after the steps; a step's callback follows its first evaluation."""
    rows = [stage.row for step in steps for stage in step if stage.row is not None]
    packed, reads = pack_rows(rows)
    last_read = {source: i for i, sources in enumerate(reads) for source in sources}
    floats = torch.tensor(packed, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    number = torch.arange(len(rows), device=x.device).split(1)
    levels = floats[:, COLUMN["t"]].to(x.dtype)
    told = levels[:, None].expand(-1, x.shape[0]).contiguous()
    values: dict[int, Tensor] = {}
    row = 0
    for i in trange(len(steps), disable=disable):
        reported = callback is None
        for stage in steps[i]:
            if stage.row is None:
                if stage.noise is not None:
                    _ask(noise_sampler, stage.noise, sigmas)
                continue
            denoised = model(x, told[row], **(extra_args or {})) if stage.row.ev else None
            if denoised is not None and callback is not None and not reported:
                report = {"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": levels[row], "denoised": denoised}
                callback(report)
                reported = True
            noise = None if stage.noise is None else _ask(noise_sampler, stage.noise, sigmas)
            x, *remembered = solver_step(
                x,
                denoised,
                floats,
                number[row],
                history=[values[source] for source in reads[row]],
                noise=noise if stage.row.cz else None,
                remember=row in last_read,
            )
            if remembered:
                values[row] = remembered[0]
            for source in reads[row]:
                if last_read[source] == row:
                    del values[source]
            row += 1
    return x
