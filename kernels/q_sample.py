"""Forward noising, x_t = input_x0[t] * x_0 + input_eps[t] * eps, in one pass (Ho et al. 2020, eq. 4)."""

import torch
from torch import Tensor

from fastdiff.kernels.layout import is_channels_last
from fastdiff.kernels.philox import STREAMS, noise_counters, normal_ref

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_training_inputs(x_start: Tensor, t: Tensor, schedule_table: Tensor, columns: int) -> None:
    """Raise ValueError or TypeError unless the arguments that q_sample and mse share fit together."""
    if x_start.dtype not in (*FLOAT_DTYPES, torch.uint8):
        raise TypeError(f"x_start must be uint8, float32, float16 or bfloat16, got {x_start.dtype}")
    if x_start.ndim < 1:
        raise ValueError("x_start must be [B], [B, C] or [B, C, *spatial], got a scalar")
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"t must be int64 or int32, got {t.dtype}")
    if t.shape != x_start.shape[:1]:
        raise ValueError(f"t must be of shape [{x_start.shape[0]}], one timestep a sample, got {list(t.shape)}")
    if schedule_table.dtype != torch.float32:
        raise TypeError(f"schedule_table must be float32, got {schedule_table.dtype}")
    if schedule_table.ndim != 2 or schedule_table.shape[0] < 1 or schedule_table.shape[1] < columns:
        raise ValueError(f"schedule_table must be of shape [T, >= {columns}], got {list(schedule_table.shape)}")
    check_same_device(x_start, t=t, schedule_table=schedule_table)


def check_same_device(x_start: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is not on x_start's device."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x_start.device:
            raise ValueError(f"{name} must be on x_start's device {x_start.device}, got {tensor.device}")


def check_noise(noise: Tensor | None, x_start: Tensor) -> None:
    """Raise ValueError or TypeError unless noise is None or a float tensor like x_start."""
    if noise is None:
        return
    if noise.dtype not in FLOAT_DTYPES:
        raise TypeError(f"noise must be float32, float16 or bfloat16, got {noise.dtype}")
    if noise.shape != x_start.shape:
        raise ValueError(f"noise must have x_start's shape {list(x_start.shape)}, got {list(noise.shape)}")
    check_same_device(x_start, noise=noise)


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
    check_training_inputs(x_start, t, schedule_table, columns=2)
    check_noise(noise, x_start)
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
    return q_sample_ref(x_start, t, schedule_table, noise, *counters, out_dtype, channels_last)
