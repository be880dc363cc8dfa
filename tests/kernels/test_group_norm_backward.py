"""The gradients of group_norm_silu, kernels and reference, against autograd of its formula in float64."""

import dataclasses
import shutil

import pytest
import torch
from group_norm_formula import Inputs, assert_gradients, make_inputs

from fastdiff.kernels import group_norm, group_norm_backward
from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET
from fastdiff.kernels.group_norm import _group_norm_silu_op, group_norm_silu, group_norm_silu_ref
from fastdiff.kernels.group_norm_backward import group_norm_silu_backward_op

# bf16 stores truncate in the interpreter
HALF_DTYPES = [torch.float16] + [torch.bfloat16] * (torch.cuda.is_available() or not INTERPRET)
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs the interpreter or a GPU"
)
SHAPES = {
    "1 channel a group": ((2, 8, 5, 7), 8),
    "4": ((2, 32, 6, 6), 8),
    "10": ((1, 30, 8, 9), 3),
    "40, one group": ((1, 40, 4, 9), 1),
    "3, odd": ((2, 15, 11, 3), 5),
    "no spatial axes": ((3, 12), 3),
    "three": ((1, 12, 3, 5, 4), 3),
}
FEATURES = {
    "plain": {},
    "no SiLU": {"silu": False},
    "channel bias": {"channel_bias": "C"},
    "channel bias of each sample": {"channel_bias": "B, C"},
    "scale and shift": {"scaled": True},
    "everything": {"channel_bias": "B, C", "scaled": True},
}


def gradients_of(inputs: Inputs, dy: torch.Tensor, function=group_norm_silu) -> dict[str, torch.Tensor]:
    leaves = inputs.requiring_grad()
    positional, keywords = leaves.arguments()
    y = function(*positional, **keywords)
    return dict(zip(leaves.tensors(), torch.autograd.grad(y, list(leaves.tensors().values()), dy)))


def gradient_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).copy_(torch.randn(x.shape, device=x.device))


@pytest.mark.parametrize("name", SHAPES)
def test_groups_of_any_size_match_the_formula(name, form, nan_outputs, device):
    inputs = make_inputs(*SHAPES[name], device)
    dy = gradient_like(inputs.x)
    gradients = gradients_of(inputs, dy)
    assert gradients["x"].stride() == inputs.x.stride()
    assert_gradients(gradients, inputs, dy)


@pytest.mark.parametrize("name", FEATURES)
def test_features_match_the_formula(name, form, nan_outputs, device):
    inputs = make_inputs((2, 20, 5, 7), 2, device, **FEATURES[name])
    dy = gradient_like(inputs.x)
    assert_gradients(gradients_of(inputs, dy), inputs, dy)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_matches_the_formula(dtype, form, nan_outputs, device):
    inputs = make_inputs((2, 20, 5, 7), 2, device, dtype=dtype, **FEATURES["everything"])
    dy = gradient_like(inputs.x)
    assert_gradients(gradients_of(inputs, dy), inputs, dy)


