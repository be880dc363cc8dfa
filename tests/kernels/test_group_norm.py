"""group_norm_silu, kernels and reference, against its formula in float64."""

import dataclasses
import shutil

import pytest
import torch
from group_norm_formula import Inputs, assert_forward, channels_last, formula, make_inputs

from fastdiff.kernels import group_norm as module
from fastdiff.kernels.dispatch import HAS_TRITON, INTERPRET
from fastdiff.kernels.group_norm import _group_norm_silu_op, group_norm_silu, group_norm_silu_ref
from fastdiff.kernels.layout import channel_rows

# bf16 stores truncate in the interpreter
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (torch.cuda.is_available() or not INTERPRET)
needs_kernel = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRET or torch.cuda.is_available()), reason="needs the interpreter or a GPU"
)
# Groups of 1, 2, 4, 8, 10, 12, 20 and 40 channels and odd ones, planes that fill no tile.
SHAPES = {
    "1 channel a group": ((2, 8, 5, 7), 8),
    "2 channels a group": ((1, 64, 8, 8), 32),
    "4": ((2, 32, 6, 6), 8),
    "8, one group": ((3, 8, 9, 5), 1),
    "10": ((1, 30, 8, 9), 3),
    "12": ((2, 24, 7, 7), 2),
    "20": ((1, 60, 5, 5), 3),
    "40": ((1, 80, 4, 9), 2),
    "3, odd": ((2, 15, 11, 3), 5),
    "7, odd": ((1, 7, 13, 11), 1),
}
FEATURES = {
    "plain": {},
    "no SiLU": {"silu": False},
    "channel bias": {"channel_bias": "C"},
    "channel bias of each sample": {"channel_bias": "B, C"},
    "scale and shift": {"scaled": True},
    "everything": {"channel_bias": "B, C", "scaled": True},
}


def call(inputs: Inputs, function=group_norm_silu) -> torch.Tensor:
    positional, keywords = inputs.arguments()
    return function(*positional, **keywords)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_any_size_match_the_formula(dtype, name, form, nan_outputs, device):
    inputs = make_inputs(*SHAPES[name], device, dtype=dtype)
    y = call(inputs)
    assert y.stride() == inputs.x.stride()
    assert_forward(y, inputs)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_match_the_formula(dtype, name, form, nan_outputs, device):
    inputs = make_inputs((2, 20, 7, 9), 2, device, dtype=dtype, **FEATURES[name])
    assert_forward(call(inputs), inputs)


@pytest.mark.parametrize("shape", [(3, 12), (2, 12, 31), (1, 12, 3, 5, 4), (2, 12, 1, 1), (1, 12, 40, 33)], ids=str)
def test_other_shapes_match_the_formula(shape, form, nan_outputs, device):
    inputs = make_inputs(shape, 3, device, channel_bias="B, C")
    y = call(inputs)
    assert y.shape == shape
    assert_forward(y, inputs)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "first half of 2C channels": lambda x: channels_last(torch.cat([x, x], 1))[:, : x.shape[1]],
    "every second sample": lambda x: channels_last(torch.stack([x, x], 1).flatten(0, 1))[::2],
    "expanded over the batch": lambda x: x[:1].expand(x.shape),
    "one element into its storage": lambda x: channels_last(torch.cat([x, x]).flatten()[1:][: x.numel()].view_as(x)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_match_the_formula(name, nan_outputs, device):
    inputs = make_inputs((2, 16, 5, 6), 4, device)
    inputs = dataclasses.replace(inputs, x=LAYOUTS[name](inputs.x))
    y = call(inputs)
    assert_forward(y, inputs)
    if name == "contiguous":
        assert y.is_contiguous()


@needs_kernel
def test_op_takes_any_layout(nan_outputs, device):
    inputs = make_inputs((2, 16, 5, 6), 4, device)
    x = inputs.x.contiguous()
    y, _, _ = _group_norm_silu_op(x, 4, inputs.weight, inputs.bias, inputs.eps, None, None, None, True)
    assert_forward(y, inputs)


def test_halves_of_a_projection_are_not_copied(device):
    halves = torch.randn(3, 10, device=device).chunk(2, dim=1)
    for value in (*halves, torch.randn(1, 5, device=device).expand(3, 5), torch.randn(5, device=device)):
        rows, stride = channel_rows(value)
        assert rows is value
        assert stride == (value.stride(0) if value.ndim == 2 else 0)
    transposed = torch.randn(5, 3, device=device).t()
    rows, stride = channel_rows(transposed)
    assert torch.equal(rows, transposed)
    assert stride == 5


@pytest.mark.parametrize("name", ["expanded", "transposed", "bf16"])
def test_rows_of_any_strides_and_dtype(name, form, device):
    rows = torch.randn(12, 2, device=device)
    value = {"expanded": rows[:, :1].t().expand(2, 12), "transposed": rows.t(), "bf16": rows.t().bfloat16()}[name]
    inputs = make_inputs((2, 12, 5, 5), 3, device)
    inputs = dataclasses.replace(inputs, channel_bias=value, scale=value, shift=value, weight=inputs.weight.half())
    assert_forward(call(inputs), inputs)


def test_nan_poisons_exactly_its_group(form, device):
    inputs = make_inputs((2, 30, 7, 9), 3, device, channel_bias="B, C")
    inputs.x[1, 14, 3, 4] = float("nan")
    poisoned = torch.zeros(2, 30, dtype=torch.bool, device=device)
    poisoned[1, 10:20] = True
    assert torch.equal(call(inputs).isnan(), poisoned[:, :, None, None].expand(2, 30, 7, 9))


@needs_kernel
def test_constant_groups_normalise_to_their_bias(form, device):
    inputs = make_inputs((2, 12, 7, 9), 3, device, silu=False)
    inputs = dataclasses.replace(inputs, x=torch.full_like(inputs.x, 2.5))
    expected = inputs.bias.view(1, 12, 1, 1).expand(2, 12, 7, 9)
    assert torch.equal(call(inputs), expected)


# torch's channels-last kernel for CPUs takes E[x^2] - E[x]^2, so the reference does not hold this
@needs_kernel
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_a_mean_far_above_the_spread_does_not_cancel(spread, form, device):
    inputs = make_inputs((1, 20, 16, 16), 2, device, silu=False)
    inputs = dataclasses.replace(inputs, x=1000 + spread * inputs.x)
    # the bound grows with mean / spread only, where E[x^2] - E[x]^2 would lose its square
    assert_forward(call(inputs), inputs)


def test_an_outlier_in_the_first_position_does_not_cancel(form, device):
    inputs = make_inputs((1, 20, 16, 16), 2, device, silu=False)
    inputs.x[0, :10, 0, 0] = 1e4
    assert_forward(call(inputs), inputs)


@needs_kernel
def test_a_sample_does_not_depend_on_its_batch_nor_on_the_call(form, device, monkeypatch):
    inputs = make_inputs((3, 20, 9, 7), 2, device, channel_bias="B, C", scaled=True)
    plan = module.choose_plan(3, 63, 20, 2, 4, 1)
    monkeypatch.setattr(module, "choose_plan", lambda *arguments: plan)
    together = call(inputs)
    assert torch.equal(together, call(inputs))
    alone = dataclasses.replace(
        inputs,
        x=inputs.x[1:2],
        channel_bias=inputs.channel_bias[1:2],
        scale=inputs.scale[1:2],
        shift=inputs.shift[1:2],
    )
    assert torch.equal(call(alone), together[1:2])


@needs_kernel
def test_statistics_are_returned(form, device):
    inputs = make_inputs((2, 12, 7, 9), 3, device)
    _, mean, rstd = _group_norm_silu_op(inputs.x, 3, inputs.weight, inputs.bias, inputs.eps, None, None, None, True)
    groups = inputs.x.double().reshape(2, 3, -1)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (groups.var(2, unbiased=False) + inputs.eps).rsqrt(), rtol=1e-5, atol=0)


