"""The five solvers against diffusers' schedulers over whole trajectories.

Once with diffusers' source in float64 (float32 replaced in the text, then executed), where both must agree to 1e-9, and
once with the schedulers as they are. The engine differs from diffusers on purpose where diffusers takes t - N // n for
the next timestep (DDIM, DDPM: the two agree for leading spacing, and for trailing spacing when n divides N), where it
draws noise in a last DDPM step that ends at x0 (t > 0: leading spacing avoids it), and in the noise that a leading
Euler walk starts from (both sides get the engine's here). The cases below are those where both mean the same walk.
"""

import functools
import importlib
import inspect
import sys
import types

import numpy as np
import pytest
import torch

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build

pytest.importorskip("diffusers")

LINEAR = {"beta_schedule": "linear"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(beta_start=0.00085, beta_end=0.012),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
CLASSES = {
    "ddpm": "ddpm.DDPMScheduler",
    "ddim": "ddim.DDIMScheduler",
    "euler": "euler_discrete.EulerDiscreteScheduler",
    "euler_a": "euler_ancestral_discrete.EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "dpmsolver_multistep.DPMSolverMultistepScheduler",
    "edm_euler": "edm_euler.EDMEulerScheduler",
    "edm_dpmpp_2m": "edm_dpmsolver_multistep.EDMDPMSolverMultistepScheduler",
    "flow_euler": "flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler",
}


@functools.cache
def float64_module(name: str) -> types.ModuleType:
    """diffusers' module with every float32 made a float64."""
    original = importlib.import_module(name)
    module = types.ModuleType(f"{name}_float64")
    module.__package__ = original.__package__
    sys.modules[module.__name__] = module  # dataclasses look their module up
    source = inspect.getsource(original).replace("torch.float32", "torch.float64").replace("np.float32", "np.float64")
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


def diffusers_walk(walk, monkeypatch, scheduler, dtype, config, steps, start, *, step_options=None, sigmas=None):
    """The end of a trajectory of a diffusers scheduler from `start`, with the walk's network and noise."""
    module_name, class_name = CLASSES[scheduler].split(".")
    module_name = f"diffusers.schedulers.scheduling_{module_name}"
    module = float64_module(module_name) if dtype == torch.float64 else importlib.import_module(module_name)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tensors made of Python numbers
    try:
        return _steps(walk, monkeypatch, module, class_name, dtype, config, steps, start, step_options, sigmas)
    finally:
        torch.set_default_dtype(default)


def _steps(walk, monkeypatch, module, class_name, dtype, config, steps, start, step_options, sigmas):
    normals = iter(walk.normals.to(dtype))
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(normals))
    theirs = getattr(module, class_name)(**config)
    if sigmas is None:
        theirs.set_timesteps(steps)
    else:
        theirs.set_timesteps(sigmas=sigmas)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)
    x = start.to(dtype)
    for t in theirs.timesteps:
        model_input = theirs.scale_model_input(x, t) if hasattr(theirs, "scale_model_input") else x
        x = theirs.step(walk.network(model_input, float(t)), t, x, **(step_options or {})).prev_sample
    assert x.dtype == dtype
    return x


