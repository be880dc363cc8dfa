"""Counter-based normals that are bit-equal on every backend: Philox4x32-10 and a Box-Muller of + - *.

A value depends on (seed, sample index, stream, draw, element) only: key = the two words of the seed, counter =
(element // 4, draw, sample index, stream), word = element % 4. Words 0 and 1 make the normals of elements 4g and
4g + 1, words 2 and 3 those of 4g + 2 and 4g + 3.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The normals take integer operations and
float32 + - * only, none contracted, so IEEE 754 fixes every bit; logarithm, square root, sine and cosine are minimax
polynomials and Newton steps, accurate to 2e-6 together, which moves no statistic of fewer than 1e11 draws.
"""

import torch
from torch import Tensor

from fastdiff.kernels.checks import check_tensor
from fastdiff.kernels.dispatch import LAUNCH_OPTIONS, device_guard, tl, triton, use_triton
from fastdiff.kernels.layout import empty, is_channels_last, merge_strides, sample_extent

STREAMS = {
    "initial": 0,
    "step": 1,
    "train": 2,
    "timestep": 3,
    "augment": 4,
    "label_dropout": 5,
    "order": 6,
    "dropout": 7,
}

# 16 elements a thread: the key schedule and the addresses are shared by four Philox calls (q_sample on sm_90: 49 SASS
# instructions an element, 53 with 1024).
BLOCK_SIZE = 2048