def test_empty_batch(form, device):
    inputs = make_inputs((0, 12, 5, 5), 3, device, channel_bias="B, C", scaled=True)
    assert call(inputs).shape == (0, 12, 5, 5)


def test_float64_and_groups_beyond_a_tile_run_the_reference(device):
    inputs = make_inputs((1, 12, 5, 5), 3, device).requiring_grad(torch.float64)
    torch.testing.assert_close(call(inputs), formula(inputs), rtol=1e-12, atol=1e-12)
    wide = make_inputs((1, 5000, 1, 2), 1, device)
    assert_forward(call(wide), wide)


def test_autocast_does_not_change_the_dtype(device):
    inputs = make_inputs((1, 12, 5, 5), 3, device, dtype=torch.bfloat16)
    inputs = dataclasses.replace(inputs, x=inputs.x.float())
    with torch.autocast(device.type, torch.bfloat16):
        assert_forward(call(inputs), inputs)


@needs_kernel
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_op_is_registered_correctly(name, form, device):
    inputs = make_inputs((2, 12, 5, 4), 3, device, **FEATURES[name]).requiring_grad()
    positional, keywords = inputs.arguments()
    torch.library.opcheck(_group_norm_silu_op, (*positional, *keywords.values()))


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))],
)
def test_compiles_as_one_graph(backend, device):
    inputs = make_inputs((2, 12, 6, 5), 3, device, channel_bias="B, C", scaled=True)
    y = torch.compile(lambda: call(inputs), backend=backend, fullgraph=True)()
    assert y.stride() == inputs.x.stride()
    assert_forward(y, inputs)


def test_reference_matches_the_formula(device):
    for options in FEATURES.values():
        inputs = make_inputs((2, 20, 7, 9), 2, device, **options)
        assert_forward(call(inputs, group_norm_silu_ref), inputs)


ROW = torch.zeros(12)
BAD = {
    "x": ({"x": torch.zeros(12)}, TypeError, r"x must be a tensor \[B, C, \*spatial\], got shape \[12\]"),
    "dtype": ({"x": torch.zeros(2, 12, 4, 4).int()}, ValueError, "x must be .* got int32"),
    "nothing": ({"x": torch.zeros(2, 12, 0, 4)}, ValueError, r"x must have at least one element .* \[2, 12, 0, 4\]"),
    "groups": ({"num_groups": 5}, ValueError, "num_groups must divide the 12 channels of x, got 5"),
    "no groups": ({"num_groups": 0}, ValueError, "num_groups must divide .* got 0"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0, got -1.0"),
    "weight": ({"weight": torch.zeros(6)}, ValueError, r"weight must be .* shape \[12\]"),
    "bias": ({"bias": ROW.int()}, ValueError, "bias must be .* got int32"),
    "channel bias": ({"channel_bias": torch.zeros(3, 12)}, ValueError, r"channel_bias must be .* \[2, 12\]"),
    "scale alone": ({"scale": torch.zeros(2, 12)}, ValueError, "scale and shift come together, got only scale"),
    "shift shape": ({"scale": torch.zeros(2, 12), "shift": ROW}, ValueError, r"shift must be .* shape \[2, 12\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changed, error, message = BAD[name]
    arguments = {"x": torch.zeros(2, 12, 4, 4), "num_groups": 3, "weight": ROW, "bias": ROW, "eps": 1e-5, **changed}
    with pytest.raises(error, match=message):
        group_norm_silu(**arguments)
