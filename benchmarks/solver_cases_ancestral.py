"""Cases of the solvers on alphas_cumprod: DDPM, DDIM and its inversion, PNDM, RePaint, and the distilled ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.solver_cases import (
    LINEAR,
    SCHEDULES,
    SolverCase,
    Walk,
    diffusers_scheduler,
    diffusers_walk,
    engine_walk,
    network,
    normals,
    relative_error,
)

NO_CLIP = {"clip_sample": False}
TO_ONE = {"clip_sample": False, "set_alpha_to_one": True}
CLIP = {"clip_sample": True, "clip_sample_range": 0.8, "set_alpha_to_one": True}


def walks(*settings: tuple[str, str, str, int], **common: Any) -> tuple[Walk, ...]:
    """Walks by (schedule, prediction type, spacing, steps)."""
    return tuple(
        Walk(schedule=schedule, prediction_type=prediction_type, spacing=spacing, steps=steps, **common)
        for schedule, prediction_type, spacing, steps in settings
    )


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

# diffusers tells a v-prediction model one timestep and reads its output at another; the engine reads it at the same one
INVERSE_WALKS = (
    ("linear", "epsilon", "leading", 7),
    ("cosine", "epsilon", "trailing", 20),
    ("scaled_linear", "epsilon", "leading", 50),
)
# steps of an even number of timesteps, so that both mean the same one halfway
PNDM_WALKS = (
    ("linear", "epsilon", "leading", 10),
    ("scaled_linear", "epsilon", "leading", 50),
    ("cosine", "epsilon", "leading", 4),
)
NOTE_PNDM = "compared for epsilon prediction; for v prediction diffusers combines outputs, not eps, and is of order 1"
LCM_WALKS = (
    ("scaled_linear", "epsilon", "trailing", 4),
    ("linear", "sample", "trailing", 1),
    ("scaled_linear", "v_prediction", "trailing", 8),
    ("zero_terminal", "v_prediction", "trailing", 4),
)


@dataclass(frozen=True, kw_only=True)
class RePaintWalk(Walk):
    """A walk whose forward jumps diffusers takes as single steps, with noise that adds up to one draw of ours."""

    def error(self, solver: str, options: Mapping[str, Any], diffusers: str) -> float:
        """Relative distance of the two ends."""
        schedule = SCHEDULES[self.schedule][0]
        jumps = {name: options[name] for name in ("jump_length", "jump_n_sample")}
        draws, known = iter(normals()[2:]), normals()[1] / 3
        mask = (normals()[-1] > 0).double()
        x, ours = normals()[0], []
        forward: list[tuple[float, Tensor]] = []

        def draw(*args: Any, **kwargs: Any) -> Tensor:
            ours.append(next(draws))
            return ours[-1]

        with diffusers_scheduler(diffusers, {**self.config, "eta": options["eta"]}, draw) as theirs:
            theirs.set_timesteps(self.steps, **jumps)
            before = math.inf
            for t in [*theirs.timesteps.tolist(), -1]:
                if t < before and forward:
                    # x grows by sqrt(1 - beta), and the noise before it too
                    total = torch.zeros_like(x)
                    for beta, z in forward:
                        total = math.sqrt(1 - beta) * total + math.sqrt(beta) * z
                    variance = 1 - math.prod(1 - beta for beta, _ in forward)
                    ours[len(ours) - len(forward) :] = [total / math.sqrt(variance)]
                    forward = []
                if t < 0:
                    break
                if t < before:
                    x = theirs.step(network(x, float(t)), t, x, known, mask).prev_sample
                    # the last step, to x0, keeps the known part as it is and adds no noise
                    del ours[len(ours) - (t == 0) :]
                else:
                    x = theirs.undo_step(x, int(before))
                    forward.append((float(schedule.betas[int(before)]), ours[-1]))
                before = t
        table = self.table(solver, options)
        got = engine_walk(table, normals()[0], noise=torch.stack(ours), known=known, mask=mask)
        return relative_error(got, x)


@dataclass(frozen=True, kw_only=True)
class LearnedVarianceWalk(Walk):
    """A walk of a model with twice the channels, the second half of which sets the variance."""

    def error(self, solver: str, options: Mapping[str, Any], diffusers: str) -> float:
        """Relative distance of the two ends."""

        def doubled(x: Tensor, t: float) -> Tensor:
            return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)

        config = {**self.config, "variance_type": options["variance"]}
        start = normals()[0][..., None]
        x = start
        c = self.table(solver, options).columns
        for i, z in zip(range(self.steps), normals()[1:, ..., None]):
            m, v = doubled(x, c["t"][i]).chunk(2, dim=1)
            x0 = c["px"][i] * x + c["pm"][i] * m
            x = c["cx"][i] * x + c["c0"][i] * x0 + c["cz"][i] * torch.exp(c["lv"][i] * v) * z
        want = diffusers_walk(diffusers, config, self.steps, start, model=doubled, noise=normals()[1:, ..., None])
        return relative_error(x, want)


CASES = (
    SolverCase(
        name="ddpm",
        solver="ddpm",
        diffusers="DDPMScheduler",
        guided_diffusion="p_sample_loop",
        walks=(
            *walks(*DDPM_WALKS, theirs=NO_CLIP),
            Walk(ours={"clip_sample": 1.0}, theirs={"clip_sample": True}),
        ),
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
        name="ddpm learned_range",
        solver="ddpm",
        options={"variance": "learned_range"},
        diffusers="DDPMScheduler",
        guided_diffusion="p_sample_loop",
        walks=tuple(
            LearnedVarianceWalk(schedule=schedule, steps=steps, prediction_type=prediction_type, theirs=NO_CLIP)
            for schedule, prediction_type, _, steps in DDPM_WALKS
        ),
    ),
    SolverCase(
        name="ddim",
        solver="ddim",
        diffusers="DDIMScheduler",
        guided_diffusion="ddim_sample_loop",
        walks=(
            *walks(*DDIM_WALKS, theirs=TO_ONE),
            Walk(ours={"clip_sample": 0.8}, theirs=CLIP),
            Walk(
                ours={"clip_sample": 0.8, "use_clipped_model_output": True},
                theirs=CLIP,
                step_options={"use_clipped_model_output": True},
            ),
        ),
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
    SolverCase(
        name="ddim_inverse",
        solver="ddim_inverse",
        diffusers="DDIMInverseScheduler",
        guided_diffusion="ddim_reverse_sample",
        walks=walks(*INVERSE_WALKS, theirs={"clip_sample": False}),
        order=1,
        order_steps=120,
        # a smaller range: the errors of the steps near the data, where it starts, grow with the noise
        order_schedule=LINEAR,
        order_arguments={"prediction_type": "epsilon"},
        note="compared for epsilon prediction; v prediction is read at the timestep the model is told",
    ),
    SolverCase(
        name="pndm",
        solver="pndm",
        diffusers="PNDMScheduler",
        walks=walks(*PNDM_WALKS, theirs={"set_alpha_to_one": True}),
        order=2,
        order_arguments={"prediction_type": "v_prediction"},
        note=NOTE_PNDM,
    ),
    SolverCase(
        name="pndm plms",
        solver="pndm",
        options={"plms": True},
        diffusers="PNDMScheduler",
        walks=walks(*PNDM_WALKS, theirs={"set_alpha_to_one": True, "skip_prk_steps": True}),
        order=2,
        order_arguments={"prediction_type": "v_prediction"},
        note=NOTE_PNDM,
    ),
    SolverCase(
        name="repaint",
        solver="repaint",
        options={"jump_length": 4, "jump_n_sample": 3, "eta": 1.0},
        diffusers="RePaintScheduler",
        walks=(RePaintWalk(schedule="short", steps=20, prediction_type=None, spacing=None, ours={"clip_sample": 1.0}),),
        note="compared at every timestep: with larger steps diffusers' forward jumps take betas of other timesteps",
    ),
    SolverCase(name="lcm", solver="lcm", diffusers="LCMScheduler", walks=walks(*LCM_WALKS, theirs=TO_ONE)),
    SolverCase(
        name="tcd",
        solver="tcd",
        diffusers="TCDScheduler",
        # diffusers ends at timestep 0 and not at x0
        walks=walks(*LCM_WALKS, theirs=TO_ONE, ours={"final_sigmas_type": "sigma_min"}),
    ),
    SolverCase(
        name="tcd eta=0",
        solver="tcd",
        options={"eta": 0.0},
        diffusers="TCDScheduler",
        walks=walks(*LCM_WALKS, theirs=TO_ONE, ours={"final_sigmas_type": "sigma_min"}, step_options={"eta": 0.0}),
        order=1,
    ),
    SolverCase(
        name="consistency",
        solver="consistency",
        diffusers="CMStochasticIterativeScheduler",
        walks=walks(*(("edm_short", "edm", "trailing", steps) for steps in (1, 2, 4, 8)), ours={"clip_sample": 1.0}),
    ),
)
