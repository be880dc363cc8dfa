"""Pseudo numerical methods for diffusion models: PNDM and PLMS."""

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.line import Point, euler_step, point
from fastdiff.solvers.registry import register
from fastdiff.table import Row

# of the last values, newest first (Liu et al. 2022, equation 12, and its lower orders)
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
# number of steps of the Runge-Kutta start
PSEUDO_RUNGE_KUTTA = 3


class _Walk:
    """Rows of steps x_end = a * x + b * (combination of values), of which several may start from the same x.

    A value is eps, or on a straight path alpha + sigma = 1 the velocity eps - x0, in whose terms a step from alpha = 0
    is defined: eps + slope * x0.
    """

    def __init__(self, grid: Grid) -> None:
        self.rows: list[Row] = []
        self.slope = -1.0 if abs(grid.alpha + grid.sigma - 1).max() < 1e-12 else 0.0
        self._a = 1.0
        self._weights: dict[int, float] = {}

    def add(self, row: Row, start: Point, end: Point, combination: dict[int, float], *, restart: bool = False) -> int:
        """Append `row` with DDIM's step (Liu et al. 2022, equation 11) from start to end; the number of its value.

        Args:
            combination: weights of values by their numbers, that of this row among them.
            restart: x is where the step before started, which its own result and values give back.
        """
        # x0 and eps of a state x and a value y: x = alpha * x0 + sigma * eps, y = eps + slope * x0
        determinant = start[0] - self.slope * start[1]
        a = (end[0] - self.slope * end[1]) / determinant
        b = (end[1] * start[0] - end[0] * start[1]) / determinant
        weights = {k: b * weight for k, weight in combination.items()}
        ratio, history = (a / self._a, dict(weights)) if restart else (a, dict(weights))
        if restart:
            for k, weight in self._weights.items():
                history[k] = history.get(k, 0.0) - ratio * weight
        self._a, self._weights = a, weights
        own = len(self.rows)
        weight = history.pop(own, 0.0)
        alpha, sigma = row.at or start
        row.ux, row.u0 = 1 / sigma, self.slope - alpha / sigma
        row.cx, row.c0, row.history = ratio + weight * row.ux, weight * row.u0, history
        self.rows.append(row)
        return own


@register("pndm")
def pndm(grid: Grid, *, plms: bool = False) -> list[Row]:
    """Liu et al. 2022: the multistep formula of Adams and Bashforth on eps, each step by DDIM's rule; of order 2.

    It needs three earlier values. Algorithm 2's start takes up to three pseudo Runge-Kutta steps, of four evaluations
    each. A step from alpha = 0, where eps does not lead anywhere, is DDIM's, and the method starts after it.

    Args:
        plms: start with one step of Euler and a half, then rising orders, as latent diffusion does: one evaluation more
            than there are steps.
    """
    walk, values = _Walk(grid), []
    first = 0
    if grid.alpha[0] == 0 and walk.slope == 0:
        walk.rows.append(grid.row(0, **euler_step(point(grid, 0), point(grid, 1))))
        first = 1
    for i in range(first, len(grid)):
        start, end, k = point(grid, i), point(grid, i + 1), len(walk.rows)
        values.append(k)
        not_last = i + 1 < len(grid)
        if not_last and plms and i == first:
            walk.add(grid.row(i), start, end, {k: 1.0})
            walk.add(grid.row(i + 1), start, end, {k: 1 / 2, k + 1: 1 / 2}, restart=True)
        elif not_last and not plms and i < first + PSEUDO_RUNGE_KUTTA:
            time = _middle(grid.timestep(i), grid.timestep(i + 1))
            level = grid.level(time)
            middle = grid.point(*level, timestep=time)
            walk.add(grid.row(i), start, level, {k: 1.0})
            walk.add(middle.row(0), start, level, {k + 1: 1.0}, restart=True)
            walk.add(middle.row(0), start, end, {k + 2: 1.0}, restart=True)
            sixths = {k: 1 / 6, k + 1: 2 / 6, k + 2: 2 / 6, k + 3: 1 / 6}
            walk.add(grid.row(i + 1), start, end, sixths, restart=True)
        else:
            weights = ADAMS_BASHFORTH[min(len(values), 4) - 1]
            walk.add(grid.row(i), start, end, dict(zip(reversed(values), weights)))
    return walk.rows


def _middle(timestep: float, following: float) -> float:
    """The timestep between two; a whole one where both are whole."""
    if timestep == round(timestep) and following == round(following):
        return float((int(timestep) + int(following)) // 2)
    return (timestep + following) / 2
