"""In-painting with an unconditional model."""

import math

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("repaint")
def repaint(grid: Grid, *, jump_length: int = 10, jump_n_sample: int = 10, eta: float = 1.0) -> list[Row]:
    """RePaint (Lugmayr et al. 2022, algorithm 1 with the jumps of its appendix B): sample with mask= and known=.

    After every step the known part of the image, noised to the level reached, is put in its place: with the same noise
    that the step adds. Every jump_length steps the walk goes jump_length steps forward again, jump_n_sample - 1 times,
    so that the new part has time to fit the known one; a forward jump is one row without a model evaluation.

    Args:
        jump_length: number of steps between jumps and of a jump, at least 1.
        jump_n_sample: how often each stretch is walked, at least 1.
        eta: in [0, 1]; 1 takes the paper's DDPM steps, 0 those of DDIM.
    """
    for name, value in {"jump_length": jump_length, "jump_n_sample": jump_n_sample}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, an integer of at least 1 is needed")
    n = len(grid)
    # how often the walk still turns back with this many steps left
    jumps = dict.fromkeys(range(0, n - jump_length, jump_length), jump_n_sample - 1)
    rows: list[Row] = []
    i = 0
    while i < n:
        alpha, sigma = float(grid.alpha[i + 1]), float(grid.sigma[i + 1])
        direction, std = grid.split_noise(i, eta)
        ux, u0, um = grid.epsilon(i)
        step = {"cx": direction * ux, "c0": alpha + direction * u0, "cm": direction * um, "cz": std}
        rows.append(grid.row(i, **step, k0=alpha, kz=sigma, draws=sigma > 0))
        i += 1
        if jumps.get(n - i, 0) > 0:
            jumps[n - i] -= 1
            ratio = float(grid.alpha[i - jump_length] / alpha)
            beta = float(grid.sigma[i - jump_length]) ** 2 - (ratio * sigma) ** 2
            rows.append(Row(ev=False, cx=ratio, cz=math.sqrt(beta), draws=True, at=(alpha, sigma)))
            i -= jump_length
    return rows