UPSTREAM = {
    "of a sum": lambda dy: dy[:1, :1, :1, :1].expand(dy.shape),
    "contiguous": lambda dy: dy.contiguous(),
    "transposed": lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
    "one sample for all": lambda dy: dy[:1].expand(dy.shape),
    "channels of a wider tensor": lambda dy: torch.cat([dy, dy], 1).to(memory_format=torch.channels_last)[:, :12],
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_gradients_of_any_strides(name, form, nan_outputs, device):
    inputs = make_inputs((2, 12, 5, 7), 3, device)
    dy = UPSTREAM[name](gradient_like(inputs.x))
    assert_gradients(gradients_of(inputs, dy), inputs, dy)


@pytest.mark.parametrize("wanted", ["x", "weight", "channel_bias", "scale"])
def test_each_gradient_alone(wanted, form, device):
    inputs = make_inputs((2, 12, 5, 5), 3, device, channel_bias="C", scaled=True)
    dy = gradient_like(inputs.x)
    leaf = getattr(inputs, wanted).detach().clone(memory_format=torch.preserve_format).requires_grad_()
    positional, keywords = dataclasses.replace(inputs, **{wanted: leaf}).arguments()
    (gradient,) = torch.autograd.grad(group_norm_silu(*positional, **keywords), leaf, dy)
    assert_gradients({wanted: gradient}, inputs, dy)


def test_halves_of_a_projection_get_their_gradient(form, device):
    inputs = make_inputs((2, 12, 5, 5), 3, device)
    dy = gradient_like(inputs.x)
    projection = torch.randn(2, 24, device=device, requires_grad=True)
    scale, shift = projection.chunk(2, dim=1)
    positional, keywords = dataclasses.replace(inputs, scale=scale, shift=shift).arguments()
    group_norm_silu(*positional, **keywords).backward(dy)
    halves = dataclasses.replace(inputs, scale=scale.detach(), shift=shift.detach())
    assert_gradients(dict(zip(("scale", "shift"), projection.grad.chunk(2, dim=1))), halves, dy)


def test_nan_poisons_exactly_its_group(form, device):
    inputs = make_inputs((2, 30, 7, 9), 3, device)
    dy = gradient_like(inputs.x)
    dy[1, 14, 3, 4] = float("nan")
    gradients = gradients_of(inputs, dy)
    poisoned = torch.zeros(2, 30, dtype=torch.bool, device=device)
    poisoned[1, 10:20] = True
    assert torch.equal(gradients["x"].isnan(), poisoned[:, :, None, None].expand(2, 30, 7, 9))
    assert gradients["weight"].isnan().nonzero().flatten().tolist() == [14]


@needs_kernel
def test_a_sample_does_not_depend_on_its_batch_nor_on_the_call(form, device, monkeypatch):
    inputs = make_inputs((2, 20, 5, 7), 2, device, channel_bias="B, C", scaled=True)
    for module, tensors in ((group_norm, 1), (group_norm_backward, 2)):
        plan = module.choose_plan(2, 35, 20, 2, 4, 1, tensors)
        monkeypatch.setattr(module, "choose_plan", lambda *arguments, plan=plan: plan)
    dy = gradient_like(inputs.x)
    together, again = gradients_of(inputs, dy), gradients_of(inputs, dy)
    assert all(torch.equal(together[name], again[name]) for name in together)
    names = ("x", "channel_bias", "scale", "shift")
    alone = dataclasses.replace(inputs, **{name: getattr(inputs, name)[1:2] for name in names})
    gradients = gradients_of(alone, dy[1:2])
    assert all(torch.equal(gradients[name], together[name][1:2]) for name in names)


def test_empty_batch(device):
    inputs = make_inputs((0, 12, 5, 5), 3, device, channel_bias="B, C", scaled=True)
    gradients = gradients_of(inputs, inputs.x)
    assert gradients["x"].shape == (0, 12, 5, 5)
    assert not gradients["weight"].any()


@needs_kernel
def test_second_derivatives_are_refused(device):
    inputs = make_inputs((1, 12, 5, 5), 3, device).requiring_grad()
    positional, keywords = inputs.arguments()
    y = group_norm_silu(*positional, **keywords)
    (dx,) = torch.autograd.grad(y.sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@needs_kernel
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_op_is_registered_correctly(name, form, device):
    inputs = make_inputs((2, 12, 5, 4), 3, device, **FEATURES[name])
    (x, num_groups, weight, bias, eps), rows = inputs.arguments()
    silu = rows.pop("silu")
    _, mean, rstd = _group_norm_silu_op(x, num_groups, weight, bias, eps, *rows.values(), silu)
    wants = rows["channel_bias"] is not None
    arguments = (x, x, num_groups, weight, bias, *rows.values(), mean, rstd, silu, wants)
    torch.library.opcheck(group_norm_silu_backward_op, arguments)


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))],
)
def test_compiles_as_one_graph(backend, device):
    inputs = make_inputs((2, 12, 6, 5), 3, device, channel_bias="B, C", scaled=True)
    dy = gradient_like(inputs.x)

    def function(*positional, **keywords):
        return group_norm_silu(*positional, **keywords)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    assert_gradients(gradients_of(inputs, dy, compiled), inputs, dy)


def test_reference_matches_the_formula(device):
    for options in FEATURES.values():
        inputs = make_inputs((2, 20, 7, 9), 2, device, **options)
        dy = gradient_like(inputs.x)
        assert_gradients(gradients_of(inputs, dy, group_norm_silu_ref), inputs, dy)
