"""Cases of the solvers on alphas_cumprod: DDPM, DDIM, and what steps between timesteps without history."""

from __future__ import annotations

from benchmarks.solver_cases import SolverCase, Walk

NO_CLIP = {"clip_sample": False}
TO_ONE = {"clip_sample": False, "set_alpha_to_one": True}


def walks(*settings: tuple[str, str, str, int], **common: dict) -> tuple[Walk, ...]:
    """Walks by (schedule, prediction type, spacing, steps)."""
    names = ("schedule", "prediction_type", "spacing", "steps")
    return tuple(Walk(**dict(zip(names, setting)), **common) for setting in settings)


# diffusers takes t - N // n for the next timestep: the same as ours for leading spacing, for trailing if n divides N
DDIM_WALKS = (
    ("linear", "epsilon", "leading", 7),
    ("scaled_linear", "v_prediction", "leading", 20),
    ("cosine", "sample", "trailing", 50),
    ("scaled_linear", "epsilon", "trailing", 10),
    ("zero_terminal", "v_prediction", "trailing", 10),
)
# diffusers' DDPM draws noise in a last step that starts above timestep 0: leading spacing ends at 0
DDPM_WALKS = (
    ("linear", "epsilon", "leading", 10),
    ("scaled_linear", "v_prediction", "leading", 50),
    ("cosine", "sample", "leading", 7),
)

CASES = (
    SolverCase(
        name="ddpm",
        solver="ddpm",
        diffusers="DDPMScheduler",
        guided_diffusion="p_sample_loop",
        walks=walks(*DDPM_WALKS, theirs=NO_CLIP),
        order=1,
        order_steps=120,
        stochastic=True,
    ),
    SolverCase(
        name="ddpm fixed_large",
        solver="ddpm",
        options={"variance": "fixed_large"},
        diffusers="DDPMScheduler",
        guided_diffusion="p_sample_loop",
        walks=walks(*DDPM_WALKS, theirs={**NO_CLIP, "variance_type": "fixed_large"}),
    ),
    SolverCase(
        name="ddim",
        solver="ddim",
        diffusers="DDIMScheduler",
        guided_diffusion="ddim_sample_loop",
        walks=walks(*DDIM_WALKS, theirs=TO_ONE),
        order=1,
    ),
    SolverCase(
        name="ddim eta=0.4",
        solver="ddim",
        options={"eta": 0.4},
        diffusers="DDIMScheduler",
        guided_diffusion="ddim_sample_loop",
        walks=walks(*DDIM_WALKS, theirs=TO_ONE, step_options={"eta": 0.4}),
        order=1,
        stochastic=True,
    ),
)
