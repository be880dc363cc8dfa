"""mse, kernel and reference, against the weighted squared error and its gradient in float64."""

import shutil

import pytest
import torch

from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET
from fastdiff.kernels.mse import TARGETS, _mse_op, mse, mse_ref
from fastdiff.kernels.philox import normal_ref
from fastdiff.kernels.q_sample import q_sample

LAST = torch.channels_last
# bf16 stores truncate in the interpreter
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (torch.cuda.is_available() or not INTERPRET)
STEPS = 9
LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=LAST),
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "first half of 2C channels": lambda x: torch.cat([x, x], 1).to(memory_format=LAST)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs the interpreter or a GPU"
)


@pytest.fixture(autouse=True)
def _gradients_start_as_nan(monkeypatch):
    """An element that no kernel writes shows up."""
    empty_like = torch.empty_like
    monkeypatch.setattr(
        "fastdiff.kernels.mse.torch.empty_like",
        lambda x, **options: empty_like(x, **options).fill_(float("nan") if x.is_floating_point() else 0),
    )


@pytest.fixture
def table(device) -> torch.Tensor:
    """A schedule table with columns that mse must not read."""
    torch.manual_seed(0)
    table = torch.rand(STEPS, 4) * 2 - 1
    table[:, :2] = float("nan")
    return table.to(device)


def timesteps(batch: int, device) -> torch.Tensor:
    return (torch.arange(batch, device=device) * 5 + 2) % STEPS


def formula(model_output, x_start, t, table, target, weight, noise, grad_scale) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (-1, *[1] * (model_output.ndim - 1))
    x0 = x_start.double() * 2 / 255 - 1 if x_start.dtype == torch.uint8 else x_start.double()
    use_x_start, use_noise = TARGETS[target]
    expected = (
        use_x_start * table[t, 2].double().view(shape) * x0 + use_noise * table[t, 3].double().view(shape) * noise
    )
    model_output = model_output.detach().double().requires_grad_()
    error = (model_output - expected).square()
    loss = weight.double() * (error.flatten(1).mean(1) if error.ndim > 1 else error)
    (grad,) = torch.autograd.grad(loss.sum(), model_output)
    return loss.detach(), grad_scale * grad


def assert_matches(loss, grad, expected_loss, expected_grad, dtype, factor) -> None:
    # An error |target - m| < 12 takes about five float32 roundings of 2^-24 * 12 (4e-6 in all), so the mean square of
    # errors about 1 in size moves by 8e-6 at most; summing adds log2(n) roundings of 6e-8.
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    # the store rounds by eps / 2 of the value; fp16 has subnormals of 6e-8
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=0.51 * torch.finfo(dtype).eps + 2e-7, atol=max(4e-6 * factor, 6e-8)
    )


@pytest.mark.parametrize("noise_from", ["seed", "given"])
@pytest.mark.parametrize("pixels", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_match_the_formula(dtype, name, pixels, noise_from, table, device):
    torch.manual_seed(1)
    m = LAYOUTS[name](torch.randn(2, 3, 5, 7, device=device).to(dtype))
    x = torch.randn(2, 3, 5, 7, device=device)
    x = (x * 60 + 128).clamp(0, 255).byte() if pixels else x
    t, weight, key = timesteps(2, device), torch.tensor([0.5, 3.0], device=device), torch.tensor([4, 5], device=device)
    noise = normal_ref(key, key, key, 2, (2, 3, 5, 7))
    noise_of = {"noise": noise} if noise_from == "given" else {"seed": key, "sample_indices": key, "draw": key}
    loss, grad = mse(m, x, t, table, target="v_prediction", weight=weight, grad_scale=8.0, **noise_of)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert grad.stride() == torch.empty_like(m).stride()
    expected = formula(m, x, t, table, "v_prediction", weight, noise, 8.0)
    assert_matches(loss, grad, *expected, dtype, factor=8 * 3 * 2 / 105)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(4,), (3, 7), (2, 3, 11), (2, 2, 3, 4, 5), (1, 3, 41, 37)], ids=str)