def cases():
    """(id, (solver, schedule, steps, arguments of build), (diffusers' scheduler, configuration, further arguments))."""
    betas = {"linear": LINEAR, "scaled_linear": SCALED, "squaredcos_cap_v2": COSINE}
    no_clip, final = {"clip_sample": False}, {"set_alpha_to_one": True}
    for name, config in betas.items():
        for prediction_type in ("epsilon", "v_prediction", "sample"):
            if name == "linear" and prediction_type == "sample":
                continue
            vp = {**config, "prediction_type": prediction_type}
            ours = {"prediction_type": prediction_type}
            kind = f"{name}-{prediction_type}"
            for variance in ("fixed_small", "fixed_large"):
                yield (
                    f"ddpm-{variance}-{kind}",
                    ("ddpm", name, 10, {**ours, "variance": variance, "timestep_spacing": "leading"}),
                    ("ddpm", {**vp, **no_clip, "variance_type": variance, "timestep_spacing": "leading"}, {}),
                )
            for spacing, steps in (("leading", 7), ("trailing", 50)):
                yield (
                    f"ddim-{spacing}-{kind}",
                    ("ddim", name, steps, {**ours, "eta": 0.4, "timestep_spacing": spacing}),
                    ("ddim", {**vp, **no_clip, **final, "timestep_spacing": spacing}, {"step_options": {"eta": 0.4}}),
                )
                yield (
                    f"euler-{spacing}-{kind}",
                    ("euler", name, steps, {**ours, "timestep_spacing": spacing}),
                    ("euler", {**vp, "timestep_spacing": spacing}, {}),
                )
            for spacing, steps in (
                ("leading", 5),
                ("linspace", 10),
                ("trailing", 20),
                ("linspace", 2),
                ("linspace", 1),
            ):
                yield (
                    f"dpmpp_2m-{spacing}-{steps}-{kind}",
                    ("dpmpp_2m", name, steps, {**ours, "timestep_spacing": spacing}),
                    ("dpmpp_2m", {**vp, "timestep_spacing": spacing}, {}),
                )
            if prediction_type != "sample":
                yield (
                    f"euler_a-linspace-{kind}",
                    ("euler_a", name, 10, {**ours, "timestep_spacing": "linspace"}),
                    ("euler_a", {**vp, "timestep_spacing": "linspace"}, {}),
                )
    for clipped in (False, True):
        yield (
            f"ddim-clip-{clipped}",
            ("ddim", "linear", 10, {"clip_sample": 0.8, "use_clipped_model_output": clipped}),
            (
                "ddim",
                {**LINEAR, **final, "clip_sample": True, "clip_sample_range": 0.8, "timestep_spacing": "trailing"},
                {"step_options": {"use_clipped_model_output": clipped}},
            ),
        )
    yield (
        "ddpm-clip",
        ("ddpm", "linear", 10, {"clip_sample": 1.0, "timestep_spacing": "leading"}),
        ("ddpm", {**LINEAR, "clip_sample": True, "timestep_spacing": "leading"}, {}),
    )
    yield (
        "ddim-zero_terminal",
        ("ddim", "zero_terminal", 10, {"prediction_type": "v_prediction"}),
        (
            "ddim",
            {**SCALED, **no_clip, **final, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
            | {"rescale_betas_zero_snr": True},
            {},
        ),
    )
    yield (
        "dpmpp_2m-heun",
        ("dpmpp_2m", "linear", 20, {"solver_type": "heun"}),
        ("dpmpp_2m", {**LINEAR, "solver_type": "heun", "timestep_spacing": "trailing"}, {}),
    )
    for spacing in ("karras", "exponential", "beta"):
        # linspace: diffusers' Euler takes the ends of these spacings from its timesteps
        config = {**SCALED, f"use_{spacing}_sigmas": True, "timestep_spacing": "linspace"}
        yield f"euler-{spacing}", ("euler", "scaled_linear", 8, {"sigma_spacing": spacing}), ("euler", config, {})
    for steps in (1, 9):
        ours = {"prediction_type": "edm", "sigma_spacing": "karras"}
        yield f"edm-euler-{steps}", ("euler", "edm", steps, ours), ("edm_euler", {}, {})
    yield "edm-dpmpp_2m", ("dpmpp_2m", "edm", 9, ours), ("edm_dpmpp_2m", {}, {})
    flow = {"prediction_type": "flow_prediction"}
    yield "flow-linspace", ("euler", "flow", 7, flow | {"timestep_spacing": "linspace"}), ("flow_euler", {}, {})
    # given sigmas, because diffusers shifts the last of its own twice
    sigmas = {"sigmas": (1 - np.arange(8) / 8).tolist()}
    yield "flow-shifted", ("euler", "flow_shifted", 8, flow), ("flow_euler", {"shift": 3.0}, sigmas)


ALL_SCHEDULES = SCHEDULES | {
    "zero_terminal": SCHEDULES["scaled_linear"].rescale_zero_terminal_snr(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(),
    "flow_shifted": NoiseSchedule.flow(shift=3.0),
}
CASES = [pytest.param(ours, theirs, id=name) for name, ours, theirs in cases()]


def relative(error, reference):
    return (error.double().abs().max() / reference.double().abs().max()).item()


@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_walk_equals_diffusers_in_float64(ours, theirs, walk, monkeypatch):
    solver, schedule, steps, arguments = ours
    scheduler, config, further = theirs
    table = build(solver, ALL_SCHEDULES[schedule], steps, **arguments)
    start = walk.unit * table.init_noise_sigma
    want = diffusers_walk(walk, monkeypatch, scheduler, torch.float64, config, steps, start, **further)
    assert relative(walk.run(table) - want, want) <= 1e-9


@pytest.mark.parametrize(("ours", "theirs"), CASES[::5])
def test_float32_walk_is_as_near_as_diffusers_own_rounding(ours, theirs, walk, monkeypatch):
    solver, schedule, steps, arguments = ours
    scheduler, config, further = theirs
    table = build(solver, ALL_SCHEDULES[schedule], steps, **arguments)
    start = walk.unit * table.init_noise_sigma
    exact = diffusers_walk(walk, monkeypatch, scheduler, torch.float64, config, steps, start, **further)
    theirs_32 = diffusers_walk(walk, monkeypatch, scheduler, torch.float32, config, steps, start, **further)
    ours_32 = walk.run(table, dtype=torch.float32)
    # Two float32 walks differ by no more than their distances from the exact one. The engine's tables are exact, so its
    # distance is rounding: each product of a row (x, x0 and the two inside x0) is off by a few (4) units of 2^-24.
    c = table.columns
    inner = np.abs(c["px"]) + np.abs(c["pm"])
    products = (np.abs(c["cx"]) + np.abs(c["c0"]) * inner + np.abs(c["cm"]) + c["cz"]).max()
    largest = max(1.0, table.init_noise_sigma, exact.abs().max().item())
    bound = relative(theirs_32 - exact, exact) + 4 * steps * 2**-24 * products * largest / exact.abs().max().item()
    assert relative(ours_32 - theirs_32, exact) <= bound
