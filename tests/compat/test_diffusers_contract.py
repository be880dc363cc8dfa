"""What pipelines and users rely on in diffusers' schedulers, of their façades."""

import copy
import importlib
import inspect
import logging
import pickle
import sys

import diffusers
import pytest
import torch
from diffusers_walk import SCHEDULERS, SHAPE, STATEFUL, model, pair, scale, walk, worst

import fastdiff.compat.diffusers as compat

EULER_LIKE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
every = pytest.mark.parametrize("name", SCHEDULERS)


@every
def test_configuration_goes_both_ways(name, tmp_path):
    original, ours = pair(name, num_train_timesteps=300)
    assert isinstance(ours, type(original))
    assert dict(type(original).from_config(ours.config).config) == dict(original.config)
    original.save_pretrained(tmp_path / "original")
    ours.save_pretrained(tmp_path / "ours")
    loaded = type(ours).from_pretrained(tmp_path / "original")
    again = type(ours).from_pretrained(tmp_path / "ours")
    back = type(original).from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(again) is type(ours)
    assert type(back) is type(original)
    options = {key: value for key, value in original.config.items() if not key.startswith("_")}
    for scheduler in (loaded, again, back):
        assert {key: scheduler.config[key] for key in options} == options


@every
def test_configuration_goes_through_compatible_schedulers(name):
    original, ours = pair(name)
    assert set(ours.compatibles) == set(original.compatibles)
    for compatible in ours.compatibles:
        if compatible.__name__ in SCHEDULERS:
            back = type(ours).from_config(compatible.from_config(ours.config).config)
            assert {key: back.config[key] for key in ours.config} == dict(ours.config)


@every
def test_the_pipeline_loader_finds_the_class(name):
    ours = getattr(compat, f"Fast{name}")
    library = importlib.import_module(ours.__module__)
    assert getattr(library, ours.__name__) is ours
    assert issubclass(ours, library.SchedulerMixin)


@every
@pytest.mark.parametrize("method", ["__init__", "set_timesteps", "step"])
def test_signatures(name, method):
    original, ours = getattr(diffusers, name), getattr(compat, f"Fast{name}")
    expected = inspect.signature(getattr(original, method)).parameters
    got = inspect.signature(getattr(ours, method)).parameters
    assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in expected.values()]


@every
def test_set_timesteps(name):
    original, ours = pair(name)
    for scheduler in (original, ours):
        scheduler.set_timesteps(num_inference_steps=7)
    assert torch.equal(ours.timesteps, original.timesteps)
    assert ours.timesteps.dtype == original.timesteps.dtype
    assert len(ours) == len(original)
    assert getattr(ours, "init_noise_sigma", None) == getattr(original, "init_noise_sigma", None)
    if hasattr(original, "sigmas"):
        assert torch.equal(ours.sigmas, original.sigmas)


@every
def test_outputs(name):
    original, ours = pair(name)
    torch.manual_seed(0)
    as_object, as_tuple = walk_one(ours, True), walk_one(ours, False)
    assert type(as_object) is type(walk_one(original, True))
    assert isinstance(as_tuple, tuple)
    assert len(as_object.to_tuple()) == len(as_tuple)
    for one, other in zip(as_object.to_tuple(), as_tuple):
        assert torch.equal(one, other)


def walk_one(scheduler, return_dict, **options):
    """A step from a sample that is always the same."""
    scheduler.set_timesteps(5)
    x = torch.linspace(-2, 2, 210).view(SHAPE)
    t = scheduler.timesteps[2]
    if "generator" in inspect.signature(scheduler.step).parameters:
        options.setdefault("generator", torch.Generator().manual_seed(1))
    return scheduler.step(model(scale(scheduler, x, t), t), t, x, return_dict=return_dict, **options)


# Measured over the schedulers, a first step: 1.0e-3 in float16 and 6.9e-3 in bfloat16, the originals' rounding of every
# intermediate value against our one at the end; the bounds are twice that.
@every
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.4e-2)], ids=["fp16", "bf16"]
)
def test_low_precision(name, dtype, tolerance):
    original, ours = pair(name)
    last = [walk(scheduler, 4, dtype=dtype)[0][1] for scheduler in (original, ours)]
    assert last[1].dtype == last[0].dtype == dtype
    assert float((last[1] - last[0]).abs().max()) <= tolerance * float(last[0].abs().max())


@every
def test_float64(name):
    _, ours = pair(name)
    taken = walk(ours, 4, dtype=torch.float64)
    assert {value.dtype for step in taken for value in step if value is not None} == {torch.float64}