def test_targets_and_other_shapes_match_the_formula(shape, target, table, device):
    torch.manual_seed(2)
    m, x = torch.randn(shape, device=device), torch.randn(shape, device=device)
    index, t = torch.arange(shape[0], device=device), timesteps(shape[0], device).int()
    loss, grad = mse(m, x, t, table, target=target, seed=3, draw=4)
    noise = normal_ref(index * 0 + 3, index, index * 0 + 4, 2, shape)
    expected = formula(m, x, t.long(), table, target, torch.ones(shape[0], device=device), noise, 1.0)
    n = m[0].numel()
    assert_matches(loss, grad, *expected, torch.float32, factor=2 / n)


def test_epsilon_target_is_the_noise_of_q_sample_and_never_reads_x_start(device):
    table = torch.tensor([[0.0, 1.0, 0.0, 1.0]], device=device)
    t, index = torch.zeros(3, dtype=torch.int64, device=device), torch.tensor([8, 2**31, 1], device=device)
    noise_of = {"seed": 5, "sample_indices": index, "draw": 6}
    noise = q_sample(torch.zeros(3, 3, 4, 6, device=device), t, table, **noise_of)
    unread = torch.full((3, 3, 4, 6), float("nan"), device=device)
    loss, grad = mse(noise, unread, t, table, target="epsilon", **noise_of)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_sample_target_needs_no_seed(table, device):
    m, x, t = torch.randn(2, 3, 4, 4, device=device), torch.randn(2, 3, 4, 4, device=device), timesteps(2, device)
    plain, seeded = mse(m, x, t, table, target="sample"), mse(m, x, t, table, target="sample", seed=3)
    assert torch.equal(plain[0], seeded[0])
    assert torch.equal(plain[1], seeded[1])


@needs_kernel
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_kernel_and_reference_are_bit_equal(name, table, device):
    torch.manual_seed(3)
    m = LAYOUTS[name](torch.randn(2, 3, 5, 7, device=device))
    index, scale = torch.tensor([7, 2**32 - 1], device=device), torch.tensor([3.0], device=device)
    x, weight = torch.randn(2, 3, 5, 7, device=device), torch.tensor([0.3, 1.7], device=device)
    arguments = (m, x, timesteps(2, device), table, "edm", weight, None, index, index, index, scale)
    (_, kernel), (_, reference) = _mse_op(*arguments), mse_ref(*arguments)
    assert torch.equal(kernel.contiguous().view(torch.int32), reference.contiguous().view(torch.int32))
    assert kernel.stride() == reference.stride()


def test_nan_stays_in_its_element_and_its_loss(table, device):
    m = torch.randn(3, 3, 4, 5, device=device)
    m[1, 2, 3, 4] = float("nan")
    loss, grad = mse(m, torch.randn(3, 3, 4, 5, device=device), timesteps(3, device), table, target="edm", seed=0)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(grad.isnan(), m.isnan())


@pytest.mark.parametrize("bad", [-1, STEPS, 2**31 - 1])
@pytest.mark.parametrize("target", TARGETS)
def test_timestep_out_of_range_poisons_its_sample_only(target, bad, table, device):
    t = torch.tensor([0, bad, STEPS - 1], device=device)
    m, x = torch.randn(3, 2, 4, 4, device=device), torch.randn(3, 2, 4, 4, device=device)
    loss, grad = mse(m, x, t, table, target=target, seed=0)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not grad[::2].isnan().any()


def test_empty_batch(table, device):
    m = torch.zeros(0, 3, 4, 4, device=device)
    loss, grad = mse(m, m, timesteps(0, device), table, target="edm", seed=0)
    assert loss.shape == (0,)
    assert grad.shape == m.shape


@pytest.mark.parametrize("grad_scale", [1.0, 1024.0, "tensor"])
def test_backward_of_the_loss(grad_scale, table, device):
    torch.manual_seed(4)
    m = torch.randn(3, 3, 4, 5, device=device).to(memory_format=LAST).requires_grad_()
    x, t, weight = (
        torch.randn(3, 3, 4, 5, device=device),
        timesteps(3, device),
        torch.tensor([1.0, 0.2, 4.0], device=device),
    )
    scale = torch.tensor(64.0, device=device) if grad_scale == "tensor" else grad_scale
    noise = torch.randn(3, 3, 4, 5, device=device)
    loss, grad = mse(m, x, t, table, target="v_prediction", weight=weight, noise=noise, grad_scale=scale)
    upstream = torch.tensor([1.0, -2.0, 0.5], device=device)
    loss.backward(upstream)
    _, expected = formula(m, x, t, table, "v_prediction", weight, noise, 1.0)
    assert not grad.requires_grad
    expected = expected * upstream.double().view(3, 1, 1, 1)
    torch.testing.assert_close(m.grad.double(), expected, rtol=1e-6, atol=4e-6 * 16 / 60)


