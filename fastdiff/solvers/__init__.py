"""Solvers: host-side float64 functions from a grid of noise levels to the rows of a step table."""

from fastdiff.solvers import (
    consistency,
    ddim,
    ddpm,
    deis,
    dpm,
    dpm_single,
    euler,
    heun,
    kdpm2,
    lms,
    pndm,
    repaint,
    sa,
    unipc,
)
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import build, names, register

__all__ = ["Grid", "build", "names", "register"]
__all__ += ["consistency", "ddim", "ddpm", "deis", "dpm", "dpm_single", "euler", "heun", "kdpm2", "lms", "pndm"]
__all__ += ["repaint", "sa", "unipc"]
