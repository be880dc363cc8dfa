"""The form of the group norm that compilers for CPUs see: against the formula, and where it is seen."""

import pytest
import torch
from group_norm_formula import assert_forward, assert_gradients, make_inputs

from fastdiff.kernels import dispatch
from fastdiff.kernels.group_norm import group_norm_silu
from fastdiff.kernels.group_norm_traced import MIN_POSITIONS, MIN_POSITIONS_BACKWARD, group_norm_silu_traced
from fastdiff.kernels.layout import is_channels_last

CPU = torch.device("cpu")
SHAPES = [(2, 12, 5, 7), (3, 12, 31), (1, 12, 2, 3, 4), (2, 12, 1, 1), (2, 12, 40, 33)]
FEATURES = {
    "plain": {},
    "no SiLU": {"silu": False},
    "channel bias": {"channel_bias": "C"},
    "channel bias of each sample, scale and shift": {"channel_bias": "B, C", "scaled": True},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_groups", [1, 3, 12])
def test_matches_the_formula(shape, num_groups, dtype, features):
    inputs = make_inputs(shape, num_groups, CPU, dtype=dtype, **features)
    positional, keywords = inputs.arguments()
    y = group_norm_silu_traced(*positional, **keywords)
    assert is_channels_last(y)
    assert_forward(y, inputs)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (3, 12, 31), (2, 12, 1, 1)], ids=str)
@pytest.mark.parametrize("num_groups", [1, 3, 12])
def test_gradients_match_the_formula(shape, num_groups, features):
    inputs = make_inputs(shape, num_groups, CPU, **features).requiring_grad()
    positional, keywords = inputs.arguments()
    y = group_norm_silu_traced(*positional, **keywords)
    dy = torch.randn_like(y)
    wanted = inputs.tensors()
    gradients = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy)))
    assert is_channels_last(gradients["x"])
    assert_gradients(gradients, inputs, dy)


def test_an_infinite_sample_leaves_the_others_and_other_groups_alone():
    inputs = make_inputs((3, 12, 4, 4), 3, CPU)
    positional, keywords = inputs.arguments()
    before = group_norm_silu_traced(*positional, **keywords)
    inputs.x[1, 5] = torch.inf
    after = group_norm_silu_traced(*positional, **keywords)
    hit = torch.zeros(3, 12, dtype=torch.bool)
    hit[1, 4:8] = True
    assert torch.equal(after[~hit], before[~hit])
    assert after[hit].isnan().any()


@pytest.mark.parametrize(
    ("positions", "gradients", "layout", "seen"),
    [
        (MIN_POSITIONS, False, torch.channels_last, True),
        (MIN_POSITIONS - 1, False, torch.channels_last, False),
        (MIN_POSITIONS_BACKWARD, True, torch.channels_last, True),
        (MIN_POSITIONS_BACKWARD - 1, True, torch.channels_last, False),
        (MIN_POSITIONS, False, torch.contiguous_format, False),
    ],
)
def test_seen_by_a_compiler_only_where_it_pays(positions, gradients, layout, seen, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(group_norm_silu, backend=backend, fullgraph=True, dynamic=False)
    x = torch.randn(2, 4, positions, 1).contiguous(memory_format=layout)
    with torch.set_grad_enabled(gradients):
        y = function(x, 2, torch.ones(4), torch.zeros(4), 1e-5)
    (graph,) = graphs
    assert any(node.target is torch.nn.functional.group_norm for node in graph.graph.nodes) is not seen
    expected = group_norm_silu(x, 2, torch.ones(4), torch.zeros(4), 1e-5)
    # sums of about 2,000 squares of either way: at most 11 roundings in pairs and 2 of every element's
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * 16 * 2**-24 * y.abs().max().item())
