"""Façades of diffusers' schedulers against the originals over whole walks, for the same generator."""

from typing import Any

import pytest
import torch
from diffusers_walk import pair, walk, worst

# Measured over these walks: at most 7e-6. The originals make their coefficients in float32; ours are made in float64
# from the same float32 tables (and, for DDPM, from its float32 betas).
TOLERANCE = 1e-5

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
CHURN = {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003}


def check(name: str, config: dict[str, Any], steps: Any, **options: Any) -> None:
    original, ours = pair(name, **config)
    theirs = walk(original, steps, **options)
    assert worst(walk(ours, steps, **options), theirs) <= TOLERANCE


# A beta = 1 - alpha_t / alpha_t' of 1e-4 keeps three digits in the original: with exact ones the last steps would be
# off by 5e-5 of the sample, and the whole walk by 8.5e-5. With the original's: 3e-7 and 7e-6.
@pytest.mark.parametrize(("start", "tolerance"), [(998, 1e-6), (0, TOLERANCE)], ids=["last two steps", "whole"])
def test_a_thousand_ddpm_steps(start, tolerance):
    original, ours = pair("DDPMScheduler", clip_sample=start == 0)
    theirs = walk(original, 1000, start=start)
    assert worst(walk(ours, 1000, start=start), theirs) <= tolerance


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler"])
def test_eps_where_no_signal_is_left(name):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": True}
    original, ours = pair(name, **config)
    assert original.alphas_cumprod[-1] == 0
    theirs = walk(original, 10)
    assert theirs[0][2].abs().unique().tolist() == [1.0]
    assert worst(walk(ours, 10), theirs) <= TOLERANCE


# alphas_cumprod underflows long before the noisiest timestep, which a walk that starts late never sees
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler"])
def test_a_late_walk_on_a_schedule_without_signal_at_its_start(name):
    check(name, {"beta_start": 0.1, "beta_end": 2.0, "timestep_spacing": "trailing"}, 10, start=9)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddpm(prediction_type, spacing, steps):
    check("DDPMScheduler", {"prediction_type": prediction_type, "timestep_spacing": spacing}, steps)


# steps_offset ends the walk above timestep 0, where noise is drawn on the last step too
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("variance_type", ["fixed_small_log", "fixed_large", "learned_range", "other"])
def test_ddpm_variance(variance_type, offset):
    config = {"variance_type": variance_type, "steps_offset": offset, "clip_sample_range": 0.7}
    check("DDPMScheduler", config, 30, channels=2 if variance_type == "learned_range" else 1)


@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_ddpm_schedule(schedule):
    check("DDPMScheduler", {"beta_schedule": schedule, "clip_sample": False}, 20)


def test_ddpm_listed_timesteps():
    check("DDPMScheduler", {}, {"timesteps": [900, 500, 100, 3]})


@pytest.mark.parametrize(
    ("name", "config"),
    [("DDPMScheduler", {}), ("DDIMScheduler", {"dynamic_thresholding_ratio": 0.9}), ("LCMScheduler", {})],
    ids=["ddpm", "ddim", "lcm"],
)
def test_thresholding(name, config):
    check(name, {"thresholding": True, "sample_max_value": 1.5, **config}, 10)


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim(prediction_type, spacing, steps):
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, "clip_sample": False}
    check("DDIMScheduler", config, steps)


