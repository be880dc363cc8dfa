"""q_sample, kernel and reference, against x_t = a x_0 + b eps in float64."""

import shutil

import pytest
import torch

from fastdiff.kernels import layout
from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET
from fastdiff.kernels.philox import normal_ref
from fastdiff.kernels.q_sample import _q_sample_op, q_sample, q_sample_ref

LAST, FIRST = torch.channels_last, torch.contiguous_format
# bf16 stores truncate in the interpreter
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (torch.cuda.is_available() or not INTERPRET)
STEPS = 9
LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=LAST),
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1, 1, 1))[:, 1:-1, 2:-1, 1:-2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "every other sample": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch):
    """An element that no kernel writes shows up."""
    monkeypatch.setattr(
        "fastdiff.kernels.q_sample.empty", lambda *arguments: layout.empty(*arguments).fill_(float("nan"))
    )


@pytest.fixture
def table(device) -> torch.Tensor:
    """A schedule table with columns that q_sample must not read."""
    torch.manual_seed(0)
    table = torch.rand(STEPS, 4)
    table[:, 2:] = float("nan")
    return table.to(device)


def timesteps(batch: int, device) -> torch.Tensor:
    return (torch.arange(batch, device=device) * 5 + 2) % STEPS


def formula(x_start, t, table, noise) -> torch.Tensor:
    a, b = (table[t, column].double().view(-1, *[1] * (x_start.ndim - 1)) for column in (0, 1))
    x_start = x_start.double() * 2 / 255 - 1 if x_start.dtype == torch.uint8 else x_start.double()
    return a * x_start + b * noise.double()


