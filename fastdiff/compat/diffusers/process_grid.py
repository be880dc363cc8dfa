"""The grid of schedulers that walk x itself along alphas_cumprod."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdiff.prediction import FloatArray
from fastdiff.solvers.grid import Grid

# Of alphas_cumprod where it is 0. Dividing by its root keeps clear of float32's infinity.
NO_SIGNAL = 1e-36


def process_points(alphas_cumprod: FloatArray) -> tuple[FloatArray, FloatArray]:
    """alpha and sigma at values of alphas_cumprod.

    Where that is 0 and a model predicts eps, the originals divide by 0, and clipping to a range brings the infinities
    back to its ends. So it does with an alpha this small, and the table has a row there.
    """
    bar = np.where(alphas_cumprod == 0, NO_SIGNAL, alphas_cumprod)
    return np.sqrt(bar), np.sqrt(1 - bar)


def process_grid(alphas_cumprod: FloatArray, timesteps: Sequence[int], config: Any) -> Grid:
    """The grid over alphas_cumprod [n + 1] at timesteps [n], with the model and the static clipping of a configuration.

    Dynamic thresholding takes the place of clipping.
    """
    clips = config.clip_sample and not getattr(config, "thresholding", False)
    return Grid.from_points(
        *process_points(alphas_cumprod),
        timesteps,
        prediction_type=config.prediction_type,
        clip_sample=config.clip_sample_range if clips else None,
    )
