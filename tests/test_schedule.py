"""Noise schedules: constructors, identities between the tables, spacings, training tables, configurations."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch

from fastdiff.schedule import NoiseSchedule
from fastdiff.spacing import beta_quantile, karras_sigmas

VP = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(beta_start=0.00085, beta_end=0.012),
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "from_betas": NoiseSchedule.from_betas([0.1, 0.3, 0.2, 0.6]),
    "zero_terminal": NoiseSchedule.linear().rescale_zero_terminal_snr(),
}
OTHERS = {"flow": NoiseSchedule.flow(shift=3.0), "edm": NoiseSchedule.edm()}
ALL = VP | OTHERS
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm")


def each(schedules):
    return pytest.mark.parametrize("schedule", schedules.values(), ids=schedules)


@each(VP)
def test_posterior_follows_from_bayes_rule(schedule):
    # q(x_prev | x, x0) ~ q(x | x_prev) q(x_prev | x0): precisions add, means are weighted by them.
    beta, bar, bar_prev = (t[1:] for t in (schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev))
    precision = (1 - beta) / beta + 1 / (1 - bar_prev)
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-10)
    np.testing.assert_allclose(
        schedule.posterior_mean_coef1[1:], np.sqrt(bar_prev) / (1 - bar_prev) / precision, rtol=1e-10
    )
    np.testing.assert_allclose(schedule.posterior_mean_coef2[1:], np.sqrt(1 - beta) / beta / precision, rtol=1e-10)
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance_clipped[0] == schedule.posterior_log_variance_clipped[1]
    assert (bar < 1).all()


@each(VP)
def test_vp_tables_agree_with_each_other(schedule):
    bar = schedule.alphas_cumprod
    np.testing.assert_allclose(np.cumprod(1 - schedule.betas), bar, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(schedule.alphas_cumprod_prev, np.append(1, bar[:-1]))
    np.testing.assert_array_equal(schedule.alphas_cumprod_next, np.append(bar[1:], 0))
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-15)
    np.testing.assert_allclose(np.exp(schedule.log_one_minus_alphas_cumprod), schedule.sigma**2, rtol=1e-12)
    some = bar > 0
    np.testing.assert_allclose(schedule.sqrt_recip_alphas_cumprod[some] * schedule.alpha[some], 1, rtol=1e-14)
    np.testing.assert_allclose(schedule.sqrt_recipm1_alphas_cumprod[some], schedule.noise_level[some], rtol=1e-10)


@each(ALL)
def test_noise_grows_and_tables_are_frozen(schedule):
    assert (np.diff(schedule.snr) < 0).all()
    assert schedule.alpha.dtype == schedule.sigma.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        schedule.alpha[0] = 2
    alpha, sigma = schedule.from_noise_level(schedule.noise_level)
    np.testing.assert_allclose(alpha, schedule.alpha, rtol=1e-12)
    np.testing.assert_allclose(sigma, schedule.sigma, rtol=1e-12)


def test_constructors_follow_their_formulas():
    np.testing.assert_allclose(NoiseSchedule.linear(3, 0.1, 0.3).betas, [0.1, 0.2, 0.3], rtol=1e-15)
    np.testing.assert_allclose(NoiseSchedule.scaled_linear(3, 0.01, 0.25).betas, [0.01, 0.09, 0.25], rtol=1e-14)
    np.testing.assert_allclose(NoiseSchedule.sigmoid(3, 0.1, 0.3).betas[1], 0.2, rtol=1e-15)
    cosine, f = NoiseSchedule.cosine(8), [math.cos((t / 8 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(9)]
    np.testing.assert_allclose(cosine.alphas_cumprod[:7], np.array(f[1:8]) / f[0], rtol=1e-13)
    assert cosine.betas[-1] == 0.999
    flow = NoiseSchedule.flow(4, shift=3.0)
    np.testing.assert_allclose(flow.sigma, [0.5, 0.75, 0.9, 1.0], rtol=1e-15)
    np.testing.assert_allclose(flow.alpha, 1 - flow.sigma, rtol=1e-15)
    edm = NoiseSchedule.edm(0.01, 10.0, num_train_timesteps=5)
    assert (edm.alpha == 1).all()
    np.testing.assert_allclose(edm.sigma[::-1], karras_sigmas(0.01, 10.0, 5), rtol=1e-15)


def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_start():
    schedule, base = VP["zero_terminal"], VP["linear"]
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.betas[-1] == 1
    assert schedule.snr[-1] == 0
    np.testing.assert_allclose(schedule.alphas_cumprod[0], base.alphas_cumprod[0], rtol=1e-15)
    np.testing.assert_allclose(schedule.rescale_zero_terminal_snr().alpha, schedule.alpha, rtol=1e-15)


@each(ALL)
def test_config_round_trip_through_json_gives_equal_tables(schedule):
    again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
    for other in (again, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other.kind == schedule.kind
        assert other.sigma_data == schedule.sigma_data
        np.testing.assert_array_equal(other.alpha, schedule.alpha)
        np.testing.assert_array_equal(other.sigma, schedule.sigma)


@each(OTHERS)
def test_vp_names_of_another_kind_are_attribute_errors_that_say_so(schedule):
    with pytest.raises(AttributeError, match=f"posterior_variance.*{schedule.kind}"):
        _ = schedule.posterior_variance
    with pytest.raises(AttributeError, match="no attribute 'beta'"):
        _ = VP["linear"].beta


@each(ALL)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_training_table_is_solved_by_the_data(schedule, prediction_type):
    if prediction_type == "edm" and schedule.alpha[-1] == 0:
        with pytest.raises(ValueError, match="alpha = 0"):
            schedule.training_table(prediction_type)
        return
    table = schedule.training_table(prediction_type)
    assert table.shape == (schedule.num_train_timesteps, 4)
    assert table.dtype == torch.float32
    alpha, sigma, sd = schedule.alpha, schedule.sigma, schedule.sigma_data
    level = sigma / np.where(alpha > 0, alpha, 1)
    total = level**2 + sd**2
    zero, one, norm = np.zeros_like(sigma), np.ones_like(sigma), np.hypot(alpha, sigma)
    edm_out = level * sd / np.sqrt(total)
    want = {
        "epsilon": (alpha, sigma, zero, one),
        "sample": (alpha, sigma, one, zero),
        "v_prediction": (alpha, sigma, -sigma / norm, alpha / norm),
        "flow_prediction": (alpha, sigma, -one, one),
        # c_in * (x0 + level * eps) and (x0 - c_skip * (x0 + level * eps)) / c_out, Karras et al. 2022
        "edm": (total**-0.5, level * total**-0.5, level**2 / total / edm_out, -(sd**2) / total * level / edm_out),
    }[prediction_type]
    np.testing.assert_allclose(table.numpy(), np.stack(want, 1), rtol=2e-7)


def test_timestep_condition():
    np.testing.assert_array_equal(VP["linear"].timestep_condition("epsilon"), np.arange(1000))
    np.testing.assert_allclose(
        NoiseSchedule.flow().timestep_condition("flow_prediction"), np.arange(1, 1001), rtol=1e-15
    )
    edm = OTHERS["edm"]
    np.testing.assert_allclose(edm.timestep_condition("edm"), np.log(edm.sigma) / 4, rtol=1e-12)
    np.testing.assert_array_equal(edm.timestep_condition("sample"), np.arange(1000))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_equal_diffusers(spacing):
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    schedule = VP["linear"]
    ddim = DDIMScheduler(timestep_spacing=spacing)
    dpm = DPMSolverMultistepScheduler(timestep_spacing=spacing)
    for steps in (2, 3, 7, 16, 50, 333, 999):
        for theirs, extra_point in ((ddim, False), (dpm, True)):
            theirs.set_timesteps(steps)
            got = schedule.timesteps(steps, spacing, extra_point=extra_point)
            # diffusers' trailing spacing ends with a timestep too many for some counts; the first `steps` are right
            np.testing.assert_array_equal(got, theirs.timesteps.numpy()[:steps])


@pytest.mark.parametrize("extra_point", [False, True], ids=["plain", "extra_point"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_step_count_gives_falling_timesteps(spacing, extra_point):
    schedule = NoiseSchedule.linear(37)
    for steps in range(1, 38):
        t = schedule.timesteps(steps, spacing, extra_point=extra_point)
        assert t.dtype == np.int64
        assert len(t) == steps
        assert (np.diff(t) < 0).all()
        assert t[-1] >= 0
        assert t[0] <= 36
        if spacing != "leading":
            assert t[0] == 36


def test_fractional_linspace_interpolates_the_noise_level():
    schedule = VP["linear"]
    t = schedule.timesteps(4, "linspace", rounded=False)
    np.testing.assert_allclose(t, [999, 666, 333, 0])
    t = schedule.timesteps(3, "linspace", rounded=False)
    alpha, sigma = schedule.at(t)
    np.testing.assert_allclose(sigma[1] / alpha[1], schedule.noise_level[499:501].mean(), rtol=1e-14)
    np.testing.assert_allclose(alpha[1] ** 2 + sigma[1] ** 2, 1, rtol=1e-15)
    assert alpha[0] == schedule.alpha[999]


@each({name: schedule for name, schedule in ALL.items() if name != "zero_terminal"})
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_sigma_spacings_span_the_schedule(schedule, spacing):
    steps = min(9, schedule.num_train_timesteps)
    levels = schedule.sigmas(steps, spacing)
    assert (np.diff(levels) < 0).all()
    np.testing.assert_allclose(levels[[0, -1]], schedule.noise_level[[-1, 0]], rtol=1e-12)
    np.testing.assert_allclose(schedule.timestep_of(levels)[[0, -1]], [schedule.num_train_timesteps - 1, 0], atol=1e-9)
    assert schedule.sigmas(1, spacing)[0] == pytest.approx(schedule.noise_level[-1], rel=1e-12)


def test_sigma_spacings_follow_their_formulas():
    schedule = VP["linear"]
    karras = schedule.sigmas(3, "karras", sigma_min=0.1, sigma_max=10.0)
    assert karras[1] == pytest.approx(((0.1 ** (1 / 7) + 10 ** (1 / 7)) / 2) ** 7, rel=1e-13)
    assert schedule.sigmas(3, "exponential", sigma_min=0.1, sigma_max=10.0)[1] == pytest.approx(1.0, rel=1e-13)
    assert schedule.sigmas(3, "beta", sigma_min=0.1, sigma_max=10.0)[1] == pytest.approx(5.05, rel=1e-13)
    stats = pytest.importorskip("scipy.stats")
    probability = np.linspace(0, 1, 101)
    np.testing.assert_allclose(beta_quantile(probability), stats.beta.ppf(probability, 0.6, 0.6), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.linear(0), "num_train_timesteps is 0"),
        (lambda: NoiseSchedule.linear(beta_end=1.0), "beta_end is 1.0"),
        (lambda: NoiseSchedule.cosine(max_beta=0.0), "max_beta is 0.0"),
        (lambda: NoiseSchedule.from_betas([]), "at least one value"),
        (lambda: NoiseSchedule.from_betas([[0.1]]), "one-dimensional"),
        (lambda: NoiseSchedule.from_betas([0.1, math.nan]), "betas range"),
        (lambda: NoiseSchedule.from_betas([1.0, 0.5]), "betas range"),
        (lambda: NoiseSchedule.flow(shift=0.0), "shift is 0.0"),
        (lambda: NoiseSchedule.edm(sigma_min=1.0, sigma_max=0.5), "less than sigma_max"),
        (lambda: NoiseSchedule.edm(sigma_data=math.inf), "sigma_data is inf"),
        (lambda: NoiseSchedule.flow().rescale_zero_terminal_snr(), "needs a vp schedule"),
        (lambda: NoiseSchedule.from_config({"type": "quadratic"}), "type='quadratic'"),
        (lambda: NoiseSchedule.from_config({"type": "flow", "beta_end": 0.1}), "does not describe a 'flow'"),
        (lambda: VP["linear"].timesteps(0), "num_inference_steps is 0"),
        (lambda: VP["linear"].timesteps(1001), "1 to 1000"),
        (lambda: VP["linear"].timesteps(5, "even"), "accepted are leading"),
        (lambda: VP["linear"].timesteps(5, "leading", steps_offset=500), "steps_offset=500"),
        (lambda: VP["linear"].at([1000]), "accepted is"),
        (lambda: VP["linear"].sigmas(5, "even"), "accepted are karras"),
        (lambda: VP["linear"].sigmas(5, "karras", sigma_min=9.0, sigma_max=1.0), "sigma_min=9.0"),
        (lambda: VP["zero_terminal"].sigmas(5, "karras"), "finite largest noise level"),
        (lambda: VP["linear"].training_table("eps"), "prediction_type is 'eps'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
