"""Euler's method on the probability-flow ODE, plain and with ancestral noise."""

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row


def _to(grid: Grid, i: int, sigma_next: float) -> dict[str, float]:
    # alpha_next * x0 + sigma_next * eps with eps = (x - alpha * x0) / sigma. For alpha = 1 this is
    # x + (sigma_next - sigma) * eps, on a flow path x + (sigma_next - sigma) * velocity.
    ratio = sigma_next / float(grid.sigma[i])
    return {"cx": ratio, "c0": float(grid.alpha[i + 1] - grid.alpha[i] * ratio)}


@register("euler", exploding=True, rounded=False)
def euler(grid: Grid) -> list[Row]:
    """Karras et al. 2022, algorithm 1 without its correction; on a flow schedule x moves along its straight path."""
    return [grid.row(i, **_to(grid, i, float(grid.sigma[i + 1]))) for i in range(len(grid))]


@register("euler_a", exploding=True, rounded=False)
def euler_ancestral(grid: Grid, *, eta: float = 1.0) -> list[Row]:
    """An Euler step to sigma_down and noise sigma_up, so that sigma_down² + sigma_up² = sigma_next² (k-diffusion).

    Args:
        eta: in [0, 1], sigma_up in units of the posterior's standard deviation: 0 is Euler's method.
    """
    rows = []
    for i in range(len(grid)):
        sigma_down, sigma_up = grid.split_noise(i, eta)
        rows.append(grid.row(i, **_to(grid, i, sigma_down), cz=sigma_up, draws=sigma_up > 0))
    return rows
