"""Euler's method on the probability-flow ODE, plain, with churn, and with ancestral noise."""

import math

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.line import Churn, euler_step, point
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("euler", exploding=True, rounded=False)
def euler(
    grid: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> list[Row]:
    """Karras et al. 2022, algorithm 1, or with churn 2, without its correction; on a flow schedule x moves straight.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: see `Churn`.
    """
    churn = Churn(grid, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    rows = churn.first_rows()
    for i in range(len(grid)):
        rows.append(churn.row(i, **euler_step(churn.starts[i], point(grid, i + 1)), **churn.before(i + 1)))
    return rows


@register("euler_a", exploding=True, rounded=False)
def euler_ancestral(grid: Grid, *, eta: float = 1.0) -> list[Row]:
    """An Euler step to sigma_down and noise sigma_up, so that sigma_down² + sigma_up² = sigma_next² (k-diffusion).

    Args:
        eta: in [0, 1], sigma_up in units of the posterior's standard deviation: 0 is Euler's method.
    """
    rows = []
    for i in range(len(grid)):
        sigma_down, sigma_up = grid.split_noise(i, eta)
        step = euler_step(point(grid, i), (float(grid.alpha[i + 1]), sigma_down))
        rows.append(grid.row(i, **step, cz=sigma_up, draws=sigma_up > 0))
    return rows
