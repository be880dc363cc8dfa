"""Pseudo numerical methods for diffusion models: PNDM and PLMS."""

import math

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row

# of the last model outputs, newest first (Liu et al. 2022, equation 12, and its lower orders)
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _transfer(grid: Grid, i: int, end: tuple[float, float]) -> tuple[float, float]:
    """(coefficient of the state, of the output) of DDIM's step from point i to `end` (Liu et al. 2022, equation 11)."""
    (px, pm), (ex, em) = grid.x0_from[i].tolist(), grid.eps_from[i].tolist()
    return end[0] * px + end[1] * ex, end[0] * pm + end[1] * em


class _Rows:
    """Rows of steps x_end = a * x + sum of b_k * output_k, of which several may start from the same x."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._a = 1.0
        self._b: dict[int, float] = {}

    def add(self, row: Row, a: float, b: dict[int, float], *, restart: bool = False) -> None:
        """Append `row`; restart: x is where the step before started, which its own result and outputs give back."""
        ratio = a / self._a if restart else a
        weights = dict(b)
        if restart:
            for k, weight in self._b.items():
                weights[k] = weights.get(k, 0.0) - ratio * weight
        own = len(self.rows)
        row.cx, row.cm, row.um = ratio, weights.pop(own, 0.0), 1.0
        row.history = weights
        self.rows.append(row)
        self._a, self._b = a, b


@register("pndm")
def pndm(grid: Grid, *, plms: bool = False) -> list[Row]:
    """Liu et al. 2022: the multistep formula of Adams and Bashforth on the model's outputs, each step by DDIM's rule.

    It needs three earlier outputs. Algorithm 2's start takes up to three pseudo Runge-Kutta steps of four evaluations
    each. What is combined is the model's output, whatever it predicts, and no x0 is formed: there is nothing to clip.

    Args:
        plms: start with one step of Euler and a half, then rising orders, as latent diffusion does: n + 1 evaluations.

    Raises:
        ValueError: clip_sample is given.
    """
    if grid.lim != math.inf:
        raise ValueError(
            f"pndm combines the model's outputs and forms no x0 to clip: clip_sample is {grid.lim}, not None"
        )
    walk, outputs = _Rows(), []
    ends = [(float(alpha), float(sigma)) for alpha, sigma in zip(grid.alpha[1:], grid.sigma[1:])]
    for i, end in enumerate(ends):
        k = len(walk.rows)
        outputs.append(k)
        a, b = _transfer(grid, i, end)
        if i + 1 < len(grid) and plms and i == 0:
            walk.add(grid.row(0), a, {k: b})
            walk.add(grid.row(1), a, {k: b / 2, k + 1: b / 2}, restart=True)
        elif i + 1 < len(grid) and not plms and i < 3:
            time = _middle(grid.timestep(i), grid.timestep(i + 1))
            level = grid.level(time)
            a_middle, b_middle = _transfer(grid, i, level)
            middle = grid.point(*level, timestep=time)
            walk.add(grid.row(i), a_middle, {k: b_middle})
            walk.add(middle.row(0), a_middle, {k + 1: b_middle}, restart=True)
            walk.add(middle.row(0), a, {k + 2: b}, restart=True)
            walk.add(grid.row(i + 1), a, {k: b / 6, k + 1: b / 3, k + 2: b / 3, k + 3: b / 6}, restart=True)
        else:
            weights = ADAMS_BASHFORTH[min(len(outputs), 4) - 1]
            walk.add(grid.row(i), a, {source: b * weight for source, weight in zip(reversed(outputs), weights)})
    return walk.rows


def _middle(timestep: float, following: float) -> float:
    """The timestep between two; a whole one where both are whole."""
    if timestep == round(timestep) and following == round(following):
        return float((int(timestep) + int(following)) // 2)
    return (timestep + following) / 2
