"""Dropout whose mask is made of (seed, sample index, epoch, layer, element): the same in any batch, on any backend.

Each element of a sample has one word of the noise contract's stream "dropout" (`fastdiff.kernels.philox`), in the
numbering of the noise, with draw = (epoch * 1024 + layer) mod 2^32. Nothing but the keys is kept for the backward pass,
which makes the mask again. Source: Srivastava et al. 2014, "Dropout", in the form that scales while training.
"""

import torch
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES, check_tensor
from fastdiff.kernels.dispatch import LAUNCH_OPTIONS, device_guard, tl, triton, use_triton
from fastdiff.kernels.layout import element_offset, empty, is_channels_last, merge_strides, sample_extent
from fastdiff.kernels.philox import BLOCK_SIZE, STREAMS, num_warps, philox, philox_ref

_DTYPES = (*FLOAT_DTYPES, torch.float64)
LAYERS = 1024  # draws of one epoch


@triton.jit
def word_block(first_group, seed, sample, stream, draw, BLOCK_SIZE: tl.constexpr):
    """[BLOCK_SIZE] uint32 words of the elements 4 * first_group onwards; each thread owns four of one counter."""
    group = (first_group + tl.arange(0, BLOCK_SIZE // 4)).to(tl.uint32)
    zero = group * 0
    w0, w1, w2, w3 = philox(group, zero + draw, zero + sample, zero + stream, seed)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_SIZE)


@triton.jit
def _dropout_kernel(
    x_ptr,
    out_ptr,
    keys_ptr,
    layer,
    scale,
    n_elements,
    n_blocks,
    channels,
    inner,
    stride_ob,
    stride_xb,
    stride_xc,
    stride_xo,
    stride_xi,
    THRESHOLD: tl.constexpr,
    LAYERS: tl.constexpr,
    STREAM: tl.constexpr,
    INPUT_DENSE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    seed = tl.load(keys_ptr + 3 * b).to(tl.uint64)
    sample = tl.load(keys_ptr + 3 * b + 1).to(tl.uint32)
    draw = (tl.load(keys_ptr + 3 * b + 2) * LAYERS + layer).to(tl.uint32)

    i = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = i < n_elements
    # narrow tensors too: four neighbours a thread, as its words are
    i = tl.max_contiguous(tl.multiple_of(i, 4), 4)
    offset = i if INPUT_DENSE else element_offset(i % channels, i // channels, inner, stride_xc, stride_xo, stride_xi)
    x = tl.load(x_ptr + b * stride_xb + offset, mask=inside, other=0.0).to(tl.float32)
    keep = word_block(block * (BLOCK_SIZE // 4), seed, sample, STREAM, draw, BLOCK_SIZE) >= THRESHOLD
    tl.store(out_ptr + b * stride_ob + i, tl.where(keep, x * scale, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastdiff::dropout", mutates_args=())
def _dropout_op(x: Tensor, p: float, keys: Tensor, layer: int) -> Tensor:
    out = empty(x.shape, x.dtype, x.device, channels_last=True)
    if out.numel() == 0:
        return out
    extent, (strides,) = merge_strides(x)
    n_elements = extent.channels * extent.positions
    n_blocks = triton.cdiv(n_elements, BLOCK_SIZE)
    with device_guard(out):
        _dropout_kernel[(x.shape[0] * n_blocks,)](
            x,
            out,
            keys.contiguous(),
            layer,
            1 / (1 - p),
            n_elements,
            n_blocks,
            extent.channels,
            extent.inner,
            out.stride(0),
            *strides,
            THRESHOLD=_threshold(p),
            LAYERS=LAYERS,
            STREAM=STREAMS["dropout"],
            INPUT_DENSE=is_channels_last(x),
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=num_warps(channels_last=True),
            **LAUNCH_OPTIONS,
        )
    return out


@_dropout_op.register_fake
def _(x, p, keys, layer):
    return empty(x.shape, x.dtype, x.device, channels_last=True)


def _dropout_setup_context(ctx, inputs, output):
    _, ctx.p, keys, ctx.layer = inputs
    ctx.save_for_backward(keys)


def _dropout_backward(ctx, grad):
    return _dropout_op(grad, ctx.p, *ctx.saved_tensors, ctx.layer), None, None, None


_dropout_op.register_autograd(_dropout_backward, setup_context=_dropout_setup_context)


def _threshold(p: float) -> int:
    """The least word that is kept; for a p within 2^-33 of 1 the largest word stays."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_ref(x: Tensor, p: float, keys: Tensor, layer: int) -> Tensor:
    """The plain-PyTorch oracle of `dropout`."""
    batch, channels, positions = sample_extent(x.shape)
    n_elements = channels * positions
    seed, sample, epoch = keys.view(batch, 3, 1).unbind(1)
    group = torch.arange((n_elements + 3) // 4, device=x.device).view(1, -1)
    low = 0xFFFFFFFF
    stream = torch.full_like(seed, STREAMS["dropout"])
    words = torch.stack(philox_ref(group, (epoch * LAYERS + layer) & low, sample & low, stream, seed), -1)
    keep = (words >= _threshold(p)).flatten(1)[:, :n_elements]
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    elements = x if x.ndim < 3 else x.movedim(1, -1)
    scaled = elements.to(arithmetic) * (1 / (1 - p))
    out = torch.where(keep.reshape(elements.shape), scaled, 0.0).to(x.dtype).contiguous()
    return out if x.ndim < 3 else out.movedim(-1, 1)


def dropout(x: Tensor, p: float, keys: Tensor, layer: int = 0) -> Tensor:
    """Zero each element with probability p and multiply the others by 1 / (1 - p), in float32; differentiable in x.

    Args:
        x: [B], [B, C] or [B, C, *spatial], float32, float16 or bfloat16 of any strides; float64 runs the reference.
        p: in [0, 1), taken to the next multiple of 2^-32.
        keys: int64 [B, 3]: of each sample the seed in [0, 2^63), its index in [0, 2^32) and the epoch in [0, 2^22);
            epochs further apart than that share masks.
        layer: which dropout of the network this is, in [0, 1024).

    Returns:
        Tensor of the shape and dtype of x, channels-last for any number of spatial axes. The mask depends on a sample's
        key, the layer and the element only, and is the same bit for bit on every backend.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device, or out of range. Keys are not read.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError("x must be [B], [B, C] or [B, C, *spatial], got a scalar")
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    if not 0 <= layer < LAYERS:
        raise ValueError(f"layer must be in [0, {LAYERS}), got {layer}")
    check_tensor("keys", keys, (x.shape[0], 3), (torch.int64,), x.device)
    kernel = use_triton(x) and x.dtype != torch.float64
    return _dropout_op(x, p, keys, layer) if kernel else dropout_ref(x, p, keys, layer)
