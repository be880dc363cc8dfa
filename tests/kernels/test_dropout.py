"""Keyed dropout, kernel and reference: which elements it keeps, that the backward keeps the same, and its layouts."""

import itertools
import shutil

import pytest
import torch

from fastdiff.kernels import layout
from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET
from fastdiff.kernels.dropout import _dropout_op, dropout, dropout_ref
from fastdiff.kernels.philox import STREAMS, philox_ref

LAST = torch.channels_last
# bf16 stores truncate in the interpreter
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (torch.cuda.is_available() or not INTERPRET)
LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=LAST),
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1, 1, 1))[:, 1:-1, 2:-1, 1:-2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every other sample": lambda x: x.repeat_interleave(2, 0)[::2],
}
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs a kernel to compare"
)


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch):
    """An element that no kernel writes shows up."""
    monkeypatch.setattr(
        "fastdiff.kernels.dropout.empty",
        lambda *arguments, **options: layout.empty(*arguments, **options).fill_(float("nan")),
    )


def keys_of(batch: int, device) -> torch.Tensor:
    """Seeds above 32 bits, sample indices at the end of their range, epochs whose draws wrap."""
    number = torch.arange(batch, device=device)
    return torch.stack([number * 2**60 + 12345, 2**32 - 1 - number, number * (2**22 - 1) + 7], dim=1)


def kept_by_definition(shape: tuple[int, ...], p: float, keys: torch.Tensor, layer: int) -> torch.Tensor:
    """The contract, a word at a time: element e is p * C + c, word e % 4 of counter e // 4."""
    kept = torch.empty(shape, dtype=torch.bool)
    for b, c, *place in itertools.product(*map(range, shape)):
        position = 0
        for axis, value in enumerate(place):
            position = position * shape[2 + axis] + value
        e = position * shape[1] + c
        seed, sample, epoch = keys[b].cpu()
        draw = (int(epoch) * 1024 + layer) % 2**32
        counter = [torch.tensor(word) for word in (e // 4, draw, int(sample), STREAMS["dropout"])]
        kept[(b, c, *place)] = philox_ref(*counter, seed)[e % 4].item() >= round(p * 2**32)
    return kept


@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (3, 7), (2, 2, 2, 3, 2), (2, 1, 1, 1)], ids=str)
def test_the_mask_is_that_of_the_contract(shape, device):
    keys = keys_of(shape[0], device)
    out = dropout(torch.ones(shape, device=device), 0.3, keys, 5)
    kept = kept_by_definition(shape, 0.3, keys, 5)
    assert torch.equal(out.cpu() != 0, kept)
    # 1 / (1 - 0.3) in float32
    assert out.cpu()[kept].eq(torch.tensor(1 / 0.7)).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_layouts(dtype, name, device):
    torch.manual_seed(1)
    x = LAYOUTS[name](torch.randn(3, 6, 5, 7, device=device).to(dtype))
    keys = keys_of(3, device)
    out = dropout(x, 0.25, keys, 2)
    kept = dropout(torch.ones_like(x, dtype=torch.float32, memory_format=torch.contiguous_format), 0.25, keys, 2) != 0
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=LAST)
    # one product in float32, one rounding to the dtype
    expected = torch.where(kept, x.double() / 0.75, 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps + 2.0**-23, atol=2.0**-25)


