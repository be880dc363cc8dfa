"""Which counter a noise value comes from, as a public function: the noise contract."""

import torch
from torch import Tensor

from fastdiff.device import existing_device
from fastdiff.kernels.philox import STREAMS, per_sample, sample_index
from fastdiff.kernels.philox import normal as _normal


def normal(
    shape: tuple[int, ...],
    *,
    seed: int | Tensor,
    sample_indices: Tensor | None = None,
    stream: str = "step",
    draw: int | Tensor = 0,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Standard normals that depend on (seed, sample index, stream, draw, element) and on nothing else.

    The same arguments give the same bits on CPU and GPU, in any batch, order and memory format.

    Args:
        shape: [B], [B, C] or [B, C, *spatial].
        seed: int in [0, 2^63), or int64 [B] with one seed a sample.
        sample_indices: int64 [B], values in [0, 2^32); 0..B-1 by default.
        stream: what the noise is for, a key of `fastdiff.kernels.philox.STREAMS`.
        draw: int or int64 [B] in [0, 2^32): how many draws of this stream the sample has made before.
        device: where to make it; by default that of a tensor argument, else the CPU.
        memory_format: torch.channels_last (the default; for any number of spatial axes) or torch.contiguous_format.

    Returns:
        float32 tensor of the shape.

    Raises:
        ValueError: an unknown stream, a seed or draw out of range, per-sample tensors of another shape or dtype.
    """
    if len(shape) < 1 or any(size < 0 for size in shape):
        raise ValueError(f"shape must be [B], [B, C] or [B, C, *spatial] with sizes >= 0, got {tuple(shape)}")
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    if memory_format not in (None, torch.channels_last, torch.channels_last_3d, torch.contiguous_format):
        raise ValueError(f"memory_format must be channels_last or contiguous_format, got {memory_format}")
    if device is None:
        tensors = [value for value in (sample_indices, seed, draw) if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
    device = existing_device(device)
    batch = shape[0]
    for name, value, limit in (("seed", seed, 2**63), ("sample_indices", sample_indices, 2**32), ("draw", draw, 2**32)):
        if isinstance(value, Tensor) and value.dtype == torch.int64:
            _check_range(name, value, limit)
    return _normal(
        per_sample(seed, batch, device, "seed"),
        sample_index(sample_indices, batch, device),
        per_sample(draw, batch, device, "draw"),
        STREAMS[stream],
        tuple(shape),
        memory_format != torch.contiguous_format,
    )


def _check_range(name: str, value: Tensor, limit: int) -> None:
    """Raise for values outside [0, limit), where looking costs no synchronisation and no break of a traced graph."""
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in [0, {limit}), got {low if low < 0 else high}")
