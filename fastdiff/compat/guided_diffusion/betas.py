"""Noise schedules by guided-diffusion's names."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fastdiff.prediction import FloatArray


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> FloatArray:
    """betas [N]: "linear" (Ho et al. 2020, scaled from 1000 to N timesteps) or "cosine" (Nichol and Dhariwal 2021)."""
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_diffusion_timesteps)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise ValueError(f"schedule_name is {schedule_name!r}, accepted are 'linear' and 'cosine'")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> FloatArray:
    """betas [N], at most max_beta, whose 1 - beta multiply up to alpha_bar(t), a function of t in [0, 1]."""
    ends = np.array([alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)])
    return np.minimum(1 - ends[1:] / ends[:-1], max_beta)