@needs_kernel
@pytest.mark.parametrize("shape", [(4, 5), (6,), (2, 3, 33, 32), (2, 64, 9, 8), (1, 2, 3, 4, 5), (2, 5, 6)], ids=str)
@pytest.mark.parametrize("p", [0.0, 2**-32, 0.1, 0.5, 0.999, 1 - 2**-53])
def test_kernel_and_reference_are_bit_equal(shape, p, device):
    x, keys = torch.randn(shape, device=device), keys_of(shape[0], device)
    kernel, reference = _dropout_op(x, p, keys, 3), dropout_ref(x, p, keys, 3)
    assert torch.equal(kernel, reference)
    assert kernel.stride() == reference.stride()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty_batches_stay_empty(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    out = dropout(x, 0.5, keys_of(shape[0], device))
    out.sum().backward()
    assert out.shape == x.grad.shape == shape


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_and_the_mean_of_what_is_kept(p, device):
    x = torch.ones(16, 8, 16, 16, device=device)
    keys = torch.stack([torch.full((16,), 11), torch.arange(16), torch.zeros(16, dtype=torch.int64)], 1).to(device)
    kept = (dropout(x, p, keys) != 0).double()
    # n independent tosses: five standard deviations of their mean, sqrt(p (1 - p) / n)
    assert abs(kept.mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    per_sample = kept.flatten(1).mean(1)
    assert (per_sample - (1 - p)).abs().max() < 5 * (p * (1 - p) / (kept.numel() / 16)) ** 0.5


def test_masks_of_other_keys_are_independent(device):
    x, n = torch.ones(1, 8, 32, 32, device=device), 8 * 32 * 32
    first = dropout(x, 0.5, torch.tensor([[1, 2, 3]], device=device), 4) != 0
    for key, layer in (([9, 2, 3], 4), ([1, 9, 3], 4), ([1, 2, 9], 4), ([1, 2, 3], 9)):
        other = dropout(x, 0.5, torch.tensor([key], device=device), layer) != 0
        # two independent masks agree in half of the elements; five standard deviations of that share
        assert abs((first == other).double().mean().item() - 0.5) < 5 * (0.25 / n) ** 0.5
    shifted = first.permute(0, 2, 3, 1).flatten().roll(1)
    assert abs((first.permute(0, 2, 3, 1).flatten() == shifted).double().mean().item() - 0.5) < 5 * (0.25 / n) ** 0.5


def test_draws_wrap_at_32_bits(device):
    x = torch.ones(1, 4, 8, 8, device=device)
    masks = [dropout(x, 0.5, torch.tensor([[1, 2, epoch]], device=device), 7) for epoch in (5, 5 + 2**22, 6)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_batch_and_order_do_not_matter(device):
    x, keys = torch.randn(6, 4, 5, 3, device=device), keys_of(6, device)
    whole = dropout(x, 0.4, keys, 1)
    order = torch.tensor([4, 0, 5, 2, 1, 3], device=device)
    assert torch.equal(dropout(x[order], 0.4, keys[order], 1), whole[order])
    parts = [dropout(x[part], 0.4, keys[part], 1) for part in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", LAYOUTS)
def test_backward_keeps_what_the_forward_kept(name, device):
    x = torch.ones(3, 4, 5, 6, device=device, requires_grad=True)
    g = LAYOUTS[name](torch.rand(3, 4, 5, 6, device=device) + 1)
    out = dropout(x, 0.35, keys_of(3, device), 8)
    (grad,) = torch.autograd.grad(out, x, g)
    assert torch.equal(grad != 0, out != 0)
    # one product in float32
    torch.testing.assert_close(grad, torch.where(out != 0, g / 0.65, 0.0), rtol=2.0**-22, atol=0)


def test_gradient_of_a_sum_and_twice(device):
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    keys = keys_of(2, device)
    # a sum hands the backward a gradient of stride 0
    (grad,) = torch.autograd.grad((dropout(x, 0.5, keys) ** 2).sum(), x, create_graph=True)
    kept = (dropout(torch.ones_like(x), 0.5, keys) != 0).float()
    assert torch.equal(grad, x * kept * 8)
    (twice,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(twice, kept * 8)


@needs_kernel
def test_backward_of_the_kernel_saves_only_the_keys(device):
    x, keys = torch.randn(2, 3, 4, 4, device=device, requires_grad=True), keys_of(2, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        dropout(x, 0.5, keys)
    assert [value.shape for value in saved] == [keys.shape]


@needs_kernel
@pytest.mark.parametrize("name", ["channels_last", "crop"])
def test_op_is_registered_correctly(name, device):
    x = LAYOUTS[name](torch.randn(2, 3, 4, 5, device=device)).detach().requires_grad_()
    torch.library.opcheck(_dropout_op, (x, 0.3, keys_of(2, device), 1))


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))],
)
def test_compiles_as_one_graph_with_equal_bits(backend, device):
    def loss(x, keys):
        return (dropout(x, 0.5, keys, 3) * 2).square().sum()

    x, keys = torch.randn(2, 8, 6, 5, device=device).to(memory_format=LAST).requires_grad_(), keys_of(2, device)
    (eager,) = torch.autograd.grad(loss(x, keys), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend=backend, fullgraph=True)(x, keys), x)
    # p = 1/2: every product is exact but the square's
    assert torch.equal(compiled, eager)


def test_a_dropped_element_is_zero_whatever_it_was(device):
    x = torch.full((2, 3, 4, 5), float("inf"), device=device)
    out = dropout(x, 0.5, keys_of(2, device))
    assert set(out.unique().tolist()) == {0.0, float("inf")}


ONES = torch.ones(2, 3, 4, 4)
BAD = {
    "x dtype": ({"x": ONES.int()}, TypeError, "x must be float32, .* got torch.int32"),
    "x scalar": ({"x": torch.zeros(())}, ValueError, "x must be .* got a scalar"),
    "p of 1": ({"p": 1.0}, ValueError, r"p must be in \[0, 1\), got 1.0"),
    "p negative": ({"p": -0.1}, ValueError, r"p must be in \[0, 1\), got -0.1"),
    "p NaN": ({"p": float("nan")}, ValueError, r"p must be in \[0, 1\), got nan"),
    "layer": ({"layer": 1024}, ValueError, r"layer must be in \[0, 1024\), got 1024"),
    "keys dtype": ({"keys": torch.zeros(2, 3)}, ValueError, r"keys must be .* shape \[2, 3\] .* int64 .* got float32"),
    "keys shape": ({"keys": torch.zeros(2).long()}, ValueError, r"keys must be .* shape \[2, 3\] .* shape \[2\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changed, error, message = BAD[name]
    arguments = {"x": ONES, "p": 0.5, "keys": torch.zeros(2, 3, dtype=torch.int64), "layer": 0, **changed}
    with pytest.raises(error, match=message):
        dropout(**arguments)