def assert_close(actual, expected, dtype) -> None:
    # |x0| < 5, |eps| < 7 and coefficients below 1: float32 rounds four times, pixels once more, by at most
    # 2^-24 of 12 each (4e-6); the store rounds by eps / 2 of the value
    torch.testing.assert_close(actual.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("noise_from", ["seed", "given"])
@pytest.mark.parametrize("memory_format", [LAST, FIRST], ids=["to_channels_last", "to_contiguous"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_images_match_the_formula(dtype, name, memory_format, noise_from, table, device):
    torch.manual_seed(1)
    x = torch.randn(3, 3, 5, 7, device=device)
    x = LAYOUTS[name]((x * 60 + 128).clamp(0, 255).byte() if dtype == torch.uint8 else x.to(dtype))
    t = timesteps(3, device)
    noise = normal_ref(*[torch.tensor([4, 5, 6], device=device)] * 3, 2, (3, 3, 5, 7))
    if noise_from == "given":
        out = q_sample(x, t, table, noise=LAYOUTS[name](noise), memory_format=memory_format)
        noise = LAYOUTS[name](noise)
    else:
        key = torch.tensor([4, 5, 6], device=device)
        out = q_sample(x, t, table, seed=key, sample_indices=key, draw=key, memory_format=memory_format)
    assert out.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert out.is_contiguous(memory_format=memory_format)
    assert_close(out, formula(x, t, table, noise), out.dtype)


@pytest.mark.parametrize("memory_format", [LAST, FIRST], ids=["to_channels_last", "to_contiguous"])
@pytest.mark.parametrize("shape", [(2,), (5, 7), (2, 3, 11), (2, 2, 3, 4, 5), (1, 3, 41, 37), (2, 1, 1, 1)], ids=str)
def test_other_shapes_match_the_formula(shape, memory_format, table, device):
    torch.manual_seed(2)
    x, t = torch.randn(shape, device=device), timesteps(shape[0], device).int()
    out = q_sample(x, t, table, seed=3, draw=4, memory_format=memory_format)
    index = torch.arange(shape[0], device=device)
    noise = normal_ref(index * 0 + 3, index, index * 0 + 4, 2, shape)
    assert_close(out, formula(x, t.long(), table, noise), torch.float32)
    ordered = out.movedim(1, -1) if memory_format == LAST and len(shape) > 1 else out
    assert ordered.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty_batches_stay_empty(shape, table, device):
    out = q_sample(torch.zeros(shape, device=device), timesteps(shape[0], device), table, seed=0)
    assert out.shape == shape


@pytest.mark.skipif(not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs a kernel to compare")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_kernel_and_reference_are_bit_equal(dtype, channels_last, table, device):
    x = (torch.rand(2, 3, 9, 8, device=device) * 255).to(dtype)
    index = torch.tensor([7, 2**32 - 1], device=device)
    arguments = (x, timesteps(2, device), table, None, index, index, index, torch.float32, channels_last)
    kernel, reference = _q_sample_op(*arguments), q_sample_ref(*arguments)
    assert torch.equal(kernel.view(torch.int32), reference.view(torch.int32))
    assert kernel.stride() == reference.stride()


def test_nan_stays_where_it_is(table, device):
    x = torch.randn(2, 3, 4, 5, device=device)
    x[1, 2, 3, 4] = float("nan")
    out = q_sample(x, timesteps(2, device), table, seed=0)
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize("bad", [-1, STEPS, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_timestep_out_of_range_poisons_its_sample_only(bad, dtype, table, device):
    t = torch.tensor([0, bad, STEPS - 1], dtype=dtype, device=device)
    out = q_sample(torch.randn(3, 2, 4, 4, device=device), t, table, seed=0)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not out[::2].isnan().any()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_pixels_are_written_in_the_asked_dtype(out_dtype, table, device):
    x = torch.arange(256, device=device).byte().view(1, 1, 16, 16).expand(2, 1, 16, 16)
    out = q_sample(x, timesteps(2, device), table, noise=torch.zeros(x.shape, device=device), out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_close(out, formula(x, timesteps(2, device), table, torch.zeros(x.shape, device=device)), out_dtype)


def test_preserve_format_follows_the_input(table, device):
    x, t = torch.randn(2, 3, 4, 5, device=device), timesteps(2, device)
    assert q_sample(x, t, table, seed=0, memory_format=torch.preserve_format).is_contiguous()
    last = q_sample(x.to(memory_format=LAST), t, table, seed=0, memory_format=torch.preserve_format)
    assert last.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("memory_format", [LAST, FIRST], ids=["channels_last", "contiguous"])
def test_gradients_are_the_coefficients(memory_format, table, device):
    torch.manual_seed(3)
    x, noise, g = (torch.randn(2, 3, 4, 5, device=device) for _ in range(3))
    x.requires_grad_()
    noise.requires_grad_()
    t = timesteps(2, device)
    q_sample(x, t, table, noise=noise, memory_format=memory_format).backward(g)
    for value, column in ((x, 0), (noise, 1)):
        # one rounding
        expected = table[t, column].double().view(-1, 1, 1, 1) * g.double()
        torch.testing.assert_close(value.grad.double(), expected, rtol=6e-8, atol=0)


def test_gradient_of_a_sum_and_of_a_half_precision_input(table, device):
    x = torch.randn(3, 2, 4, 4, dtype=torch.float16, device=device, requires_grad=True)
    t = torch.tensor([1, 2, STEPS], device=device)
    # a sum hands the backward a gradient of stride 0
    q_sample(x, t, table, seed=1, out_dtype=torch.float32).sum().backward()
    expected = table[t[:2], 0].half().view(2, 1, 1, 1).expand(2, 2, 4, 4)
    assert x.grad.dtype == torch.float16
    assert torch.equal(x.grad[:2], expected)
    assert x.grad[2].isnan().all()


@pytest.mark.skipif(not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs a kernel")
@pytest.mark.parametrize("noise_from", ["seed", "given"])
def test_op_is_registered_correctly(noise_from, table, device, monkeypatch):
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    index = torch.arange(2, device=device)
    noise = torch.randn(2, 3, 4, 5, device=device, requires_grad=True) if noise_from == "given" else None
    keys = [None] * 3 if noise_from == "given" else [index] * 3
    torch.library.opcheck(_q_sample_op, (x, index, table, noise, *keys, torch.float16, True))


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))],
)
def test_compiles_as_one_graph_with_equal_bits(backend, table, device):
    def noised(x, t):
        return q_sample(x, t, table, seed=5, out_dtype=torch.float32)

    x, t = torch.randint(0, 256, (2, 3, 6, 5), device=device).byte(), timesteps(2, device)
    compiled = torch.compile(noised, backend=backend, fullgraph=True)(x, t)
    assert torch.equal(compiled.contiguous().view(torch.int32), noised(x, t).contiguous().view(torch.int32))
    assert compiled.is_contiguous(memory_format=LAST)


BAD = {
    "both": ({"noise": torch.zeros(2, 3, 4, 5)}, ValueError, "exactly one of noise and seed .* got both"),
    "neither": ({"seed": None}, ValueError, "exactly one of noise and seed .* got neither"),
    "draw without seed": ({"seed": None, "noise": torch.zeros(2, 3, 4, 5), "draw": 1}, ValueError, "belong to seed"),
    "noise shape": (
        {"seed": None, "noise": torch.zeros(2, 3, 4)},
        ValueError,
        r"noise must be .* got float32 of shape",
    ),
    "noise dtype": ({"seed": None, "noise": torch.zeros(2, 3, 4, 5).double()}, ValueError, "noise must .* got float64"),
    "x_start dtype": ({"x_start": torch.zeros(2, 3, 4, 5).double()}, TypeError, "x_start must be uint8, float32"),
    "x_start scalar": ({"x_start": torch.zeros(())}, ValueError, "x_start must be .* got a scalar"),
    "t shape": ({"t": torch.zeros(3).long()}, ValueError, r"t must be .* shape \[2\] .* got int64 of shape \[3\]"),
    "t dtype": ({"t": torch.zeros(2)}, ValueError, "t must be .* int64, int32 .* got float32"),
    "table shape": ({"schedule_table": torch.zeros(9, 1)}, ValueError, r"schedule_table must be of shape \[T, >= 2\]"),
    "table dtype": ({"schedule_table": torch.zeros(9, 4).double()}, ValueError, "schedule_table must .* got float64"),
    "out dtype": ({"out_dtype": torch.uint8}, TypeError, "out_dtype must be float32, .* got torch.uint8"),
    "memory format": ({"memory_format": "NHWC"}, ValueError, "memory_format must be channels_last, .* got NHWC"),
    "seed": ({"seed": -3}, ValueError, "seed must be in"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changed, error, message = BAD[name]
    arguments = {"x_start": torch.zeros(2, 3, 4, 5), "t": torch.zeros(2).long(), "schedule_table": torch.zeros(9, 4)}
    with pytest.raises(error, match=message):
        q_sample(**{**arguments, "seed": 1, **changed})
