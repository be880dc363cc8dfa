"""Solvers: host-side float64 functions from a grid of noise levels to the rows of a step table."""

from fastdiff.solvers import ddim, ddpm, deis, dpm, dpm_single, euler, sa, unipc
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import build, names, register

__all__ = ["Grid", "build", "ddim", "ddpm", "deis", "dpm", "dpm_single", "euler", "names", "register", "sa", "unipc"]
