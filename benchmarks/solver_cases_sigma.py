"""Cases of the solvers of k-diffusion's family, on noise levels sigma / alpha or on straight paths."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.solver_cases import (
    SCHEDULES,
    SolverCase,
    Walk,
    diffusers_scheduler,
    engine_walk,
    network,
    normals,
    relative_error,
)
from benchmarks.solver_cases_ancestral import walks
from fastdiff.schedule import NoiseSchedule

EULER_WALKS = (
    ("linear", "epsilon", "linspace", 10),
    ("scaled_linear", "v_prediction", "trailing", 7),
    ("cosine", "sample", "leading", 20),
    ("scaled_linear", "epsilon", "karras", 8),
    ("scaled_linear", "epsilon", "exponential", 8),
    ("scaled_linear", "v_prediction", "beta", 8),
)

FLOW_WALKS = (("flow", "flow_prediction", "linspace", 7), ("flow", "flow_prediction", "linspace", 1))
# diffusers' KDPM2 classes round Karras spacing's timesteps
KDPM2_WALKS = tuple(walk for walk in EULER_WALKS if walk[1] != "sample" and walk[2] != "karras")


@dataclass(frozen=True, kw_only=True)
class KarrasVeWalk(Walk):
    """Algorithm 2 of Karras et al. by diffusers' class, given the noise levels; its model predicts -eps."""

    def error(self, solver: str, options: Mapping[str, Any], diffusers: str) -> float:
        """Relative distance of the two ends."""
        schedule = SCHEDULES[self.schedule][0]
        levels = [*schedule.sigmas(self.steps, "karras").tolist(), 0.0]
        start, draws = normals()[0] * levels[0], iter(normals()[1:])
        x = start
        churn = {"s_churn": options["s_churn"], "s_min": 0.0, "s_max": 1e3, "s_noise": options["s_noise"]}
        with diffusers_scheduler(diffusers, churn, lambda *args, **kwargs: next(draws)) as theirs:
            theirs.set_timesteps(self.steps)
            for sigma, sigma_next in itertools.pairwise(levels):
                x_hat, sigma_hat = theirs.add_noise_to_input(x, sigma)
                output = theirs.step(-network(x_hat, 0.0), sigma_hat, sigma_next, x_hat)
                x = output.prev_sample
                if sigma_next > 0:
                    more = (sigma_hat, sigma_next, x_hat, x, output.derivative)
                    x = theirs.step_correct(-network(x, 0.0), *more).prev_sample
        table = self.table(solver, options)
        return relative_error(engine_walk(table, start, model=lambda x, t: network(x, 0.0)), x)


CASES = (
    SolverCase(
        name="euler",
        solver="euler",
        diffusers="EulerDiscreteScheduler",
        k_diffusion="sample_euler",
        walks=walks(*EULER_WALKS),
        order=1,
    ),
    SolverCase(
        name="euler_a",
        solver="euler_a",
        diffusers="EulerAncestralDiscreteScheduler",
        k_diffusion="sample_euler_ancestral",
        # its class takes no data predictions and no sigma spacings
        walks=walks(*EULER_WALKS[:2], ("cosine", "epsilon", "leading", 20)),
        order=1,
        order_steps=120,
        stochastic=True,
    ),
    SolverCase(
        name="euler (flow)",
        solver="euler",
        diffusers="FlowMatchEulerDiscreteScheduler",
        walks=(
            *walks(*FLOW_WALKS),
            # sigmas given, because diffusers shifts the last of its own twice
            Walk(
                schedule="flow_shifted",
                prediction_type="flow_prediction",
                spacing="trailing",
                steps=8,
                set_timesteps={"sigmas": [1 - i / 8 for i in range(8)]},
            ),
        ),
        order=1,
        order_schedule=NoiseSchedule.flow(),
        order_arguments={"sigma_spacing": None, "timestep_spacing": "linspace"},
    ),
    SolverCase(
        name="euler (edm)",
        solver="euler",
        diffusers="EDMEulerScheduler",
        k_diffusion="sample_euler",
        walks=walks(("edm", "edm", "karras", 1), ("edm", "edm", "karras", 9)),
        order=1,
        order_arguments={"prediction_type": "edm"},
    ),
    SolverCase(
        name="dpmpp_2m (edm)",
        solver="dpmpp_2m",
        diffusers="EDMDPMSolverMultistepScheduler",
        k_diffusion="sample_dpmpp_2m",
        walks=walks(("edm", "edm", "karras", 1), ("edm", "edm", "karras", 9)),
        order=2,
        order_arguments={"prediction_type": "edm"},
    ),
    SolverCase(
        name="heun",
        solver="heun",
        diffusers="HeunDiscreteScheduler",
        k_diffusion="sample_heun",
        walks=walks(*EULER_WALKS),
        order=2,
    ),
    SolverCase(
        name="flow_heun",
        solver="flow_heun",
        diffusers="FlowMatchHeunDiscreteScheduler",
        walks=walks(*FLOW_WALKS),
        order=2,
        order_schedule=NoiseSchedule.flow(),
        order_arguments={"sigma_spacing": None, "timestep_spacing": "linspace"},
    ),
    SolverCase(
        name="edm",
        solver="edm",
        k_diffusion="sample_heun",
        order=2,
        order_arguments={"prediction_type": "edm", "sigma_spacing": "karras"},
    ),
    SolverCase(
        name="edm s_churn=3",
        solver="edm",
        options={"s_churn": 3.0, "s_noise": 1.007},
        diffusers="KarrasVeScheduler",
        k_diffusion="sample_heun",
        walks=(KarrasVeWalk(schedule="edm", spacing="karras", steps=9),),
    ),
    SolverCase(
        name="kdpm2",
        solver="kdpm2",
        diffusers="KDPM2DiscreteScheduler",
        k_diffusion="sample_dpm_2",
        walks=walks(*KDPM2_WALKS),
        order=2,
    ),
    SolverCase(
        name="kdpm2_a",
        solver="kdpm2_a",
        diffusers="KDPM2AncestralDiscreteScheduler",
        k_diffusion="sample_dpm_2_ancestral",
        walks=walks(*KDPM2_WALKS),
        order=2,
        stochastic=True,
    ),
    *(
        SolverCase(
            name=f"lms order={order}",
            solver="lms",
            options={"order": order},
            diffusers="LMSDiscreteScheduler",
            k_diffusion="sample_lms",
            walks=walks(*EULER_WALKS, step_options={"order": order}),
            order=order,
            order_steps=60 if order < 3 else 160,
        )
        for order in (1, 2, 3, 4)
    ),
)
