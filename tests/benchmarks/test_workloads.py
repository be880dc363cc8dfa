"""Workloads: names, sizes, weights of which all count, and one walk for the reference, diffusers and the engine."""

import pytest
import torch

from benchmarks.workloads import MODELS, Workload, initial_noise, random_weights, schedule, timesteps
from fastdiff import solvers
from fastdiff.unet import UNet


@pytest.mark.parametrize(
    ("name", "millions"), [("cifar10", 35.7), ("unet64", 115.9), ("small", 4.4), ("tiny", 0.7)], ids=str
)
def test_models_have_the_sizes_they_say(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = UNet(MODELS[name].config)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(count, 1) == millions
    assert f"{millions} M" in MODELS[name].description


def test_names_tell_workloads_apart() -> None:
    workloads = [
        Workload(model="cifar10", batch=1),
        Workload(model="cifar10", batch=1, steps=100),
        Workload(model="cifar10", batch=1, resolution=64),
        Workload(model="cifar10", batch=1).with_batch(256),
    ]
    names = [workload.name for workload in workloads]
    assert names == ["cifar10-b1", "cifar10-b1-s100", "cifar10-b1-r64", "cifar10-b256"]
    assert [workload.shape[2] for workload in workloads] == [32, 32, 64, 32]


def test_refuses_what_has_no_common_walk() -> None:
    with pytest.raises(ValueError, match="model must be one of"):
        Workload(model="large", batch=1)
    with pytest.raises(ValueError, match="steps must divide 1000, got 30"):
        Workload(model="tiny", batch=1, steps=30)


def test_weights_are_repeatable_and_none_is_zero_or_one() -> None:
    config = MODELS["tiny"].config
    torch.manual_seed(5)
    weights = random_weights(config)
    torch.manual_seed(6)
    again = random_weights(config)
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
        assert weight.std() > 0, name
    UNet(config).load_state_dict(weights)


def test_a_sample_has_its_noise_in_any_batch() -> None:
    large, small = (initial_noise(Workload(model="tiny", batch=batch), torch.device("cpu")) for batch in (3, 1))
    assert torch.equal(large[:1], small)
    assert not torch.equal(large[0], large[1])


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_engine_and_diffusers_walk_the_same_timesteps(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    table = solvers.build("ddim", schedule(), steps)
    assert scheduler.timesteps.tolist() == timesteps(steps) == table.timesteps.tolist()
