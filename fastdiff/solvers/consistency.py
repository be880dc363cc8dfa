"""Samplers of models that were distilled to take one long step at a time."""

import math
from collections.abc import Sequence

from fastdiff.solvers.grid import Grid
from fastdiff.solvers.line import Point
from fastdiff.solvers.registry import register
from fastdiff.table import Row


@register("lcm", original_inference_steps=50)
def lcm(grid: Grid, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> list[Row]:
    """Latent consistency models (Luo et al. 2023, algorithm 3): f = c_skip * x + c_out * x0, noised to the next point.

    c_skip = sigma_data² / (s² + sigma_data²) and c_out = s / sqrt(s² + sigma_data²) at s = timestep_scaling * timestep.

    Args:
        timestep_scaling, sigma_data: of the model's training, both above 0.
    """
    if not timestep_scaling > 0 or not sigma_data > 0:
        raise ValueError(f"timestep_scaling={timestep_scaling} and sigma_data={sigma_data} must be above 0")
    if grid.prediction_type == "edm":
        raise ValueError(
            "lcm is for models that are told timesteps, and 'edm' models are told ln(sigma): use consistency"
        )
    rows = []
    for i in range(len(grid)):
        scaled, (alpha_next, sigma_next) = timestep_scaling * grid.t[i], (grid.alpha[i + 1], grid.sigma[i + 1])
        norm = math.hypot(scaled, sigma_data)
        skip, out = (sigma_data / norm) ** 2, scaled / norm
        columns = {"cx": float(alpha_next * skip), "c0": float(alpha_next * out), "cz": float(sigma_next)}
        rows.append(grid.row(i, **columns, draws=sigma_next > 0))
    return rows


@register("tcd", original_inference_steps=50)
def tcd(grid: Grid, *, eta: float = 0.3, through: Sequence[Point] | None = None) -> list[Row]:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4, strategic stochastic sampling).

    A deterministic step to timestep s = floor((1 - eta) * t_next), and noise from there to t_next; the last step is
    deterministic.

    Args:
        eta: in [0, 1], the paper's gamma: 0 is DDIM, 1 noises x0 anew in every step.
        through: (alpha, sigma) where the deterministic part of each step ends, in place of those that follow from eta.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, accepted is [0, 1]")
    rows = []
    for i in range(len(grid)):
        alpha, sigma = float(grid.alpha[i + 1]), float(grid.sigma[i + 1])
        alpha_s, sigma_s = alpha, sigma
        if through is not None:
            alpha_s, sigma_s = through[i]
        elif i + 1 < len(grid) and eta > 0:
            alpha_s, sigma_s = grid.level(math.floor((1 - eta) * grid.timestep(i + 1)))
        ratio = alpha / alpha_s
        ux, u0, um = grid.epsilon(i)
        direction = ratio * sigma_s
        std = math.sqrt(max(sigma**2 - direction**2, 0.0))
        c0 = alpha + direction * u0
        rows.append(grid.row(i, cx=direction * ux, c0=c0, cm=direction * um, cz=std, draws=std > 0))
    return rows


@register("consistency")
def consistency(grid: Grid, *, boundary_sigma: float = 0.002, timestep_scaling: float = 1000.0) -> list[Row]:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1).

    x0 = c_skip * x + c_out * m with the paper's scalings that make it x itself at boundary_sigma (appendix C), noised
    to sqrt(sigma_next² - boundary_sigma²). For prediction type "edm"; sigma_data is the schedule's.

    Args:
        boundary_sigma: where the model's trajectories end, at least 0.
        timestep_scaling: the model is told timestep_scaling * ln(sigma) / 4; 1000 in the paper's released models.
    """
    if grid.prediction_type != "edm":
        raise ValueError(f"consistency is for prediction_type='edm', got {grid.prediction_type!r}")
    if not boundary_sigma >= 0:
        raise ValueError(f"boundary_sigma is {boundary_sigma}, a number of at least 0 is needed")
    rows = []
    for i in range(len(grid)):
        alpha, sigma = float(grid.alpha[i]), float(grid.sigma[i] / grid.alpha[i])
        if sigma < boundary_sigma * (1 - 1e-9):  # a grid that ends there may be a rounding off
            raise ValueError(f"boundary_sigma={boundary_sigma} is above the grid's sigma = {sigma:g}")
        alpha_next, sigma_next = float(grid.alpha[i + 1]), float(grid.sigma[i + 1] / grid.alpha[i + 1])
        gap, data = max(sigma - boundary_sigma, 0.0), grid.sigma_data
        columns = {"px": data**2 / (gap**2 + data**2) / alpha, "pm": gap * data / math.hypot(sigma, data)}
        std = alpha_next * math.sqrt(max(sigma_next**2 - boundary_sigma**2, 0.0))
        told = timestep_scaling * float(grid.t[i])
        rows.append(grid.row(i, t=told, **columns, c0=alpha_next, cz=std, draws=std > 0))
    return rows
