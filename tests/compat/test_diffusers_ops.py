"""How many operations a façade's step is."""

import diffusers
import pytest
import torch
from diffusers_walk import SCHEDULERS, SHAPE, pair, walk, worst
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.kernels import compiled_ref

NO_WORK = ("aten.view", "aten.slice", "aten.select", "aten.split", "aten.unbind", "aten.detach", "aten.alias")
NO_WORK += ("aten._local_scalar_dense", "aten.promote_types")


class Counted(TorchDispatchMode):
    """Names of the operations that ran, without views and what only reads a type or a number of the host's."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removesuffix(".default")
        if not name.startswith(NO_WORK):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def step_ops(scheduler, **options):
    """The operations of each step of a walk like one that was walked before."""
    x = torch.linspace(-2, 2, 210).view(SHAPE)
    m = x.sin()
    for _ in range(2):
        scheduler.set_timesteps(num_inference_steps=4)
        scheduler.is_scale_input_called = True
        taken = []
        for t in list(scheduler.timesteps):
            with Counted() as counted:
                scheduler.step(m, t, x, **options)
            taken.append(counted.names)
    return taken


FUSED = "fastdiff.solver_step"
DRAWS = {"DDPMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler"}


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "KDPM2AncestralDiscreteScheduler"])
def test_a_step_is_one_op(name):
    _, ours = pair(name)
    *taken, last = step_ops(ours)
    assert taken == [["aten.randn.generator"] * (name in DRAWS) + [FUSED]] * len(taken)
    assert last == taken[0] or last == [FUSED]


def test_only_second_stages_draw_noise():
    _, ours = pair("KDPM2AncestralDiscreteScheduler")
    first, second = [FUSED], ["aten.randn.generator", FUSED]
    assert step_ops(ours) == [first, second, first, second, first, second, first]


@pytest.mark.parametrize(
    ("name", "config", "options", "before"),
    [
        ("DDIMScheduler", {}, {"eta": 1.0}, ["aten.randn.generator"]),
        ("DDIMScheduler", {"thresholding": True}, {}, ["fastdiff.dynamic_threshold"]),
        (
            "DDPMScheduler",
            {"thresholding": True},
            {},
            ["aten.randn.generator", "fastdiff.dynamic_threshold"],
        ),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}, ["aten.randn.generator"]),
        ("EulerDiscreteScheduler", {}, {"s_churn": 2.0}, ["aten.randn.generator", FUSED]),
    ],
    ids=["noise", "threshold", "both", "flow noise", "churn"],
)
def test_what_comes_before_it(name, config, options, before):
    _, ours = pair(name, **config)
    assert step_ops(ours, **options)[:3] == [[*before, FUSED]] * 3


def test_the_count_sees_the_original_s_ops():
    assert len(step_ops(diffusers.DDIMScheduler())[0]) >= 7


@pytest.mark.usefixtures("needs_cxx")
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
def test_the_compiled_step_walks_alike(name, monkeypatch):
    original, ours = pair(name)
    monkeypatch.setattr(compiled_ref, "ENABLED", True)
    compiled = walk(ours, 5)
    assert worst(compiled, walk(original, 5)) <= 1e-5
