"""The linear multistep method on the probability-flow ODE."""

import math

from fastdiff.solvers.exponential import check_order, lagrange_integrals
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.line import euler_step, point
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("lms", exploding=True, rounded=False)
def lms(grid: Grid, *, order: int = 4) -> list[Row]:
    """Adams-Bashforth on noise levels that are not evenly spaced (k-diffusion's LMS).

    The slope dx / d sigma is integrated exactly on the polynomial through its last values, fewer at the start. Only
    points on the line of the step count: on none of a schedule's walks but after a start at alpha = 0 are there others.

    Args:
        order: 1 to 4, the number of values.
    """
    check_order(order, 4)
    rows = []
    for i in range(len(grid)):
        start, end = point(grid, i), point(grid, i + 1)
        d_alpha, d_sigma = end[0] - start[0], end[1] - start[1]
        step = euler_step(start, end)
        if d_sigma == 0:
            rows.append(grid.row(i, **step))
            continue
        nodes = [0.0]
        for j in range(i - 1, max(i - order, -1), -1):
            alpha, sigma = point(grid, j)
            if not math.isclose((alpha - start[0]) * d_sigma, (sigma - start[1]) * d_alpha, abs_tol=1e-12 * d_sigma**2):
                break
            nodes.append((sigma - start[1]) / d_sigma)
        # slope = eps + d alpha / d sigma * x0 with eps = (x - alpha * x0) / sigma
        slope = {"ux": 1 / start[1], "u0": d_alpha / d_sigma - start[0] / start[1]}
        if len(nodes) > 1:
            weights = [d_sigma * weight for weight in lagrange_integrals(nodes, 0.0)]
            step = {"cx": 1 + weights[0] * slope["ux"], "c0": weights[0] * slope["u0"]}
            rows.append(grid.row(i, **step, **slope, history={i - k: w for k, w in enumerate(weights) if k}))
        else:
            rows.append(grid.row(i, **step, **slope))
    return rows
