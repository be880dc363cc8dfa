"""Denoising diffusion implicit models, and their inversion."""

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("ddim")
def ddim(grid: Grid, *, eta: float = 0.0, use_clipped_model_output: bool = False) -> list[Row]:
    """Song et al. 2021, equation 12; the predecessor of a timestep is the next one of the grid.

    Args:
        eta: in [0, 1], the standard deviation of a step's noise in units of the DDPM posterior's: 0 is deterministic.
        use_clipped_model_output: eps follows from x0 after it was clipped, not from the model's output alone.
    """
    rows = []
    for i in range(len(grid)):
        direction, std = grid.split_noise(i, eta)
        ux, u0, um = grid.epsilon(i, clipped=use_clipped_model_output)
        c0 = float(grid.alpha[i + 1]) + direction * u0
        rows.append(grid.row(i, cx=direction * ux, c0=c0, cm=direction * um, cz=std, draws=std > 0))
    return rows


@register("ddim_inverse", inverse=True)
def ddim_inverse(grid: Grid) -> list[Row]:
    """DDIM from data to noise (Song et al. 2021, section 4.3): the grid's points in reverse, from its end to its first.

    Each row undoes one of `ddim`'s and tells the model what that row tells it. The noise in the model's output there
    must be known before the state: it is taken from the state at hand, the first iteration of a fixed point.
    """
    rows = []
    for i in reversed(range(len(grid))):
        alpha, sigma = float(grid.alpha[i]), float(grid.sigma[i])
        state = grid.told(i, float(grid.alpha[i + 1]), float(grid.sigma[i + 1]))
        ux, u0, um = state.epsilon(0)
        rows.append(state.row(0, cx=sigma * ux, c0=alpha + sigma * u0, cm=sigma * um))
    return rows
