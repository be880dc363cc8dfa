"""Philox against its published vectors, and the normals: bit-equal to the reference, as accurate as they claim."""

import math

import pytest
import torch

from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET, tl, triton
from fastdiff.kernels.layout import is_channels_last
from fastdiff.kernels.philox import normal, normal_pair_ref, normal_ref, philox, philox_ref

LOW = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((LOW, LOW, LOW, LOW), (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "digits of pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
SHAPES = [
    (3, 2, 5, 7),
    (2, 3, 33, 32),
    (2, 3, 3, 2, 5),
    (2, 5, 6),
    (4, 9),
    (6,),
    (2, 1, 1, 1),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
]
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs the interpreter or a GPU"
)


@triton.jit
def _philox_kernel(out_ptr, counter_ptr, seed_ptr):
    lane = tl.arange(0, 4)
    zero = (lane * 0).to(tl.uint32)
    c0, c1 = zero + tl.load(counter_ptr).to(tl.uint32), zero + tl.load(counter_ptr + 1).to(tl.uint32)
    c2, c3 = zero + tl.load(counter_ptr + 2).to(tl.uint32), zero + tl.load(counter_ptr + 3).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, tl.load(seed_ptr).to(tl.uint64))
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(out_ptr + lane, word.to(tl.int64))


def known_answer(name: str, device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    counter, (k0, k1), expected = KNOWN_ANSWERS[name]
    key = k0 | k1 << 32
    seed = key - 2**64 if key >= 2**63 else key
    return torch.tensor(counter, device=device), torch.tensor([seed], device=device), list(expected)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(name, device):
    counter, seed, expected = known_answer(name, device)
    assert [word.item() for word in philox_ref(*counter, seed)] == expected


@needs_kernel
@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_kernel_gives_the_known_answers(name, device):
    counter, seed, expected = known_answer(name, device)
    out = torch.full((4,), -1, device=device)
    _philox_kernel[(1,)](out, counter, seed)
    assert out.tolist() == expected


def keys(batch: int, device) -> list[torch.Tensor]:
    """A seed above 32 bits, indices and draws at both ends of their ranges."""
    seed = torch.arange(batch, device=device) * 2**61 // max(batch, 1) + 12345
    return [seed, LOW - torch.arange(batch, device=device), torch.arange(batch, device=device) * (LOW // max(batch, 1))]


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normal_is_bit_equal_to_the_reference(shape, channels_last, device):
    z = normal(*keys(shape[0], device), 3, shape, channels_last)
    # on the CPU: a GPU must give the bits of the CPU
    expected = normal_ref(*keys(shape[0], "cpu"), 3, shape, channels_last)
    assert z.dtype == torch.float32
    assert z.numel() == 0 or z.stride() == expected.stride()
    assert torch.equal(z.cpu().view(torch.int32), expected.view(torch.int32))
    assert is_channels_last(z) if channels_last else z.is_contiguous()


def test_normal_pair_is_accurate_over_the_whole_range_of_words():
    generator = torch.Generator().manual_seed(1)
    w0, w1 = torch.randint(0, 2**32, (2, 300_000), generator=generator)
    w0[:2000], w0[2000:4000] = torch.arange(2000), LOW - torch.arange(2000)
    z0, z1 = normal_pair_ref(w0, w1)
    # the float32 uniform is part of the definition; everything after it is compared with float64
    u = (w0.to(torch.float32) + 0.5).double() / 2**32
    radius = torch.sqrt(-2 * torch.log(u))
    angle = ((w1 & 0x7FFFFF).double() / 2**23 - 0.5) * (math.pi / 2)
    cosine = torch.where(w1 >= 2**31, -1.0, 1.0) * torch.cos(angle)
    swap = (w1 & 2**30) != 0
    for z, side in ((z0, torch.where(swap, angle.sin(), cosine)), (z1, torch.where(swap, cosine, angle.sin()))):
        # polynomial of the logarithm 0.6e-6, Newton 0.4e-6, sine and cosine 0.1e-6, float32 roundings 0.6e-6
        torch.testing.assert_close(z.double(), radius * side, rtol=2e-6, atol=0)


def test_tail_reaches_its_largest_value_and_the_centre_is_finite():
    word = torch.tensor([0, 0, LOW, LOW])
    z0, z1 = normal_pair_ref(word, torch.tensor([2**22, 2**31 + 2**22, 0, 2**22]))
    # word 0 is u = 2^-33: radius sqrt(66 ln 2) = 6.7637, angle 0; the largest word rounds to u = 1: radius 0
    torch.testing.assert_close(torch.stack([z0, z1]).amax(), torch.tensor(math.sqrt(66 * math.log(2))).float())
    assert torch.stack([z0, z1]).abs().amax() > 6.6
    assert torch.equal(torch.hypot(z0, z1)[2:], torch.zeros(2))
