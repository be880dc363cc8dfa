"""What of a captured forward can be tested on any machine: a replay here runs the step on its static tensors again."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers.models.unets.unet_2d import UNet2DOutput

from fastdiff import cuda_graph
from fastdiff.compat.diffusers import captured_forward


class Model(nn.Module):
    """x, a timestep, nested conditioning and a constant in; an output object of diffusers or a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor, t: torch.Tensor, added: Any, scale: Any = 1.0, return_dict: bool = False) -> Any:
        scale = scale if isinstance(scale, float) else scale.value
        out = self.weight * x * scale + t + added["more"][0]
        return UNet2DOutput(sample=out) if return_dict else (out,)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a capture. The graph's output lies in one place, as that of a real one does."""
    made: list[int] = []

    def capture(step: Any, reset: Any, device: Any, pool: Any) -> Any:
        made.append(len(made))
        step()
        return step, None

    monkeypatch.setattr(captured_forward, "GRAPH_DEVICE", "cpu")
    monkeypatch.setattr(cuda_graph, "capture", capture)
    return made


def arguments(batch: int = 2, t: int = 5) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3), "t": torch.tensor(t), "added": {"more": [torch.randn(batch, 3)]}}


def test_a_graph_serves_all_calls_of_one_layout(captures: list[int]) -> None:
    model = Model().eval()
    forward = captured_forward.CapturedForward(model, model.forward)
    with torch.no_grad():
        for t in (5, 9, 700):
            call = arguments(t=t)
            assert torch.equal(forward(**call)[0], model(**call)[0])
        assert len(captures) == 1
        kept = forward(**arguments())[0]
        before = kept.clone()
        forward(**arguments())
        assert torch.equal(kept, before)
        # a step in the weights' place is seen by the graph, weights elsewhere need another
        model.weight.add_(1)
        call = arguments()
        assert torch.equal(forward(**call)[0], model(**call)[0])
        assert len(captures) == 1
        model.weight.data = model.weight.data + 1
        assert torch.equal(forward(**call)[0], model(**call)[0])
        assert len(captures) == 2


def test_what_a_graph_has_baked_in_tells_graphs_apart(captures: list[int]) -> None:
    model = Model().eval()
    forward = captured_forward.CapturedForward(model, model.forward)
    call = arguments()
    others = [
        {"scale": 0.5},
        {"return_dict": True},
        {"x": call["x"].T.contiguous().T},
        {"t": torch.tensor([5.0])},
        arguments(batch=4),
    ]
    with torch.no_grad():
        forward(**call)
        for number, other in enumerate(others, start=2):
            output, expected = forward(**{**call, **other}), model(**{**call, **other})
            assert type(output) is type(expected)
            assert torch.equal(output[0], expected[0])
            assert len(captures) == number


def test_what_cannot_be_replayed_runs_as_it_is(captures: list[int]) -> None:
    class Scale:
        value = 3.0

    model = Model()
    forward = captured_forward.CapturedForward(model, model.forward)
    assert forward(**arguments())[0].requires_grad
    with torch.no_grad():
        forward(**arguments())  # in training mode
        model.eval()
        call = {**arguments(), "scale": Scale()}
        assert torch.equal(forward(**call)[0], model(**call)[0])
    assert captures == []
