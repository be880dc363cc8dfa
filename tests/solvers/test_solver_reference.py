"""Five solvers against textbook loops that share no code with them, over whole trajectories in float64."""

import math

import numpy as np
import pytest
import torch

from fastdiff import reference
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(beta_start=0.00085, beta_end=0.012),
    "cosine": NoiseSchedule.cosine(),
    "zero_terminal": NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "edm": NoiseSchedule.edm(),
}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm")
SOLVERS = {
    "ddpm": ("ddpm", {}),
    "ddpm-fixed_large": ("ddpm", {"variance": "fixed_large"}),
    "ddim": ("ddim", {}),
    "ddim-eta": ("ddim", {"eta": 0.7}),
    "ddim-clipped_output": ("ddim", {"eta": 0.3, "use_clipped_model_output": True}),
    "euler": ("euler", {}),
    "euler_a": ("euler_a", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
}
LAYOUTS = {"euler": {"rounded": False}, "euler_a": {"rounded": False}, "dpmpp_2m": {"extra_point": True}}
WALKS = [
    ("leading", 10, None),
    ("leading", 50, 1.0),
    ("trailing", 1, None),
    ("trailing", 5, 1.0),
    ("linspace", 2, None),
]
WALKS += [("trailing", 10, None), ("karras", 1, 1.0), ("karras", 5, None), ("exponential", 6, None), ("beta", 5, 1.0)]


class TextbookPoints:
    """The points of a walk and the network's x0 and eps at each of them, by the papers' formulas."""

    def __init__(self, network, schedule, solver, steps, spacing, prediction_type):
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type
        if spacing in ("leading", "trailing", "linspace"):
            self.t = schedule.timesteps(steps, spacing, **LAYOUTS.get(solver, {}))
            alpha, sigma = schedule.at(self.t)
        else:
            levels = schedule.sigmas(steps, spacing)
            self.t = schedule.timestep_of(levels)
            alpha, sigma = schedule.from_noise_level(levels)
        self.alpha, self.sigma = alpha.tolist(), sigma.tolist()
        norm = np.hypot(alpha, sigma)
        self.norm = norm.tolist()  # x / norm is variance preserving
        self.exact = schedule.kind == "vp" and self.t.dtype == np.int64
        self.bars = schedule.alphas_cumprod[self.t] if self.exact else (alpha / norm) ** 2

    def x0_and_eps(self, i, x):
        alpha, sigma, norm = self.alpha[i], self.sigma[i], self.norm[i]
        if self.prediction_type == "edm":
            x, sigma = x / alpha, sigma / alpha
            x0 = reference.edm_denoiser(self.network)(x, sigma)
            return x0, (x - x0) / sigma
        t = sigma * self.schedule.num_train_timesteps if self.schedule.kind == "flow" else float(self.t[i])
        output = self.network(x, t)
        if self.prediction_type == "v_prediction":
            x, alpha, sigma = x / norm, alpha / norm, sigma / norm
        return reference.x0_and_eps(output, x, alpha, sigma, self.prediction_type)

    def v(self, x, i):
        """A v-prediction model of x / norm, told i: a form that every loop takes and that is finite at alpha = 0."""
        alpha, sigma, norm = self.alpha[i], self.sigma[i], self.norm[i]
        x0, eps = self.x0_and_eps(i, x * norm)
        return alpha / norm * eps - sigma / norm * x0


def textbook(points, solver, options, unit, noise_fn, clip_sample):
    """The walk of a solver by `fastdiff.reference`, with alphas, sigmas and states in the form its loop is for."""
    steps, kind = range(len(points.t)), points.schedule.kind
    levels = [s / a if a > 0 else math.inf for a, s in zip(points.alpha, points.sigma)]
    exploding = solver in ("euler", "euler_a") and math.isfinite(levels[0]) and kind != "flow"
    start = unit * (levels[0] if exploding else points.sigma[0] if kind != "vp" else 1.0)
    if solver in ("euler", "euler_a") and kind == "vp" and not exploding:
        start = unit  # from alpha = 0

    def denoise(x, sigma):
        i = levels.index(sigma)
        return clip(points.x0_and_eps(i, x * points.alpha[i])[0])

    def clip(x0):
        return x0 if clip_sample is None else x0.clamp(-clip_sample, clip_sample)

    def velocity(x, t):
        i = min(steps, key=lambda i: abs(points.sigma[i] - t / 1000))
        x0 = clip(points.x0_and_eps(i, x)[0])
        return (x - x0) / points.sigma[i]

    if exploding and solver == "euler":
        return reference.euler(denoise, start, sigmas=[*levels, 0.0])
    if exploding:
        return reference.euler_ancestral(denoise, start, sigmas=[*levels, 0.0], noise_fn=noise_fn)
    if solver == "euler" and kind == "flow":
        return reference.flow_euler(velocity, start, sigmas=[*points.sigma, 0.0])
    common = {"timesteps": steps, "prediction_type": "v_prediction", "clip_sample": clip_sample}
    x = start / points.norm[0]
    if solver == "dpmpp_2m":
        alphas = [a / n for a, n in zip(points.alpha, points.norm)]
        sigmas = [s / n for s, n in zip(points.sigma, points.norm)]
        # A change of variables by norm leaves the exponential integrator's steps alone.
        return reference.dpmpp_2m(points.v, x, alphas=alphas, sigmas=sigmas, **common)
    bars = points.bars.tolist()
    if solver == "ddpm":
        return reference.ddpm(points.v, x, alphas_cumprod=bars, noise_fn=noise_fn, **common, **options)
    if solver in ("euler", "euler_a"):  # where x / alpha does not exist: both are DDIM (Song et al. 2021, section 4.3)
        options = {"eta": float(solver == "euler_a"), "use_clipped_model_output": True}
    return reference.ddim(points.v, x, alphas_cumprod=bars, noise_fn=noise_fn, **common, **options)


def has_walk(schedule, prediction_type, spacing):
    from_alpha_0 = schedule.alpha[-1] == 0 and spacing != "leading"
    if from_alpha_0 and spacing in ("karras", "exponential", "beta") and schedule.kind == "vp":
        return False
    return not (from_alpha_0 and prediction_type in ("epsilon", "edm"))


def tolerance(points, init_noise_sigma):
    # 1e-12, and what the textbook form itself loses. Euler's x + (sigma_next - sigma) * d cancels a state as large
    # as the first sigma: a few units (8) of 2^-53 of it. The loops in ᾱ form 1 - ᾱ; where the schedule has no ᾱ of
    # its own, that is off by 2^-53 / (1 - ᾱ) at the least noisy point, and enters a walk a few times (4).
    exploding = 8 * 2**-53 * init_noise_sigma if init_noise_sigma > 1 else 0.0
    return 1e-12 + exploding + (0.0 if points.exact else 4 * 2**-53 / (1 - points.bars.max()))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("solver", "options"), SOLVERS.values(), ids=SOLVERS)