DRAWING = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler")


@pytest.mark.parametrize("name", DRAWING)
def test_generators(name):
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    original, ours = pair(name)
    results = []
    for scheduler in (original, ours):
        one = [torch.Generator().manual_seed(seed) for seed in (5, 8)]
        results.append(walk_one(scheduler, False, generator=one, **options)[0])
        torch.manual_seed(9)
        results.append(walk_one(scheduler, False, generator=None, **options)[0])
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[3], results[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[2], results[3])


@every
@pytest.mark.parametrize("begin", [None, 4], ids=["looked up", "set_begin_index"])
def test_walks_that_start_late(name, begin):
    original, ours = pair(name)
    taken = []
    for scheduler in (original, ours):
        if begin is not None and hasattr(scheduler, "set_begin_index"):
            # set_timesteps forgets it
            set_timesteps = scheduler.set_timesteps
            scheduler.set_timesteps = lambda *a, s=scheduler, f=set_timesteps, **k: (f(*a, **k), s.set_begin_index(4))
        taken.append(walk(scheduler, 8, start=4))
    assert worst(taken[1], taken[0]) <= 1e-5
    for index in ("step_index", "begin_index"):
        assert getattr(ours, index, None) == getattr(original, index, None)


@every
@pytest.mark.parametrize("strides", [(1, 256, 32, 4), (192, 1, 24, 3)], ids=["batch last", "channels last"])
def test_strides(name, strides):
    _, ours = pair(name)
    shape = (4, 3, 8, 8) if strides[0] == 1 else (2, 3, 8, 8)
    x = torch.empty_strided(shape, strides).copy_(torch.randn(shape))
    ours.set_timesteps(5)
    results = []
    for sample in (x, x.contiguous()):
        ours.set_timesteps(5)
        torch.manual_seed(0)
        t = ours.timesteps[1]
        results.append(ours.step(sample * 0.3, t, sample, return_dict=False)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


@every
def test_nan_stays_in_its_sample(name):
    original, ours = pair(name, **({"clip_sample": True} if "clip_sample" in pair(name)[0].config else {}))
    x = torch.linspace(-2, 2, 210).view(SHAPE).clone()
    x[1, 0, 0, 0] = torch.nan
    nans = []
    for scheduler in (original, ours):
        scheduler.set_timesteps(5)
        nans.append(scheduler.step(x * 0.5, scheduler.timesteps[1], x, return_dict=False)[0].isnan())
    assert torch.equal(nans[1], nans[0])
    assert nans[1].sum() == 1


def test_nan_of_a_thresholded_sample():
    _, ours = pair("DDIMScheduler", thresholding=True)
    ours.set_timesteps(5)
    x = torch.linspace(-2, 2, 210).view(SHAPE).clone()
    x[1, 0, 0, 0] = torch.nan
    nan = ours.step(x * 0.5, ours.timesteps[1], x).prev_sample.isnan().flatten(1)
    assert not nan[0].any()
    assert nan[1].all()


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"])
def test_forward_noising(name, method):
    original, ours = pair(name)
    if not hasattr(original, method):
        pytest.skip("the original has none")
    x, noise, t = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.tensor([0, 3, 500, 999])
    for dtype in (torch.float32, torch.float64):
        expected = getattr(original, method)(x.to(dtype), noise.to(dtype), t)
        torch.testing.assert_close(getattr(ours, method)(x.to(dtype), noise.to(dtype), t), expected, rtol=0, atol=0)
    # in bfloat16 the original adds exactly zero noise at the first timesteps; ours is rounded once, at the end
    x, noise = x.bfloat16(), noise.bfloat16()
    low = getattr(ours, method)(x, noise, t)
    assert low.dtype == torch.bfloat16
    expected = getattr(original, method)(x.float(), noise.float(), t)
    torch.testing.assert_close(low.float(), expected, rtol=2**-8, atol=0)
    if method == "add_noise":
        assert (ours.add_noise(torch.zeros_like(x), noise, t) != 0).all()


@pytest.mark.parametrize("name", [*EULER_LIKE, *STATEFUL[:-1]])
def test_noising_along_sigmas(name):
    original, ours = pair(name)
    x, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for scheduler in (original, ours):
        scheduler.set_timesteps(10)
    t = ours.timesteps[[3, 7]]

    def noised(scheduler, x, noise):
        return scheduler.scale_noise(x, t, noise) if hasattr(ours, "scale_noise") else scheduler.add_noise(x, noise, t)

    assert torch.equal(noised(ours, x, noise), noised(original, x, noise))
    x, noise = x.bfloat16(), noise.bfloat16()
    low, expected = noised(ours, x, noise), noised(original, x.float(), noise.float())
    assert low.dtype == torch.bfloat16
    assert (noised(ours, torch.zeros_like(x), noise) != 0).all()
    if not hasattr(ours, "scale_noise"):
        # rounded once, at the end; the original rounds sigma and the product as well
        torch.testing.assert_close(low.float(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("FlowMatch")])
def test_model_input(name):
    original, ours = pair(name)
    x = torch.randn(SHAPE)
    for place in (0, 3):
        for scheduler in (original, ours):
            scheduler.set_timesteps(6)
        t = ours.timesteps[place]
        got, expected = (scheduler.scale_model_input(x, t) for scheduler in (ours, original))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@every
def test_copies_walk_like_the_scheduler(name):
    _, ours = pair(name)
    before = walk(ours, 4)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert worst(walk(other, 4), before) == 0


def test_rows_follow_the_tables_they_are_made_of():
    original, ours = pair("DDIMScheduler")
    walk(ours, 4)
    for scheduler in (original, ours):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
        scheduler.set_timesteps(4)
    x = torch.randn(SHAPE)
    got, expected = (scheduler.step(x.sin(), scheduler.timesteps[0], x).prev_sample for scheduler in (ours, original))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_steps_from_timesteps_that_are_not_listed():
    original, ours = pair("DDIMScheduler")
    x = torch.randn(SHAPE)
    for t in (1, 10, 49, torch.tensor(777)):
        results = []
        for scheduler in (original, ours):
            scheduler.set_timesteps(50)
            results.append(scheduler.step(x.sin(), t, x, eta=0.0).prev_sample)
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type"),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "prediction_type"),
        *((name, {"prediction_type": "score"}, "prediction_type") for name in SCHEDULERS[:7]),
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured(name, config, named):
    with pytest.raises(ValueError, match=named):
        getattr(compat, f"Fast{name}")(**config)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMInverseScheduler", "LCMScheduler", "TCDScheduler"])
def test_a_step_before_set_timesteps(name):
    _, ours = pair(name)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(x, 999, x)


@pytest.mark.parametrize("index", [1, torch.tensor(1)], ids=["int", "tensor"])
@pytest.mark.parametrize("name", EULER_LIKE)
def test_an_index_is_no_timestep(name, index):
    _, ours = pair(name)
    ours.set_timesteps(5)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="timestep"):
        ours.step(x, index, x)


