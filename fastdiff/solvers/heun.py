"""Heun's method on the probability-flow ODE, also with churn: the sampler of EDM."""

import math

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.line import Churn, euler_step, point
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("edm", exploding=True, rounded=False)
def edm(
    grid: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> list[Row]:
    """Karras et al. 2022, algorithm 2: two model evaluations a step, one in a last step to sigma = 0.

    The walk of the paper is that of `sigma_spacing="karras"` on `NoiseSchedule.edm`; others work alike.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: see `Churn`; the paper tunes them for each data set (table 5).
    """
    churn = Churn(grid, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    rows = churn.first_rows()
    for i in range(len(grid)):
        start, end = churn.starts[i], point(grid, i + 1)
        if end[1] == 0:
            rows.append(churn.row(i, **euler_step(start, end)))
            continue
        predictor = len(rows)
        rows.append(churn.row(i, **euler_step(start, end), u0=1.0))
        # The predicted x lies on the line through start, so that the slope there follows from x and the remembered x0:
        # half the difference of the two slopes is a multiple of that of the two x0.
        weight = (end[0] * start[1] / end[1] - start[0]) / 2
        columns = {"cx": 1.0, "c0": weight, "history": {predictor: -weight}, **churn.before(i + 1)}
        at_end = grid.row(i + 1, **columns) if i + 1 < len(grid) else grid.point(*end).row(0, **columns)
        rows.append(at_end)
    return rows


@register("heun", exploding=True, rounded=False)
def heun(grid: Grid) -> list[Row]:
    """Karras et al. 2022, algorithm 1: `edm` without churn."""
    return edm(grid)


@register("flow_heun", rounded=False)
def flow_heun(grid: Grid) -> list[Row]:
    """Heun's method on the velocity of a straight path alpha = 1 - sigma.

    Raises:
        ValueError: the grid is not on such a path.
    """
    if abs(grid.alpha + grid.sigma - 1).max() > 1e-12:
        raise ValueError("flow_heun walks alpha = 1 - sigma: use a flow schedule, or heun")
    return edm(grid)
