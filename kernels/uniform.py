"""Uniform 32-bit words of the noise contract, four a sample: timesteps, label dropout, flips, the order of the data."""

import torch
from torch import Tensor

from fastdiff.kernels.checks import check_tensor
from fastdiff.kernels.dispatch import LAUNCH_OPTIONS, device_guard, tl, triton, use_triton
from fastdiff.kernels.philox import STREAMS, per_sample, philox, philox_ref

# Two samples a thread, so that accesses are 16 bytes wide where n is a multiple of 16.
BLOCK_SIZE = 256


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, sample_ptr, draw_ptr, n, STREAM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    keep = i < n
    seed = tl.load(seed_ptr + i, mask=keep, other=0).to(tl.uint64)
    sample = tl.load(sample_ptr + i, mask=keep, other=0).to(tl.uint32)
    draw = tl.load(draw_ptr + i, mask=keep, other=0).to(tl.uint32)
    zero = sample * 0
    w0, w1, w2, w3 = philox(zero, draw, sample, zero + STREAM, seed)
    tl.store(out_ptr + i, w0.to(tl.int64), mask=keep)
    tl.store(out_ptr + n + i, w1.to(tl.int64), mask=keep)
    tl.store(out_ptr + 2 * n + i, w2.to(tl.int64), mask=keep)
    tl.store(out_ptr + 3 * n + i, w3.to(tl.int64), mask=keep)


@torch.library.custom_op("fastdiff::uniform_words", mutates_args=())
def _uniform_words_op(seed: Tensor, sample_indices: Tensor, draw: Tensor, stream: int) -> Tensor:
    n = sample_indices.shape[0]
    out = torch.empty((4, n), dtype=torch.int64, device=sample_indices.device)
    if n:
        with device_guard(out):
            _uniform_kernel[(triton.cdiv(n, BLOCK_SIZE),)](
                out, seed, sample_indices, draw, n, STREAM=stream, BLOCK_SIZE=BLOCK_SIZE, num_warps=4, **LAUNCH_OPTIONS
            )
    return out


@_uniform_words_op.register_fake
def _(seed, sample_indices, draw, stream):
    return sample_indices.new_empty((4, sample_indices.shape[0]))


def uniform_words_ref(seed: Tensor, sample_indices: Tensor, draw: Tensor, stream: int) -> Tensor:
    """The plain-PyTorch oracle of `uniform_words`; int64 [B] each, returns int64 [4, B]."""
    zero = torch.zeros_like(sample_indices)
    # the words are unsigned 32 bit: the kernel takes the low half of each index
    return torch.stack(philox_ref(zero, draw & 0xFFFFFFFF, sample_indices & 0xFFFFFFFF, zero + stream, seed))


def uniform_words(seed: int | Tensor, sample_indices: Tensor, *, stream: str, draw: int | Tensor) -> Tensor:
    """The four uniform words of (seed, sample, stream, draw), element 0, in one launch.

    Args:
        seed: int in [0, 2^63) or int64 [B].
        sample_indices: int64 [B].
        stream: a key of `STREAMS`.
        draw: int in [0, 2^32) or int64 [B].

    Returns:
        int64 [4, B] with values in [0, 2^32), bit-equal on every backend.

    Raises:
        ValueError, TypeError: an unknown stream; an int out of range; a tensor of another shape, dtype or device.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    batch, device = sample_indices.numel(), sample_indices.device
    check_tensor("sample_indices", sample_indices, (batch,), (torch.int64,), device)
    seed, draw = per_sample(seed, batch, device, "seed"), per_sample(draw, batch, device, "draw")
    arguments = (seed, sample_indices.contiguous(), draw, STREAMS[stream])
    return _uniform_words_op(*arguments) if use_triton(sample_indices) else uniform_words_ref(*arguments)
