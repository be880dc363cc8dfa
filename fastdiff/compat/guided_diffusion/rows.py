"""The sampling steps of guided-diffusion as rows, one for each timestep: row t takes a sample from t to its neighbour.

A step is the engine's own solver on the grid of all timesteps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastdiff.compat.packed_rows import pack_rows
from fastdiff.prediction import FloatArray
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import Grid
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.euler import euler
from fastdiff.table import Row


def _grid(schedule: NoiseSchedule, mean_type: str, clip: bool, *, reverse: bool = False) -> Grid:
    """All timesteps, from the last one to x0, or in reverse from the first one to pure noise."""
    order, end = (slice(None), (0.0, 1.0)) if reverse else (slice(None, None, -1), (1.0, 0.0))
    return Grid.from_points(
        np.append(schedule.alpha[order], end[0]),
        np.append(schedule.sigma[order], end[1]),
        np.arange(schedule.num_train_timesteps)[order],
        prediction_type="epsilon" if mean_type == "EPSILON" else "sample",
        clip_sample=1.0 if clip else None,
    )


def _pack(rows: list[Row], schedule: NoiseSchedule, mean_type: str) -> FloatArray:
    if mean_type == "PREVIOUS_X":
        # The model predicts the posterior's mean, coef1 * x0 + coef2 * x.
        coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        rows = [replace(row, px=float(-coef2[t] / coef1[t]), pm=float(1 / coef1[t])) for t, row in enumerate(rows)]
    return pack_rows(rows)[0]


def fixed_variance(schedule: NoiseSchedule, var_type: str) -> tuple[FloatArray, FloatArray]:
    """The variance of a step and its logarithm, which is clipped where the variance is 0, both [N]."""
    variance, log_variance = schedule.posterior_variance, schedule.posterior_log_variance_clipped
    if var_type != "FIXED_LARGE":
        return variance, log_variance
    # The last step adds no noise but is scored by its likelihood, to which beta_0 would be a poor scale.
    large = np.append(np.exp(log_variance[:1]), schedule.betas[1:])
    return large, np.log(large)


def p_sample_rows(schedule: NoiseSchedule, mean_type: str, clip: bool, var_type: str) -> FloatArray:
    """Ho et al. 2020, algorithm 2, float64 [N, HISTORY_OFFSET + 1].

    The history column multiplies what a classifier adds to the mean: its gradient, by the variance. A learned variance
    is in no table; there it is 1, and the caller has multiplied the gradient.
    """
    variance = "fixed_small" if var_type == "LEARNED" else var_type.lower()
    rows = ddpm(_grid(schedule, mean_type, clip), variance=variance)[::-1]
    if var_type == "LEARNED":  # the model's second half of channels is the logarithm of the variance
        rows = [replace(row, cz=1.0, lv=0.5) if row.draws else row for row in rows]
    if mean_type == "PREVIOUS_X":
        rows = [replace(row, cx=0.0, c0=0.0, cm=1.0) for row in rows]
    scale = np.ones(len(rows)) if var_type.startswith("LEARNED") else fixed_variance(schedule, var_type)[0]
    return np.column_stack([_pack(rows, schedule, mean_type), scale])


def ddim_rows(schedule: NoiseSchedule, mean_type: str, clip: bool, eta: float) -> FloatArray:
    """Song et al. 2021, equation 12, with eps from the clipped x0: float64 [N, HISTORY_OFFSET]."""
    rows = ddim(_grid(schedule, mean_type, clip), eta=eta, use_clipped_model_output=True)[::-1]
    return _pack(rows, schedule, mean_type)


def ddim_reverse_rows(schedule: NoiseSchedule, mean_type: str, clip: bool) -> FloatArray:
    """The probability-flow ODE towards noise, from t to t + 1: float64 [N, HISTORY_OFFSET]."""
    return _pack(euler(_grid(schedule, mean_type, clip, reverse=True)), schedule, mean_type)