# eta = 1 only with set_alpha_to_one: without it the original's last sqrt(1 - alpha - std²) cancels to 1e-5 in float32
@pytest.mark.parametrize(
    ("eta", "config"), [(0.3, {"set_alpha_to_one": False, "steps_offset": 1}), (1.0, {})], ids=["0.3", "1"]
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_eta(prediction_type, eta, config):
    config = {"prediction_type": prediction_type, **config}
    check("DDIMScheduler", config, 20, eta=eta, use_clipped_model_output=True)


def test_ddim_from_no_signal():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    check("DDIMScheduler", config, 20)


def test_ddim_variance_noise():
    noise = torch.randn(2, 3, 5, 7)
    original, ours = pair("DDIMScheduler")
    out = []
    for scheduler in (original, ours):
        scheduler.set_timesteps(10)
        arguments = (torch.full_like(noise, 0.1), scheduler.timesteps[3], torch.full_like(noise, 0.7))
        out.append(scheduler.step(*arguments, eta=1.0, variance_noise=noise).prev_sample)
    torch.testing.assert_close(out[1], out[0], rtol=TOLERANCE, atol=0)
    with pytest.raises(ValueError, match="variance_noise"):
        ours.step(*arguments, eta=1.0, variance_noise=noise, generator=torch.Generator())


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_inverse(prediction_type, spacing):
    # on noiseless data, where alpha is 1, a model that predicts the sample says nothing about the noise
    config = {"set_alpha_to_one": prediction_type != "sample", "timestep_spacing": spacing}
    check("DDIMInverseScheduler", {"prediction_type": prediction_type, **config}, 20)


@pytest.mark.parametrize("steps", [1, 4, {"timesteps": [779, 499, 259]}], ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_lcm(prediction_type, steps):
    check("LCMScheduler", {"prediction_type": prediction_type, "clip_sample": True}, steps)


EULER = {
    "plain": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sigma_min": {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
    "log_linear": {"timestep_spacing": "leading", "steps_offset": 1, "interpolation_type": "log_linear"},
    "zero_snr": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("config", EULER.values(), ids=EULER)
@pytest.mark.parametrize("prediction_type", [*PREDICTION_TYPES, "original_sample"])
def test_euler(prediction_type, config, steps):
    check("EulerDiscreteScheduler", {"prediction_type": prediction_type, **config}, steps)


def test_euler_continuous_timesteps():
    config = {"timestep_type": "continuous", "sigma_max": 700.0, "sigma_min": 0.002, "use_karras_sigmas": True}
    check("EulerDiscreteScheduler", {"prediction_type": "v_prediction", **config}, 10)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_euler_churn(prediction_type):
    check("EulerDiscreteScheduler", {"prediction_type": prediction_type}, 20, **CHURN)


@pytest.mark.parametrize(
    "steps", [{"sigmas": [10.0, 5.0, 1.0, 0.1, 0.0]}, {"timesteps": [900, 500, 20]}], ids=["sigmas", "timesteps"]
)
def test_euler_listed_steps(steps):
    check("EulerDiscreteScheduler", {}, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_ancestral(prediction_type, spacing):
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    check("EulerAncestralDiscreteScheduler", config, 20)


@pytest.mark.parametrize("churn", [{}, CHURN], ids=["plain", "churn"])
@pytest.mark.parametrize("config", [{}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min"}], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_euler(prediction_type, config, churn):
    check("EDMEulerScheduler", {"prediction_type": prediction_type, **config}, 10, **churn)


def test_edm_euler_with_a_denoised_sample():
    denoised = torch.randn(2, 3, 5, 7)
    original, ours = pair("EDMEulerScheduler")
    assert (
        worst(walk(ours, 5, pred_original_sample=denoised), walk(original, 5, pred_original_sample=denoised))
        <= TOLERANCE
    )


FLOW = {
    "plain": {},
    "shift": {"shift": 3.0},
    "stochastic": {"stochastic_sampling": True},
    "inverted": {"invert_sigmas": True},
    "karras": {"use_karras_sigmas": True},
    "terminal": {"shift_terminal": 0.1},
}


@pytest.mark.parametrize("config", FLOW.values(), ids=FLOW)
def test_flow_match_euler(config):
    check("FlowMatchEulerDiscreteScheduler", config, 10)


@pytest.mark.parametrize(
    "steps", [{"num_inference_steps": 6, "mu": 0.8}, {"sigmas": [1.0, 0.7, 0.2], "mu": 1.2}], ids=["mu", "sigmas"]
)
def test_flow_match_euler_dynamic_shifting(steps):
    check("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, steps)


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, {"clip_sample": True}], ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_heun(prediction_type, config):
    check("HeunDiscreteScheduler", {"prediction_type": prediction_type, **config}, 10)


def test_heun_whose_sample_a_caller_changes_between_its_stages():
    original, ours = pair("HeunDiscreteScheduler")
    results = []
    for scheduler in (original, ours):
        scheduler.set_timesteps(4)
        x = torch.linspace(-9, 9, 210).view(2, 3, 5, 7)
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x).prev_sample.clamp(-6, 6)
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=TOLERANCE, atol=TOLERANCE)
