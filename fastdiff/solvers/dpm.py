"""DPM-Solver++, multistep."""

import math

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row

SOLVER_TYPES = ("midpoint", "heun")


@register("dpmpp_2m", extra_point=True)
def dpmpp_2m(grid: Grid, *, solver_type: str = "midpoint") -> list[Row]:
    """DPM-Solver++(2M) on the probability-flow ODE (Lu et al. 2022b, algorithm 2).

    The first and the last row are of order 1: the start has no history, and sigma = 0 at the end makes h infinite.

    Args:
        solver_type: "midpoint" (the paper's 2M) or "heun" (the exact integral of the linear interpolant).
    """
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type is {solver_type!r}, accepted are {', '.join(SOLVER_TYPES)}")
    log_snr, rows = grid.log_snr, []
    for i in range(len(grid)):
        alpha_next, ratio = float(grid.alpha[i + 1]), float(grid.sigma[i + 1] / grid.sigma[i])
        # alpha_next * (1 - exp(-h)), in the form that survives alpha = 0 and sigma_next = 0
        x0_weight = alpha_next - float(grid.alpha[i]) * ratio
        slope_weight = 0.0
        # From alpha = 0 the last step was infinitely long in log-SNR: its slope is zero.
        if 0 < i < len(grid) - 1 and math.isfinite(log_snr[i - 1]):
            h, h_last = float(log_snr[i + 1] - log_snr[i]), float(log_snr[i] - log_snr[i - 1])
            slope = x0_weight / 2 if solver_type == "midpoint" else alpha_next * (math.expm1(-h) / h + 1)
            slope_weight = slope * h / h_last
        history = {i - 1: -slope_weight} if slope_weight else {}
        rows.append(grid.row(i, cx=ratio, c0=x0_weight + slope_weight, u0=1.0, history=history))
    return rows
