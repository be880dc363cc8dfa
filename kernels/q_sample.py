"""Forward noising, x_t = input_x0[t] * x_0 + input_eps[t] * eps, in one pass (Ho et al. 2020, eq. 4)."""

import torch
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES, check_tensor
from fastdiff.kernels.dispatch import LAUNCH_OPTIONS, device_guard, tl, triton, use_triton
from fastdiff.kernels.layout import element_offset, empty, in_lane_order, is_channels_last, merge_strides
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


@triton.jit
def load_pixels(ptr, offset, mask):
    """x_start in float32; uint8 pixels become u * (2 / 255) - 1."""
    x = tl.load(ptr + offset, mask=mask, other=0).to(tl.float32)
    if ptr.dtype.element_ty == tl.uint8:
        x = x * (2 / 255) - 1.0
    return x


@triton.jit
def load_coefficient(table_ptr, t, num_train_timesteps, stride_t, stride_column, COLUMN: tl.constexpr):
    """schedule_table[t, COLUMN], or NaN where t is outside [0, T)."""
    inside = (t >= 0) & (t < num_train_timesteps)
    return tl.load(table_ptr + t * stride_t + COLUMN * stride_column, mask=inside, other=float("nan"))


@triton.jit
def _q_sample_kernel(
    x_ptr,
    noise_ptr,
    out_ptr,
    t_ptr,
    table_ptr,
    seed_ptr,
    sample_ptr,
    draw_ptr,
    num_train_timesteps,
    stride_t,
    stride_column,
    n_elements,
    n_blocks,
    channels,
    positions,
    inner,
    stride_ob,
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
    INPUTS_DENSE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    t = tl.load(t_ptr + b).to(tl.int64)
    input_x0 = load_coefficient(table_ptr, t, num_train_timesteps, stride_t, stride_column, 0)
    input_eps = load_coefficient(table_ptr, t, num_train_timesteps, stride_t, stride_column, 1)

    i = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    keep = i < n_elements
    # narrow and wide tensors side by side: four neighbours a thread for both
    i = tl.max_contiguous(tl.multiple_of(i, 4), 4)
    if CHANNELS_LAST:
        c, p = i % channels, i // channels
    else:
        c, p = i // positions, i % positions
    x_offset = i if INPUTS_DENSE else element_offset(c, p, inner, stride_xc, stride_xo, stride_xi)
    x = load_pixels(x_ptr + b * stride_xb, x_offset, keep)
    if noise_ptr is not None:
        noise_offset = i if INPUTS_DENSE else element_offset(c, p, inner, stride_nc, stride_no, stride_ni)
        noise = tl.load(noise_ptr + b * stride_nb + noise_offset, mask=keep, other=0.0).to(tl.float32)
    else:
        seed, sample, draw = noise_key(seed_ptr, sample_ptr, draw_ptr, b)
        if CHANNELS_LAST:
            noise = normal_block(block * (BLOCK_SIZE // 4), seed, sample, STREAM, draw, BLOCK_SIZE)
        else:
            noise = normal_at(p * channels + c, seed, sample, STREAM, draw)
    x_t = input_x0 * x + input_eps * noise
    tl.store(out_ptr + b * stride_ob + i, x_t.to(out_ptr.dtype.element_ty), mask=keep)


@torch.library.custom_op("fastdiff::q_sample", mutates_args=())
def _q_sample_op(
    x_start: Tensor,
    t: Tensor,
    schedule_table: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_indices: Tensor | None,
    draw: Tensor | None,
    out_dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    out = empty(x_start.shape, out_dtype, x_start.device, channels_last)
    if out.numel() == 0:
        return out
    inputs = [x_start] if noise is None else [x_start, noise]
    extent, strides = merge_strides(*inputs)
    n_elements = extent.channels * extent.positions
    n_blocks = triton.cdiv(n_elements, BLOCK_SIZE)
    with device_guard(out):
        _q_sample_kernel[(x_start.shape[0] * n_blocks,)](
            x_start,
            noise,
            out,
            t.contiguous(),
            schedule_table,
            seed,
            sample_indices,
            draw,
            schedule_table.shape[0],
            *schedule_table.stride(),
            n_elements,
            n_blocks,
            *extent,
            out.stride(0),
            *strides[0],
            *strides[-1],
            STREAM=STREAMS["train"],
            CHANNELS_LAST=channels_last,
            INPUTS_DENSE=all(in_lane_order(tensor, channels_last) for tensor in inputs),
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=num_warps(channels_last),
            **LAUNCH_OPTIONS,
        )
    return out


@_q_sample_op.register_fake
def _(x_start, t, schedule_table, noise, seed, sample_indices, draw, out_dtype, channels_last):
    return empty(x_start.shape, out_dtype, x_start.device, channels_last)


def _q_sample_setup_context(ctx, inputs, output):
    x_start, t, schedule_table, noise, *_ = inputs
    ctx.save_for_backward(t, schedule_table)
    ctx.dtypes = (x_start.dtype, None if noise is None else noise.dtype)


def _q_sample_backward(ctx, grad):
    t, schedule_table = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 9
    for argument, column, dtype in ((0, 0, ctx.dtypes[0]), (3, 1, ctx.dtypes[1])):
        if ctx.needs_input_grad[argument]:
            grads[argument] = (table_column_ref(schedule_table, t, column, grad.ndim) * grad.float()).to(dtype)
    return tuple(grads)


_q_sample_op.register_autograd(_q_sample_backward, setup_context=_q_sample_setup_context)


def check_training_inputs(
    x_start: Tensor, t: Tensor, schedule_table: Tensor, noise: Tensor | None, n_columns: int
) -> None:
    """Raise ValueError or TypeError unless the arguments that q_sample and mse share fit together."""
    if x_start.dtype not in (*FLOAT_DTYPES, torch.uint8):
        raise TypeError(f"x_start must be uint8, float32, float16 or bfloat16, got {x_start.dtype}")
    if x_start.ndim < 1:
        raise ValueError("x_start must be [B], [B, C] or [B, C, *spatial], got a scalar")
    check_tensor("t", t, x_start.shape[:1], (torch.int64, torch.int32), x_start.device)
    if schedule_table.ndim != 2 or schedule_table.shape[0] < 1 or schedule_table.shape[1] < n_columns:
        raise ValueError(f"schedule_table must be of shape [T, >= {n_columns}], got {list(schedule_table.shape)}")
    check_tensor("schedule_table", schedule_table, schedule_table.shape, (torch.float32,), x_start.device)
    if noise is not None:
        check_tensor("noise", noise, x_start.shape, FLOAT_DTYPES, x_start.device)


def table_column_ref(schedule_table: Tensor, t: Tensor, column: int, ndim: int) -> Tensor:
    """schedule_table[t, column] as [B, 1, ...] of ndim axes; NaN where t is outside [0, T)."""
    rows = schedule_table.shape[0]
    value = schedule_table[t.clamp(0, rows - 1).long(), column]
    value = torch.where((t >= 0) & (t < rows), value, float("nan"))
    return value.view(-1, *(1,) * (ndim - 1))


def pixels_ref(x_start: Tensor) -> Tensor:
    """x_start in float32; uint8 pixels become u * (2 / 255) - 1."""
    return x_start.float() * (2 / 255) - 1.0 if x_start.dtype == torch.uint8 else x_start.float()


def q_sample_ref(
    x_start: Tensor,
    t: Tensor,
    schedule_table: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_indices: Tensor | None,
    draw: Tensor | None,
    out_dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """`q_sample` in plain PyTorch; per-sample arrays int64 [B], or all None where noise is given."""
    if noise is None:
        assert seed is not None
        assert sample_indices is not None
        assert draw is not None
        noise = normal_ref(seed, sample_indices, draw, STREAMS["train"], tuple(x_start.shape), channels_last)
    a = table_column_ref(schedule_table, t, 0, x_start.ndim)
    b = table_column_ref(schedule_table, t, 1, x_start.ndim)
    x_t = (a * pixels_ref(x_start) + b * noise.float()).to(out_dtype)
    if not channels_last or x_t.ndim < 3:
        return x_t.contiguous()
    return x_t.movedim(1, -1).contiguous().movedim(-1, 1)


def q_sample(
    x_start: Tensor,
    t: Tensor,
    schedule_table: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_indices: Tensor | None = None,
    draw: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Noise a batch to its timesteps: x_t = schedule_table[t, 0] * x_start + schedule_table[t, 1] * eps, in float32.

    Differentiable in a floating-point x_start and in noise.

    Args:
        x_start: [B, C, *spatial], float32, float16 or bfloat16 of any strides, or uint8 pixels, u * (2 / 255) - 1.
        t: int64 or int32 [B] in [0, T). A value outside makes that sample NaN (raising would wait for the device).
        schedule_table: float32 [T, >= 2], `NoiseSchedule.training_table`.
        noise: eps in the shape of x_start; or else
        seed: int in [0, 2^63) or int64 [B]: eps is made in the kernel, from stream "train" of the noise contract.
        sample_indices: int64 [B], 0..B-1 by default; in training the sample's index in the data set.
        draw: int or int64 [B], 0 by default; in training the epoch.
        out_dtype: float32, float16 or bfloat16; by default that of x_start, float32 for pixels.
        memory_format: of the result: channels_last (for any number of spatial axes), contiguous_format, or
            preserve_format (channels-last if x_start is, else contiguous). The noise does not depend on it.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device; not exactly one of noise and seed.
    """
    check_training_inputs(x_start, t, schedule_table, noise, n_columns=2)
    if out_dtype is None:
        out_dtype = torch.float32 if x_start.dtype == torch.uint8 else x_start.dtype
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    if memory_format == torch.preserve_format:
        channels_last = is_channels_last(x_start)
    elif memory_format in (torch.channels_last, torch.channels_last_3d, torch.contiguous_format):
        channels_last = memory_format != torch.contiguous_format
    else:
        raise ValueError(
            f"memory_format must be channels_last, contiguous_format or preserve_format, got {memory_format}"
        )
    counters = noise_counters(noise, seed, sample_indices, draw, x_start.shape[0], x_start.device)
    arguments = (x_start, t, schedule_table, noise, *counters, out_dtype, channels_last)
    return _q_sample_op(*arguments) if use_triton(x_start) else q_sample_ref(*arguments)
