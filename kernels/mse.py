"""The training loss: weighted squared error of each sample and its gradient in one pass, its noise regenerated."""

import math

import torch
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES, check_tensor
from fastdiff.kernels.dispatch import LAUNCH_OPTIONS, device_guard, tl, triton, use_triton
from fastdiff.kernels.layout import element_offset, in_lane_order, is_channels_last, merge_strides
from fastdiff.kernels.philox import (
    BLOCK_SIZE,
    STREAMS,
    noise_counters,
    noise_key,
    normal_at,
    normal_block,
    normal_ref,
    num_warps,
)
from fastdiff.kernels.q_sample import (
    check_training_inputs,
    load_coefficient,
    load_pixels,
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


@triton.jit
def _mse_kernel(
    model_output_ptr,
    x_ptr,
    noise_ptr,
    grad_ptr,
    partial_ptr,
    t_ptr,
    table_ptr,
    weight_ptr,
    grad_scale_ptr,
    seed_ptr,
    sample_ptr,
    draw_ptr,
    num_train_timesteps,
    stride_t,
    stride_column,
    two_over_n,
    n_elements,
    n_blocks,
    channels,
    positions,
    inner,
    stride_gb,
    stride_gc,
    stride_go,
    stride_gi,
    stride_mb,
    stride_mc,
    stride_mo,
    stride_mi,
    stride_xb,
    stride_xc,
    stride_xo,
    stride_xi,
    stride_nb,
    stride_nc,
    stride_no,
    stride_ni,
    STREAM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MODEL_DENSE: tl.constexpr,
    INPUTS_DENSE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    t = tl.load(t_ptr + b).to(tl.int64)

    i = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    keep = i < n_elements
    # narrow and wide tensors side by side: four neighbours a thread for both
    i = tl.max_contiguous(tl.multiple_of(i, 4), 4)
    if CHANNELS_LAST:
        c, p = i % channels, i // channels
    else:
        c, p = i // positions, i % positions
    model_offset = i if MODEL_DENSE else element_offset(c, p, inner, stride_mc, stride_mo, stride_mi)
    model_output = tl.load(model_output_ptr + b * stride_mb + model_offset, mask=keep, other=0.0).to(tl.float32)

    target = tl.zeros([BLOCK_SIZE], tl.float32)
    if x_ptr is not None:
        target_x0 = load_coefficient(table_ptr, t, num_train_timesteps, stride_t, stride_column, 2)
        x_offset = i if INPUTS_DENSE else element_offset(c, p, inner, stride_xc, stride_xo, stride_xi)
        target += target_x0 * load_pixels(x_ptr + b * stride_xb, x_offset, keep)
    if noise_ptr is not None:
        target_eps = load_coefficient(table_ptr, t, num_train_timesteps, stride_t, stride_column, 3)
        noise_offset = i if INPUTS_DENSE else element_offset(c, p, inner, stride_nc, stride_no, stride_ni)
        noise = tl.load(noise_ptr + b * stride_nb + noise_offset, mask=keep, other=0.0).to(tl.float32)
        target += target_eps * noise
    elif seed_ptr is not None:
        target_eps = load_coefficient(table_ptr, t, num_train_timesteps, stride_t, stride_column, 3)
        seed, sample, draw = noise_key(seed_ptr, sample_ptr, draw_ptr, b)
        if CHANNELS_LAST:
            noise = normal_block(block * (BLOCK_SIZE // 4), seed, sample, STREAM, draw, BLOCK_SIZE)
        else:
            noise = normal_at(p * channels + c, seed, sample, STREAM, draw)
        target += target_eps * noise

    error = model_output - target
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(keep, error * error, 0.0)))
    factor = tl.load(grad_scale_ptr) * two_over_n
    if weight_ptr is not None:
        factor = factor * tl.load(weight_ptr + b)
    grad_offset = i if MODEL_DENSE else element_offset(c, p, inner, stride_gc, stride_go, stride_gi)
    grad = (factor * error).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + b * stride_gb + grad_offset, grad, mask=keep)


@torch.library.custom_op("fastdiff::mse", mutates_args=())
def _mse_op(
    model_output: Tensor,
    x_start: Tensor,
    t: Tensor,
    schedule_table: Tensor,
    target: str,
    weight: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_indices: Tensor | None,
    draw: Tensor | None,
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(model_output)
    batch, n_elements = model_output.shape[0], math.prod(model_output.shape[1:])
    n_blocks = triton.cdiv(n_elements, BLOCK_SIZE)
    partial = torch.empty((batch, n_blocks), dtype=torch.float32, device=model_output.device)
    use_x_start, use_noise = TARGETS[target]
    if partial.numel() > 0:
        # one slot each for x_start and noise; an absent one takes any strides
        x_slot, noise_slot = x_start if use_x_start else None, noise if use_noise else None
        inputs = [tensor for tensor in (x_slot, noise_slot) if tensor is not None]
        present = [model_output if tensor is None else tensor for tensor in (x_slot, noise_slot)]
        extent, strides = merge_strides(grad, model_output, *present)
        channels_last = is_channels_last(model_output)
        with device_guard(model_output):
            _mse_kernel[(batch * n_blocks,)](
                model_output,
                x_slot,
                noise_slot,
                grad,
                partial,
                t.contiguous(),
                schedule_table,
                None if weight is None else weight.contiguous(),
                grad_scale,
                *((seed, sample_indices, draw) if use_noise else (None, None, None)),
                schedule_table.shape[0],
                *schedule_table.stride(),
                2 / n_elements,
                n_elements,
                n_blocks,
                *extent,
                *strides[0],
                *strides[1],
                *strides[2],
                *strides[3],
                STREAM=STREAMS["train"],
                CHANNELS_LAST=channels_last,
                MODEL_DENSE=all(in_lane_order(tensor, channels_last) for tensor in (model_output, grad)),
                INPUTS_DENSE=all(in_lane_order(tensor, channels_last) for tensor in inputs),
                BLOCK_SIZE=BLOCK_SIZE,
                num_warps=num_warps(channels_last),
                **LAUNCH_OPTIONS,
            )
    loss = partial.sum(1) / n_elements
    return loss if weight is None else weight * loss, grad


@_mse_op.register_fake
def _(model_output, x_start, t, schedule_table, target, weight, noise, seed, sample_indices, draw, grad_scale):
    loss = torch.empty(model_output.shape[:1], dtype=torch.float32, device=model_output.device)
    return loss, torch.empty_like(model_output)


def _mse_setup_context(ctx, inputs, output):
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.save_for_backward(grad, inputs[-1])


def _mse_backward(ctx, loss_grad, _):
    grad, grad_scale = ctx.saved_tensors
    upstream = (loss_grad / grad_scale).view(-1, *(1,) * (grad.ndim - 1))
    return ((upstream * grad.float()).to(grad.dtype), *[None] * 10)


_mse_op.register_autograd(_mse_backward, setup_context=_mse_setup_context)


def mse_ref(
    model_output: Tensor,
    x_start: Tensor,
    t: Tensor,
    schedule_table: Tensor,
    target: str,
    weight: Tensor | None,
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
            channels_last = is_channels_last(model_output)
            noise = normal_ref(seed, sample_indices, draw, STREAMS["train"], tuple(model_output.shape), channels_last)
        expected = expected + table_column_ref(schedule_table, t, 3, ndim) * noise.detach().float()
    error = model_output.float() - expected
    n_elements = math.prod(model_output.shape[1:])
    loss = (error.square().flatten(1).sum(1) if ndim > 1 else error.square()) / n_elements
    factor = grad_scale * (2 / max(n_elements, 1))
    if weight is not None:
        loss, factor = weight.detach() * loss, factor * weight.detach()
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
    check_training_inputs(x_start, t, schedule_table, noise, n_columns=4)
    batch, device = x_start.shape[0], x_start.device
    check_tensor("model_output", model_output, x_start.shape, FLOAT_DTYPES, device)
    if weight is not None:
        check_tensor("weight", weight, (batch,), (torch.float32,), device)
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
    arguments = (model_output, x_start, t, schedule_table, target, weight, noise, *counters, grad_scale)
    return _mse_op(*arguments) if use_triton(model_output) else mse_ref(*arguments)
