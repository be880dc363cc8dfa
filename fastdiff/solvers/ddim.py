"""Denoising diffusion implicit models."""

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