def test_arguments_that_are_refused():
    x = torch.zeros(SHAPE)
    _, flow = pair("FlowMatchEulerDiscreteScheduler")
    flow.set_timesteps(5)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        flow.step(x, flow.timesteps[0], x, per_token_timesteps=torch.zeros(2, 35))
    _, heun = pair("HeunDiscreteScheduler")
    heun.set_timesteps(5)
    with pytest.raises(ValueError, match=r"timestep has the shape \[2\]"):
        heun.step(x, heun.timesteps[:2], x)
    _, ddpm = pair("DDPMScheduler")
    with pytest.raises(ValueError, match="learned_range"):
        ddpm.step(torch.cat([x, x], 1), 5, x)
    ddpm.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 5 is not"):
        ddpm.step(x, 5, x)


def test_a_sample_that_was_never_scaled_is_warned_of(caplog):
    _, ours = pair("EulerDiscreteScheduler")
    ours.set_timesteps(5)
    with caplog.at_level(logging.WARNING):
        ours.step(torch.zeros(SHAPE), ours.timesteps[0], torch.zeros(SHAPE))
    assert "scale_model_input" in caplog.text


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "fastdiff.compat.diffusers")
    with pytest.raises(ImportError, match=r"pip install fastdiff\[diffusers\]"):
        importlib.import_module("fastdiff.compat.diffusers")


@pytest.mark.parametrize(
    ("name", "source"),
    [("EulerDiscreteScheduler", "sigmas"), ("DDIMScheduler", "alphas_cumprod")],
    ids=["sigmas", "bars"],
)
def test_levels_written_in_place_reach_the_next_step(name, source):
    taken = []
    for scheduler in pair(name):
        scheduler.set_timesteps(5)
        x = torch.ones(SHAPE)
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(0.1 * scale(scheduler, x, t), t, x).prev_sample
            getattr(scheduler, source)[:] *= 0.5
        taken.append(x)
    # both round a few times to float32
    torch.testing.assert_close(taken[1], taken[0], rtol=1e-5, atol=1e-5)
