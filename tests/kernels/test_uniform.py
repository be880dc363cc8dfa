"""Uniform words: bit-equal to the reference and to Philox itself, for any arguments that the contract allows."""

import pytest
import torch

from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET
from fastdiff.kernels.philox import STREAMS, philox_ref
from fastdiff.kernels.uniform import BLOCK_SIZE, _uniform_words_op, uniform_words, uniform_words_ref

LOW = 0xFFFFFFFF


def keys(batch, device):
    """A seed above 32 bits, indices and draws at both ends of their ranges."""
    seed = torch.arange(batch, device=device) * 2**61 // max(batch, 1) + 12345
    return [seed, LOW - torch.arange(batch, device=device), torch.arange(batch, device=device) * (LOW // max(batch, 1))]


@pytest.mark.parametrize("batch", [0, 1, 7, BLOCK_SIZE, BLOCK_SIZE + 3])
def test_words_are_bit_equal_to_the_reference(batch, device):
    seed, index, draw = keys(batch, device)
    words = uniform_words(seed, index, stream="order", draw=draw)
    assert words.dtype == torch.int64
    # on the CPU: a GPU must give the bits of the CPU
    assert torch.equal(words.cpu(), uniform_words_ref(*keys(batch, "cpu"), STREAMS["order"]))


def test_words_are_those_of_element_zero(device):
    index = torch.tensor([5, LOW], device=device)
    words = uniform_words(7, index, stream="timestep", draw=9)
    nine = torch.full_like(index, 9)
    expected = philox_ref(
        torch.zeros_like(index), nine, index, torch.full_like(index, 3), torch.tensor(7, device=device)
    )
    assert torch.equal(words, torch.stack(expected))


def test_strided_and_shifted_indices(device):
    seed, index, draw = keys(20, device)
    whole = uniform_words(seed, index, stream="augment", draw=draw)
    part = slice(1, None, 3)
    assert torch.equal(whole[:, part], uniform_words(seed[part], index[part], stream="augment", draw=draw[part]))


@pytest.mark.skipif(not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs a kernel")
def test_op_is_registered_correctly(device):
    torch.library.opcheck(_uniform_words_op, (*keys(5, device), 6))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stream": "flip"}, ValueError, "stream must be one of initial, step, train, .*, got 'flip'"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"draw": 2**32}, ValueError, r"draw must be in \[0, 2\^32\), got 4294967296"),
        ({"draw": 1.5}, TypeError, r"draw must be an int or an int64 tensor of shape \[3\], got float"),
        ({"sample_indices": torch.zeros(3)}, ValueError, "sample_indices must be a tensor of shape .* int64"),
        ({"sample_indices": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"sample_indices .* shape \[3, 1\]"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"seed": 0, "sample_indices": torch.arange(3), "stream": "order", "draw": 0, **changes}
    with pytest.raises(error, match=message):
        uniform_words(**arguments)
