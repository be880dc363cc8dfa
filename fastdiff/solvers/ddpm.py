"""Ancestral sampling of denoising diffusion probabilistic models."""

import math

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


@register("ddpm")
def ddpm(grid: Grid, *, variance: str = "fixed_small") -> list[Row]:
    """Ho et al. 2020, algorithm 2, between any two points of a grid.

    Args:
        variance: of each step but the last, which has none. "fixed_small": the posterior's, "fixed_large": beta (for
            other than variance-preserving schedules see `Grid.posterior`), "learned_range": between the logarithms of
            the two, by the model's second half of channels v in [-1, 1] (Nichol and Dhariwal 2021, equation 15).
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}, accepted are {', '.join(VARIANCES)}")
    rows = []
    for i in range(len(grid)):
        cx, c0, small, large = grid.posterior(i)
        std, log_range = math.sqrt(large if variance == "fixed_large" else small), 0.0
        if i == len(grid) - 1:
            std = 0.0
        elif variance == "learned_range":
            std, log_range = (small * large) ** 0.25, math.log(large / small) / 4
        # A classifier's gradient shifts the mean by variance * gradient (Dhariwal and Nichol 2021, algorithm 1).
        rows.append(grid.row(i, cx=cx, c0=c0, cz=std, lv=log_range, draws=std > 0, mg=0.0, vg=std**2))
    return rows
