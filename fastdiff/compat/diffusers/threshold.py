"""The dynamic threshold of a batch as one operation: the reduction that comes before a step."""

import math

import torch
from torch import Tensor

from fastdiff.kernels.device_table import FLOAT_COLUMNS

_PX, _PM = FLOAT_COLUMNS.index("px"), FLOAT_COLUMNS.index("pm")


@torch.library.custom_op("fastdiff::dynamic_threshold", mutates_args=())
def _dynamic_threshold_op(
    sample: Tensor, model_output: Tensor, floats: Tensor, row: Tensor, ratio: float, limit: float
) -> Tensor:
    # a row out of range poisons its sample in the step itself
    rows = floats.index_select(0, row.clamp(0, len(floats) - 1))
    px, pm = rows[:, _PX], rows[:, _PM]  # not by a list, which would be copied to the device at every step
    state, output = sample.flatten(1), model_output[:, : sample.shape[1]].flatten(1)
    size = px[:, None] * state.to(floats.dtype) + pm[:, None] * output.to(floats.dtype)
    # The interpolated quantile from the few largest values: torch.quantile sorts all and takes three times as long.
    rank = (torch.tensor(ratio, dtype=floats.dtype) * (size.shape[1] - 1)).item()
    below = math.floor(rank)
    largest = size.abs_().topk(size.shape[1] - below, dim=1).values
    quantile = torch.lerp(largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)], rank - below)
    # topk puts NaN first: a sample with a NaN has no quantile
    quantile = torch.where(largest[:, 0].isnan(), torch.nan, quantile)
    return quantile.clamp(1.0, limit)


@_dynamic_threshold_op.register_fake
def _(sample, model_output, floats, row, ratio, limit):
    return floats.new_empty(sample.shape[0])


def dynamic_threshold(
    sample: Tensor, model_output: Tensor, floats: Tensor, row: Tensor, ratio: float, limit: float
) -> Tensor:
    """What x0 of each sample is clipped to and divided by (Saharia et al. 2022, section 2.3), as in diffusers.

    Args:
        sample: [B, ...]; model_output: like it, or [B, 2C, ...] whose first half is meant.
        floats, row: the packed rows and the row [1] or [B] that predicts x0, as in `solver_step`.
        ratio: in [0, 1], the quantile of |x0| over a sample, interpolated linearly.
        limit: the largest threshold; the smallest is 1.

    Returns:
        [B] clamp(quantile, 1, limit); NaN for a sample that has a NaN.
    """
    return _dynamic_threshold_op(sample, model_output, floats, row, float(ratio), float(limit))