def test_gradient_drives_a_model_as_the_backward_of_the_loss_does(table, device):
    torch.manual_seed(5)
    model = torch.nn.Conv2d(3, 3, 3, padding=1).to(device)
    x, t = torch.randn(2, 3, 6, 6, device=device), timesteps(2, device)
    output = model(x)
    _, grad = mse(output.detach(), x, t, table, target="epsilon", seed=1)
    output.backward(gradient=grad)
    fused = model.weight.grad.clone()
    model.zero_grad()
    # a sum hands the backward a gradient of stride 0
    mse(model(x), x, t, table, target="epsilon", seed=1)[0].sum().backward()
    torch.testing.assert_close(fused, model.weight.grad)


@needs_kernel
@pytest.mark.parametrize("target", ["epsilon", "sample", "edm"])
def test_op_is_registered_correctly(target, table, device, monkeypatch):
    # NaN-filled memory would differ from itself in opcheck's comparisons of compiled and eager calls
    monkeypatch.undo()
    m = torch.randn(2, 3, 4, 5, device=device).to(memory_format=LAST).requires_grad_()
    index, one = torch.arange(2, device=device), torch.ones(1, device=device)
    x = torch.randn(2, 3, 4, 5, device=device)
    torch.library.opcheck(_mse_op, (m, x, index, table, target, one.expand(2), None, index, index, index, one))


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))],
)
def test_compiles_as_one_graph(backend, table, device, monkeypatch):
    monkeypatch.undo()

    def objective(m, x, t):
        return mse(m, x, t, table, target="edm", seed=5, grad_scale=2.0)

    m = torch.randn(2, 3, 6, 5, device=device).to(memory_format=LAST)
    arguments = (m, torch.randint(0, 256, (2, 3, 6, 5), device=device).byte(), timesteps(2, device))
    loss, grad = torch.compile(objective, backend=backend, fullgraph=True)(*arguments)
    expected_loss, expected_grad = objective(*arguments)
    # the sum of the squares may run in another order
    torch.testing.assert_close(loss, expected_loss)
    assert torch.equal(grad, expected_grad)
    assert grad.is_contiguous(memory_format=LAST)


BAD = {
    "target": ({"target": "noise"}, ValueError, "target must be one of epsilon, sample, v_prediction.* got 'noise'"),
    "2C channels": (
        {"model_output": torch.zeros(2, 6, 4, 5)},
        ValueError,
        r"model_output must be .* shape \[2, 3, 4, 5\]",
    ),
    "output dtype": ({"model_output": torch.zeros(2, 3, 4, 5).long()}, ValueError, "model_output must .* got int64"),
    "table": (
        {"schedule_table": torch.zeros(9, 3)},
        ValueError,
        r"schedule_table must be of shape \[T, >= 4\], got \[9, 3\]",
    ),
    "weight shape": ({"weight": torch.zeros(3)}, ValueError, r"weight must be .* shape \[2\]"),
    "weight dtype": ({"weight": torch.zeros(2).double()}, ValueError, "weight must be .* got float64"),
    "grad_scale zero": ({"grad_scale": 0.0}, ValueError, "grad_scale must be a finite number other than 0, got 0.0"),
    "grad_scale nan": ({"grad_scale": float("nan")}, ValueError, "grad_scale must be .* got nan"),
    "grad_scale tensor": ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must be .* one element"),
    "no noise": ({"seed": None}, ValueError, "exactly one of noise and seed .* got neither"),
    "both": ({"target": "sample", "noise": torch.zeros(2, 3, 4, 5)}, ValueError, "exactly one .* got both"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changed, error, message = BAD[name]
    zeros = torch.zeros(2, 3, 4, 5)
    arguments = {"model_output": zeros, "x_start": zeros, "t": torch.zeros(2).long(), "target": "epsilon", "seed": 1}
    with pytest.raises(error, match=message):
        mse(**{**arguments, "schedule_table": torch.zeros(9, 4), **changed})
