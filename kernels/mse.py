"""The training loss: weighted squared error of each sample and its gradient in one pass, its noise regenerated."""

import math

import torch
from torch import Tensor

from fastdiff.kernels.philox import STREAMS, noise_counters, normal_ref
from fastdiff.kernels.q_sample import (
    FLOAT_DTYPES,
    check_noise,
    check_same_device,
    check_training_inputs,
    pixels_ref,
    table_column_ref,
)

# Which of (x_start, noise) a prediction type's target is made of.
TARGETS = {
    "epsilon": (False, True),
    "sample": (True, False),
    "v_prediction": (True, True),
    "flow_prediction": (True, True),
    "edm": (True, True),
}


def mse_ref(
    model_output: Tensor,
    x_start: Tensor,
    t: Tensor,
    schedule_table: Tensor,
    target: str,
    weight: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_indices: Tensor | None,
    draw: Tensor | None,
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """`mse` in plain PyTorch; weight float32 [B], grad_scale float32 [1], per-sample arrays as in `q_sample_ref`."""
    use_x_start, use_noise = TARGETS[target]
    ndim = model_output.ndim
    expected = torch.zeros((), device=model_output.device)
    if use_x_start:
        expected = table_column_ref(schedule_table, t, 2, ndim) * pixels_ref(x_start.detach())
    if use_noise:
        if noise is None:
            assert seed is not None
            assert sample_indices is not None
            assert draw is not None
            noise = normal_ref(seed, sample_indices, draw, STREAMS["train"], tuple(model_output.shape))
        expected = expected + table_column_ref(schedule_table, t, 3, ndim) * noise.detach().float()
    # A multiply-add of an absent term is a plain product in the kernel too, so both round alike.
    error = model_output.float() - expected
    n_elements = math.prod(model_output.shape[1:])
    weight = weight.detach()
    loss = weight * (error.square().flatten(1).sum(1) if ndim > 1 else error.square()) / n_elements
    factor = weight * grad_scale * (2 / n_elements if n_elements else 0.0)
    grad = factor.view(-1, *(1,) * (ndim - 1)) * error.detach()
    return loss, torch.empty_like(model_output.detach()).copy_(grad)


def mse(
    model_output: Tensor,
    x_start: Tensor,
    t: Tensor,
    schedule_table: Tensor,
    *,
    target: str,
    weight: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_indices: Tensor | None = None,
    draw: int | Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weighted mean squared error of each sample, and its gradient.

    The target is schedule_table[t, 2] * x_start + schedule_table[t, 3] * eps, with the eps that `q_sample` took from
    the same seed, sample_indices and draw, or the noise given. To train, call `model_output.backward(gradient=grad)`:
    the gradient comes with the loss and costs nothing more. The loss is differentiable in model_output only.

    Args:
        model_output: [B, C, *spatial], float32, float16 or bfloat16 of any strides.
        x_start: of its shape, float or uint8 as in `q_sample`. Not read for target "epsilon".
        t: int64 or int32 [B] in [0, T). A value outside makes that sample's loss and gradient NaN.
        schedule_table: float32 [T, >= 4], `NoiseSchedule.training_table` of the same prediction type.
        target: "epsilon" | "sample" | "v_prediction" | "flow_prediction" | "edm". No noise is made for "sample".
        weight: float32 [B], 1 by default.
        noise, seed, sample_indices, draw: as in `q_sample`; for "sample" they may all be left out.
        grad_scale: a finite number other than 0, or a float32 tensor of one element; multiplies grad, for loss scaling.

    Returns:
        loss: float32 [B], weight[b] * mean((model_output[b] - target[b])^2).
        grad: grad_scale * d loss[b] / d model_output[b], in model_output's dtype and layout.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device; an unknown target; not exactly one of
            noise and seed. Of a model that also predicts a variance (2C channels), pass the first C channels.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if model_output.dtype not in FLOAT_DTYPES:
        raise TypeError(f"model_output must be float32, float16 or bfloat16, got {model_output.dtype}")
    if model_output.shape != x_start.shape:
        raise ValueError(
            f"model_output must have x_start's shape {list(x_start.shape)}, got {list(model_output.shape)}"
        )
    check_training_inputs(x_start, t, schedule_table, columns=4)
    check_noise(noise, x_start)
    check_same_device(x_start, model_output=model_output, weight=weight)
    batch, device = x_start.shape[0], x_start.device
    if weight is None:
        weight = torch.ones(batch, device=device)
    elif weight.dtype != torch.float32 or weight.shape != (batch,):
        raise ValueError(f"weight must be float32 of shape [{batch}], got {weight.dtype} of shape {list(weight.shape)}")
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1 or grad_scale.dtype != torch.float32 or grad_scale.device != device:
            raise ValueError(
                f"grad_scale must be a number or a float32 tensor of one element on {device}, "
                f"got {grad_scale.dtype} of shape {list(grad_scale.shape)} on {grad_scale.device}"
            )
        grad_scale = grad_scale.detach().reshape(1)
    elif not math.isfinite(grad_scale) or grad_scale == 0:
        raise ValueError(f"grad_scale must be a finite number other than 0, got {grad_scale}")
    else:
        grad_scale = torch.full((1,), grad_scale, dtype=torch.float32, device=device)
    if not TARGETS[target][1] and noise is None and seed is None:
        counters: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    else:
        counters = noise_counters(noise, seed, sample_indices, draw, batch, device)
    return mse_ref(model_output, x_start, t, schedule_table, target, weight, noise, *counters, grad_scale)