def test_walk_equals_textbook(solver, options, schedule, prediction_type, walk):
    for spacing, steps, clip_sample in WALKS:
        if not has_walk(schedule, prediction_type, spacing):
            continue
        named = "timestep_spacing" if spacing in ("leading", "trailing", "linspace") else "sigma_spacing"
        arguments = {"prediction_type": prediction_type, named: spacing, "clip_sample": clip_sample}
        table = build(solver, schedule, steps, **arguments, **options)
        got = walk.run(table)
        points = TextbookPoints(walk.network, schedule, solver, steps, spacing, prediction_type)
        want = textbook(points, solver, options, walk.unit, walk.noise_fn, clip_sample)
        error = (got - want).abs().max() / want.abs().max()
        bound = tolerance(points, table.init_noise_sigma)
        assert error <= bound, f"{spacing}, {steps} steps, clip_sample={clip_sample}: {error:.1e} > {bound:.1e}"


def test_a_wrong_coefficient_is_noticed(walk):
    table = build("ddim", SCHEDULES["linear"], 5)
    table.columns["c0"][2] *= 1 + 1e-10
    points = TextbookPoints(walk.network, SCHEDULES["linear"], "ddim", 5, "trailing", "epsilon")
    want = textbook(points, "ddim", {}, walk.unit, walk.noise_fn, None)
    assert (walk.run(table) - want).abs().max() / want.abs().max() > 1e-12


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m"])
def test_one_step_is_the_data_prediction(solver, walk):
    schedule = SCHEDULES["cosine"]
    table = build(solver, schedule, 1, prediction_type="sample")
    start = walk.unit * table.init_noise_sigma * table.columns["c_in"][0]
    torch.testing.assert_close(walk.run(table), walk.network(start, 999.0), rtol=1e-12, atol=1e-12)