def num_warps(channels_last: bool) -> int:
    """Warps of a program. A lane that makes its own Philox call holds more: 16 elements a thread would spill."""
    return 4 if channels_last else 8


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10: four uint32 words of a counter (uint32) under a 64-bit key, one wide multiply a product."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product_a = c0.to(tl.uint64) * 0xD2511F53
        product_b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_b.to(tl.uint32)
        c3 = product_a.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal_pair(w0, w1):
    """Two independent N(0, 1) values of two uint32 words (Box-Muller), accurate to 2e-6 of their size; |z| <= 6.77."""
    # u = (w0 + 1/2) / 2^32 in (0, 1] is 2^e * (1 - g) with 1 - g in [sqrt(1/2), sqrt(2)); `exponent` holds e * 2^23
    bits = (w0.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    exponent = (bits - 0x4F3504F3) & -0x800000
    g = 1.0 - (bits - 0x10000000 - exponent).to(tl.float32, bitcast=True)
    # h = -2 log(u) * 15.5094008, a minimax polynomial of relative error 1.1e-6
    p = g * 3.69002911 + 5.79054448
    p = p * g + 6.35771574
    p = p * g + 7.72670416
    p = p * g + 10.3337614
    p = p * g + 15.509746
    p = p * g + 31.0188318
    h = p * g - exponent.to(tl.float32) * 2.56307064e-06
    # radius = sqrt(-2 log(u)) = h * y: two Newton steps towards y ~ 1 / sqrt(h) from an integer first guess. Their
    # constants balance the errors around zero (3.2e-7 in the end); the factor in h absorbs the scale that this leaves.
    y = (0x5EE00BB8 - (h.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    y = y * (1.1951952 - (h * y) * y)
    y = y * (0.7578263 - (h * y) * y)
    radius = h * y
    # the angle is a quarter turn in [-pi/4, pi/4) from the low 23 bits; the two high bits pick quadrant and sign
    a = ((w1 & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    t = a * a
    sine = a * (1.5707963 + t * (-0.64596346 + t * (0.07968003 + t * -0.0046016579)))
    cosine = 1.0 + t * (-1.233698 + t * (0.25360636 + t * -0.02042625))
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ (w1 & 0x80000000)).to(tl.float32, bitcast=True)
    swap = (w1 & 0x40000000) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def normal_block(first_group, seed, sample, stream, draw, BLOCK_SIZE: tl.constexpr):
    """[BLOCK_SIZE] normals of the elements 4 * first_group onwards; each thread owns four neighbours of one counter."""
    group = (first_group + tl.arange(0, BLOCK_SIZE // 4)).to(tl.uint32)
    zero = group * 0
    w0, w1, w2, w3 = philox(group, zero + draw, zero + sample, zero + stream, seed)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BLOCK_SIZE)


@triton.jit
def normal_at(element, seed, sample, stream, draw):
    """Normals of arbitrary elements, one Philox call each: for lanes that do not walk in canonical order."""
    group = (element >> 2).to(tl.uint32)
    zero = group * 0
    w0, w1, w2, w3 = philox(group, zero + draw, zero + sample, zero + stream, seed)
    upper = (element & 2) != 0
    z0, z1 = normal_pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, z1, z0)


@triton.jit
def noise_key(seed_ptr, sample_ptr, draw_ptr, b):
    """(seed uint64, sample uint32, draw uint32) of sample b from its int64 per-sample arrays."""
    seed = tl.load(seed_ptr + b).to(tl.uint64)
    return seed, tl.load(sample_ptr + b).to(tl.uint32), tl.load(draw_ptr + b).to(tl.uint32)


@triton.jit
def _normal_kernel(
    out_ptr,
    seed_ptr,
    sample_ptr,
    draw_ptr,
    n_elements,
    n_blocks,
    channels,
    positions,
    inner,
    stride_ob,
    stride_oc,
    stride_oo,
    stride_oi,
    STREAM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    seed, sample, draw = noise_key(seed_ptr, sample_ptr, draw_ptr, b)
    i = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    out_ptr += b * stride_ob
    if CHANNELS_LAST:
        z = normal_block(block * (BLOCK_SIZE // 4), seed, sample, STREAM, draw, BLOCK_SIZE)
        tl.store(out_ptr + tl.max_contiguous(tl.multiple_of(i, 4), 4), z, mask=i < n_elements)
    else:
        c, p = i // positions, i % positions
        z = normal_at(p * channels + c, seed, sample, STREAM, draw)
        offset = c.to(tl.int64) * stride_oc + (p // inner) * stride_oo + (p % inner) * stride_oi
        tl.store(out_ptr + offset, z, mask=i < n_elements)


@torch.library.custom_op("fastdiff::philox_normal", mutates_args=())
def _normal_op(
    seed: Tensor, sample_indices: Tensor, draw: Tensor, stream: int, shape: list[int], channels_last: bool
) -> Tensor:
    out = empty(tuple(shape), torch.float32, seed.device, channels_last)
    batch, channels, positions = sample_extent(out.shape)
    n_elements = channels * positions
    if out.numel() == 0:
        return out
    extent, (strides,) = merge_strides(out)
    n_blocks = triton.cdiv(n_elements, BLOCK_SIZE)
    with device_guard(out):
        _normal_kernel[(batch * n_blocks,)](
            out,
            seed,
            sample_indices,
            draw,
            n_elements,
            n_blocks,
            *extent,
            *strides,
            STREAM=stream,
            CHANNELS_LAST=is_channels_last(out),
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=num_warps(is_channels_last(out)),
            **LAUNCH_OPTIONS,
        )
    return out


@_normal_op.register_fake
def _(seed, sample_indices, draw, stream, shape, channels_last):
    return empty(tuple(shape), torch.float32, seed.device, channels_last)


def philox_ref(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 in plain PyTorch: int64 tensors holding uint32 words, broadcast together; seed int64."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves exact
        product_a, product_b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((product_b >> 32) & low) ^ c1 ^ k0, ((product_a >> 32) & low) ^ c3 ^ k1
        c1, c3 = product_b & low, product_a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def normal_pair_ref(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """`normal_pair` in plain PyTorch, operation by operation, from int64 words."""
    bits = (w0.to(torch.float32) + 0.5).view(torch.int32)
    exponent = (bits - 0x4F3504F3) & -0x800000
    g = 1.0 - (bits - 0x10000000 - exponent).view(torch.float32)
    p = g * 3.69002911 + 5.79054448
    for coefficient in (6.35771574, 7.72670416, 10.3337614, 15.509746, 31.0188318):
        p = p * g + coefficient
    h = p * g - exponent.to(torch.float32) * 2.56307064e-06
    y = (0x5EE00BB8 - (h.view(torch.int32) >> 1)).view(torch.float32)
    y = y * (1.1951952 - (h * y) * y)
    y = y * (0.7578263 - (h * y) * y)
    radius = h * y
    a = ((w1 & 0x007FFFFF) | 0x3F800000).to(torch.int32).view(torch.float32) - 1.5
    t = a * a
    sine = a * (1.5707963 + t * (-0.64596346 + t * (0.07968003 + t * -0.0046016579)))
    cosine = 1.0 + t * (-1.233698 + t * (0.25360636 + t * -0.02042625))
    cosine = torch.where(w1 > 0x7FFFFFFF, -cosine, cosine)
    swap = (w1 & 0x40000000) != 0
    return radius * torch.where(swap, sine, cosine), radius * torch.where(swap, cosine, sine)


def normal_ref(
    seed: Tensor,
    sample_indices: Tensor,
    draw: Tensor,
    stream: int | Tensor,
    shape: tuple[int, ...],
    channels_last: bool = True,
) -> Tensor:
    """The plain-PyTorch oracle of `normal`; per-sample arrays int64 [B], which stream may be too."""
    batch, channels, positions = sample_extent(shape)
    n_elements = channels * positions
    group = torch.arange((n_elements + 3) // 4, device=seed.device)
    c1, c2, key = (value.view(batch, 1) for value in (draw, sample_indices, seed))
    c3 = stream.view(batch, 1) if isinstance(stream, Tensor) else torch.full_like(c1, stream)
    # the words are unsigned 32 bit: the kernel takes the low half of each index
    words = philox_ref(group.view(1, -1), c1 & 0xFFFFFFFF, c2 & 0xFFFFFFFF, c3, key)
    z = torch.stack([*normal_pair_ref(words[0], words[1]), *normal_pair_ref(words[2], words[3])], -1)
    z = z.flatten(1)[:, :n_elements].contiguous()
    if len(shape) < 3:
        return z.reshape(shape)
    z = z.reshape(batch, *shape[2:], channels).movedim(-1, 1)
    return z if channels_last else z.contiguous()


def per_sample(value: int | Tensor, batch: int, device: torch.device, name: str) -> Tensor:
    """An int64 [batch] tensor on the device from an int or such a tensor.

    Raises:
        TypeError: neither an int nor a tensor.
        ValueError: an int outside [0, 2^63) for seed or [0, 2^32) otherwise; a tensor of another shape, dtype, device.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value, (batch,), (torch.int64,), device)
        return value.contiguous()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor of shape [{batch}], got {type(value).__name__}")
    bits = 63 if name == "seed" else 32
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name} must be in [0, 2^{bits}), got {value}")
    return torch.full((batch,), value, dtype=torch.int64, device=device)


def sample_index(sample_indices: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The per-sample index of the noise contract: 0..B-1 unless given."""
    if sample_indices is None:
        return torch.arange(batch, device=device)
    return per_sample(sample_indices, batch, device, "sample_indices")


def noise_counters(
    noise: Tensor | None,
    seed: int | Tensor | None,
    sample_indices: Tensor | None,
    draw: int | Tensor | None,
    batch: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """(seed, sample_indices, draw), int64 [batch] each, of a kernel that takes noise or seed; all None for noise.

    Raises:
        ValueError: not exactly one of noise and seed, or a value that `per_sample` refuses.
    """
    if (noise is None) == (seed is None):
        raise ValueError(f"exactly one of noise and seed must be given, got {'neither' if noise is None else 'both'}")
    if seed is None:
        if sample_indices is not None or draw is not None:
            raise ValueError("sample_indices and draw belong to seed, got them together with noise")
        return None, None, None
    return (
        per_sample(seed, batch, device, "seed"),
        sample_index(sample_indices, batch, device),
        per_sample(0 if draw is None else draw, batch, device, "draw"),
    )


def normal(
    seed: Tensor, sample_indices: Tensor, draw: Tensor, stream: int, shape: tuple[int, ...], channels_last: bool = True
) -> Tensor:
    """Standard normals of the noise contract.

    Args:
        seed, sample_indices, draw: int64 [B] on the device the noise is wanted on.
        stream: one of `STREAMS`' values.
        shape: [B], [B, C] or [B, C, *spatial].
        channels_last: memory order of the result; the values do not depend on it.

    Returns:
        float32 tensor of the shape, bit-equal on every backend.
    """
    if use_triton(seed):
        return _normal_op(seed, sample_indices, draw, stream, list(shape), channels_last)
    return normal_ref(seed, sample_indices, draw, stream, shape, channels_last)
