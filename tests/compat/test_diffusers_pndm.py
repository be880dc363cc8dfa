"""The façade of diffusers' PNDMScheduler, which Stable Diffusion is shipped with, against the original."""

import pytest
import torch
from diffusers_walk import SHAPE, model, pair, walk, worst
from test_diffusers_ops import FUSED, Counted

# Measured over these walks: at most 7e-6.
TOLERANCE = 1e-5
STARTS = {"runge-kutta": {}, "plms": {"skip_prk_steps": True}}
STABLE_DIFFUSION = {
    "skip_prk_steps": True,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

starts = pytest.mark.parametrize("config", STARTS.values(), ids=STARTS)


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "config",
    [*STARTS.values(), STABLE_DIFFUSION, {"set_alpha_to_one": True, "timestep_spacing": "trailing"}],
    ids=[*STARTS, "stable diffusion", "trailing"],
)
def test_walks(config, prediction_type, steps):
    original, ours = pair("PNDMScheduler", prediction_type=prediction_type, **config)
    assert worst(walk(ours, steps), walk(original, steps)) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(steps):
    original, ours = pair("PNDMScheduler", **STABLE_DIFFUSION)
    assert worst(walk(ours, steps), walk(original, steps)) <= TOLERANCE


@pytest.mark.parametrize("start", [1, 2, 3, 7, 13])
@starts
def test_walks_that_start_late_count_from_where_they_start(config, start):
    original, ours = pair("PNDMScheduler", **config)
    assert worst(walk(ours, 20, start=start), walk(original, 20, start=start)) <= TOLERANCE


def test_a_late_runge_kutta_start_of_v_predictions_is_nearer_to_float64():
    """Its steps lead from the first timestep to late ones, where the original's float32 weights cancel."""
    original, ours = pair("PNDMScheduler", prediction_type="v_prediction")
    single, got = walk(original, 10, start=7), walk(ours, 10, start=7)
    original.alphas_cumprod = original.alphas_cumprod.double()
    original.final_alpha_cumprod = original.alphas_cumprod[0]
    double = [(x.float(), prev.float(), None) for x, prev, _ in walk(original, 10, start=7, dtype=torch.float64)]
    assert worst(got, double) <= 1e-6 < TOLERANCE < worst(single, double)


@starts
def test_a_sample_changed_between_steps_is_met_as_in_the_original(config):
    ends = []
    for scheduler in pair("PNDMScheduler", **config):
        scheduler.set_timesteps(6)
        x = torch.linspace(-3, 3, 210).view(SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample.clamp(-1, 1.5)
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=TOLERANCE, atol=TOLERANCE)


@starts
def test_state_is_the_original_s(config):
    original, ours = pair("PNDMScheduler", **config)
    for scheduler in (original, ours):
        scheduler.set_timesteps(8)
    assert ours.prk_timesteps.tolist() == original.prk_timesteps.tolist()
    assert ours.plms_timesteps.tolist() == original.plms_timesteps.tolist()
    x = torch.linspace(-3, 3, 210).view(SHAPE)
    for t in original.timesteps:
        output = model(x, t)
        x, _ = (scheduler.step(output, t, x, return_dict=False)[0] for scheduler in (original, ours))
        assert ours.counter == original.counter
        assert [id(one) for one in ours.ets] == [id(one) for one in original.ets]
        assert (ours.cur_sample is None) == (original.cur_sample is None)


@pytest.mark.parametrize("t", [0, 1, 250, torch.tensor(733)], ids=str)
@pytest.mark.parametrize("method", ["step_prk", "step_plms"])
def test_given_model_outputs_and_timesteps_that_are_not_listed(method, t):
    past = [torch.full(SHAPE, 0.1 * k) for k in range(4)]
    results = []
    for scheduler in pair("PNDMScheduler", **STARTS["runge-kutta"]):
        scheduler.set_timesteps(50)
        scheduler.ets = past[:]
        x = torch.linspace(-2, 2, 210).view(SHAPE)
        # the second step of the multistep formula is of the outputs before it alone
        results.append([getattr(scheduler, method)(x.sin() * k, t, x, return_dict=False)[0] for k in (1, 2, 3)])
    for got, expected in zip(*reversed(results)):
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_first_steps_as_a_caller_takes_them():
    """diffusers' own loops hand numpy's timesteps to the two methods."""
    ends = []
    for scheduler in pair("PNDMScheduler"):
        scheduler.set_timesteps(10)
        x = torch.linspace(-2, 2, 210).view(SHAPE)
        for t in scheduler.prk_timesteps:
            x = scheduler.step_prk(model(x, t), t, x).prev_sample
        for t in scheduler.plms_timesteps:
            x = scheduler.step_plms(model(x, t), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("start", [0, 2])
@starts
def test_every_step_is_one_op(config, start):
    _, ours = pair("PNDMScheduler", **config)
    walk(ours, 8)
    ours.set_timesteps(8)
    x = torch.linspace(-2, 2, 210).view(SHAPE)
    for t in list(ours.timesteps)[start:]:
        with Counted() as counted:
            ours.step(x, t, x)
        assert counted.names == [FUSED]


def test_what_is_refused():
    x = torch.zeros(SHAPE)
    _, ours = pair("PNDMScheduler")
    for step in (ours.step, ours.step_prk, ours.step_plms):
        with pytest.raises(ValueError, match="call set_timesteps"):
            step(x, 9, x)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match="three model outputs in ets, got 0"):
        ours.step_plms(x, 9, x)
    with pytest.raises(ValueError, match=r"timestep has the shape \[2\].*one timestep for the batch"):
        ours.step(x, ours.timesteps[:2], x)
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        type(ours)(prediction_type="sample")
