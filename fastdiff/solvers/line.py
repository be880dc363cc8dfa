"""Straight steps between two points of the state, and the noise that churn adds before them.

The probability-flow ODE is dx = x0 * d alpha + eps * d sigma along any path of points (alpha, sigma). On a straight one
it is Karras et al.'s dx = eps * d sigma where alpha stays 1, and dx = velocity * d sigma on a flow path; the line from
alpha = 0 to a point with alpha = 1 is as good as any.
"""

from __future__ import annotations

import math
from typing import Any

from fastdiff.solvers.grid import Grid
from fastdiff.table import Row

Point = tuple[float, float]


def point(grid: Grid, i: int) -> Point:
    """(alpha, sigma) of point i."""
    return float(grid.alpha[i]), float(grid.sigma[i])


def euler_step(start: Point, end: Point) -> dict[str, float]:
    """Columns of x_end = alpha_end * x0 + sigma_end * eps with eps = (x - alpha * x0) / sigma."""
    ratio = end[1] / start[1]
    return {"cx": ratio, "c0": end[0] - start[0] * ratio}


class Churn:
    """Noise that raises sigma to sigma_hat before each step (Karras et al. 2022, algorithm 2, lines 4 to 6).

    The model sees the churned state, so the noise of a step is added by the row before it: the first step's by a row of
    its own, which does not evaluate the model. Where sigma_hat is above the schedule's largest sigma, a model that
    knows timesteps is told the last one: s_tmax keeps clear of that.

    Args:
        s_churn: at least 0; sigma_hat = sigma * (1 + min(s_churn / n, sqrt(2) - 1)) for a walk of n steps.
        s_tmin, s_tmax: only steps from sigma / alpha in [s_tmin, s_tmax] are churned, and none from alpha = 0.
        s_noise: standard deviation of the noise in units of what sigma_hat asks for, at least 0.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(self, grid: Grid, *, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
        for name, value in {"s_churn": s_churn, "s_noise": s_noise}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, a finite number of at least 0 is needed")
        if not 0 <= s_tmin <= s_tmax:
            raise ValueError(f"s_tmin={s_tmin} and s_tmax={s_tmax} are not 0 <= s_tmin <= s_tmax")
        self.grid = grid
        gamma = min(s_churn / len(grid), math.sqrt(2) - 1)
        self.starts: list[Point] = []
        stds = []
        for i in range(len(grid)):
            alpha, sigma = point(grid, i)
            churned = alpha > 0 and s_tmin <= sigma / alpha <= s_tmax
            self.starts.append((alpha, sigma * (1 + gamma) if churned else sigma))
            stds.append(s_noise * sigma * math.sqrt(gamma * (2 + gamma)) if churned else 0.0)
        self.std = [*stds, 0.0]

    def first_rows(self) -> list[Row]:
        """The row that churns the state the walk starts with, if there is such noise."""
        if self.std[0] == 0:
            return []
        return [Row(ev=False, cx=1.0, cz=self.std[0], draws=True, at=point(self.grid, 0))]

    def row(self, i: int, **columns: Any) -> Row:
        """A row that evaluates the model at the churned point i."""
        if self.starts[i] == point(self.grid, i):
            return self.grid.row(i, **columns)
        return self.grid.point(*self.starts[i]).row(0, **columns)

    def before(self, i: int) -> dict[str, Any]:
        """Columns of the row that leads to point i: the noise that is added there."""
        return {"cz": self.std[i], "draws": self.std[i] > 0}
