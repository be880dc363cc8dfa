"""Buckets of captured calls: when one may be replayed, and when it must be captured anew."""

import pytest
import torch
from torch import nn

from fastdiff import engine_model
from fastdiff.cuda_graph import BakedIn
from fastdiff.engine_model import BucketedModel

CPU = torch.device("cpu")


@pytest.fixture
def captured(monkeypatch) -> list[int]:
    """A capture for machines without CUDA graphs; it counts."""
    captures: list[int] = []

    def capture(step, reset, device, pool):
        step()
        captures.append(len(captures))
        return step, None

    monkeypatch.setattr(engine_model, "capture", capture)
    return captures


def bucketed(model: nn.Module, captures: bool = True) -> BucketedModel:
    return BucketedModel(
        model,
        sizes=(1, 2),
        shape=(3,),
        device=CPU,
        dtype=torch.float32,
        autocast_dtype=None,
        compile=False,
        captures=captures,
    )


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, x, t):
        return self.inner(x) + self.offset


def replaced_data(model):
    model.inner.weight.data = model.inner.weight.data.clone()


def replaced_parameter(model):
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clone())


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def converted(model):
    model.double().float()


def replaced_buffer(model):
    model.offset = torch.ones(3)


def hooked(model):
    model.inner.register_forward_hook(lambda module, inputs, output: output + 1)


def in_training_mode(model):
    model.inner.train()


@pytest.mark.parametrize(
    "change", [replaced_data, replaced_parameter, assigned, converted, replaced_buffer, hooked, in_training_mode]
)
def test_a_call_is_captured_anew_where_a_weight_lies_elsewhere(captured, change):
    model = Scaled().eval()
    call, x, t = bucketed(model), torch.randn(2, 3), torch.zeros(2)
    call(x, t, {}, {})
    call(x[:1], t[:1], {}, {})
    assert len(captured) == 2
    change(model)
    assert torch.equal(call(x, t, {}, {}), model(x, t))
    call(x[:1], t[:1], {}, {})
    call(x, t, {}, {})
    assert len(captured) == 4


def test_a_call_is_replayed_where_weights_change_in_place(captured):
    model = Scaled().eval()
    call, x, t = bucketed(model), torch.randn(2, 3), torch.zeros(2)
    call(x, t, {}, {})
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    with torch.no_grad():
        model.inner.weight.mul_(2)
    assert torch.equal(call(x, t, {}, {}), model(x, t))
    assert len(captured) == 1


def test_of_a_function_nothing_is_known():
    assert BakedIn(lambda x, t: x).state() == BakedIn(lambda x, t: -x).state()
