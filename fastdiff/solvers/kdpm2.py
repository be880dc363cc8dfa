"""The midpoint method on the probability-flow ODE, plain and with ancestral noise."""

import math

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.line import euler_step, point
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("kdpm2", exploding=True, rounded=False)
def kdpm2(grid: Grid) -> list[Row]:
    """DPM-Solver-2 as Karras et al. 2022 rewrite it (k-diffusion): a step takes the slope at sqrt(sigma * sigma_next).

    Two model evaluations a step, one in a last step to sigma = 0, which Euler's method takes.
    """
    return kdpm2_ancestral(grid, eta=0.0)


@register("kdpm2_a", exploding=True, rounded=False)
def kdpm2_ancestral(grid: Grid, *, eta: float = 1.0) -> list[Row]:
    """A midpoint step to sigma_down and noise sigma_up, so that sigma_down² + sigma_up² = sigma_next² (k-diffusion).

    Args:
        eta: in [0, 1], sigma_up in units of the posterior's standard deviation: 0 is `kdpm2`.
    """
    rows: list[Row] = []
    for i in range(len(grid)):
        sigma_down, sigma_up = grid.split_noise(i, eta)
        noise = {"cz": sigma_up, "draws": sigma_up > 0}
        start, end = point(grid, i), (float(grid.alpha[i + 1]), sigma_down)
        if sigma_down == 0:
            rows.append(grid.row(i, **euler_step(start, end), **noise))
            continue
        # how far along the line sqrt(sigma * sigma_down) lies
        part = math.sqrt(start[1]) / (math.sqrt(start[1]) + math.sqrt(end[1]))
        middle = (start[0] + part * (end[0] - start[0]), math.sqrt(start[1] * end[1]))
        first = len(rows)
        rows.append(grid.row(i, **euler_step(start, middle), u0=1.0))
        # x + (end - start) * slope(middle), where x follows from the state at the middle and the remembered x0
        back = start[0] - start[1] * middle[0] / middle[1]
        forward = end[0] - start[0] - (end[1] - start[1]) * middle[0] / middle[1]
        columns = {"cx": end[1] / middle[1], "c0": forward, "history": {first: back}, **noise}
        rows.append(grid.point(*middle).row(0, **columns))
    return rows
