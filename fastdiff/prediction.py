"""What a diffusion model predicts: each prediction type as a mixture of the data and the noise."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm"]


def check_prediction_type(prediction_type: str) -> str:
    """The prediction type itself, or ValueError with those there are."""
    if prediction_type not in get_args(PredictionType):
        raise ValueError(f"prediction_type is {prediction_type!r}, accepted are {', '.join(get_args(PredictionType))}")
    return prediction_type


def prediction_target(
    prediction_type: str, alpha: FloatArray, sigma: FloatArray, sigma_data: float = 0.5
) -> tuple[FloatArray, FloatArray]:
    """(c_x0, c_eps) of what a model predicts, c_x0 * x0 + c_eps * eps, at points x = alpha * x0 + sigma * eps.

    "epsilon" eps (Ho et al. 2020); "sample" x0; "v_prediction" (alpha * eps - sigma * x0) / sqrt(alpha² + sigma²)
    (Salimans and Ho 2022, where the root is 1); "flow_prediction" eps - x0 (Liu et al. 2023); "edm"
    (x0 - c_skip * x̂) / c_out with x̂ = x / alpha (Karras et al. 2022, equation 8), multiplied out.
    """
    check_prediction_type(prediction_type)
    zero, one = np.zeros_like(sigma), np.ones_like(sigma)
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "sample":
        return one, zero
    if prediction_type == "v_prediction":
        norm = np.hypot(alpha, sigma)
        return -sigma / norm, alpha / norm
    if prediction_type == "flow_prediction":
        return -one, one
    norm = np.hypot(sigma_data * alpha, sigma)
    return sigma / (sigma_data * norm), -sigma_data * alpha / norm


def model_input_scale(
    prediction_type: str, alpha: FloatArray, sigma: FloatArray, sigma_data: float = 0.5
) -> FloatArray:
    """What makes x = alpha * x0 + sigma * eps the model's input: a factor of 1, for "edm" Karras' c_in of x / alpha."""
    if check_prediction_type(prediction_type) == "edm":
        return 1 / np.hypot(sigma_data * alpha, sigma)
    return np.ones_like(sigma)
