"""Cases of the exponential integrators: DPM-Solver, DPM-Solver++, UniPC, DEIS and SA-Solver (see `solver_cases`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.solver_cases import SolverCase, Walk, diffusers_walk, engine_walk, normals, relative_error
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import Grid, deis, dpm, dpm_single, sa, unipc
from fastdiff.table import StepTable

FUNCTIONS = {
    "dpmpp": dpm.dpmpp,
    "dpm": dpm.dpm,
    "dpmpp_sde": dpm.dpmpp_sde,
    "dpm_sde": dpm.dpm_sde,
    "dpmpp_single": dpm_single.dpmpp_single,
    "dpm_single": dpm_single.dpm_single,
    "dpmpp_single_sde": dpm_single.dpmpp_single_sde,
    "unipc": unipc.unipc,
    "deis": deis.deis,
    "sa": sa.sa,
}
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# A last row of order 1 has no corrector after it and costs a walk that ends above sigma = 0 its order.
FULL_ORDER = {"lower_order_final": False}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}


class PointsWalk(Walk):
    """A walk over the points that the diffusers scheduler chose, whatever they are; `ours` are the solver's options."""

    def error(self, solver: str, options: Mapping[str, Any], diffusers: str) -> float:
        """Relative distance of the two ends."""
        chosen: list[Any] = []
        start = normals()[0]
        want = diffusers_walk(diffusers, self.config, self.steps, start, prepare=chosen.append)
        sigmas, timesteps = chosen[0].sigmas.numpy(), chosen[0].timesteps.numpy()
        if self.config.get("use_flow_sigmas"):
            alpha, sigma = 1 - sigmas, sigmas
        else:
            alpha, sigma = 1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2)
        grid = Grid.from_points(alpha, sigma, timesteps, prediction_type=self.prediction_type or "epsilon")
        table = StepTable.from_rows(FUNCTIONS[solver](grid, **{**options, **self.ours}))
        return relative_error(engine_walk(table, start), want)


class LinspaceWalk(Walk):
    """A walk by `build` that the scheduler can only take with linspace timesteps, so it has no option for them."""

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the diffusers scheduler."""
        return {name: value for name, value in super().config.items() if name != "timestep_spacing"}


FLOW_CONFIG = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def _ending_at_zero(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Walk, ...]:
    """Walks by `build`, whose points both sides choose by themselves, and one on a flow schedule."""
    common: dict[str, Any] = {"ours": ours, "theirs": theirs}
    flow: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "spacing": None,
        "ours": ours,
        "theirs": {**FLOW_CONFIG, **theirs},
    }
    return (
        Walk(schedule="linear", spacing="leading", steps=5, **common),
        Walk(schedule="linear", spacing="trailing", steps=20, **common),
        Walk(schedule="scaled_linear", prediction_type="v_prediction", spacing="linspace", steps=16, **common),
        Walk(schedule="cosine", prediction_type="sample", spacing="trailing", steps=7, **common),
        Walk(schedule="scaled_linear", spacing="linspace", steps=1, **common),
        Walk(schedule="scaled_linear", spacing="linspace", steps=2, **common),
        PointsWalk(schedule="scaled_linear", spacing="karras", steps=9, **common),
        PointsWalk(schedule="flow", steps=8, **flow),
    )


def _ending_above_zero(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Walk, ...]:
    """Walks over the scheduler's points to its smallest sigma, where no step is infinitely long."""
    common: dict[str, Any] = {"ours": ours, "theirs": theirs}
    return (
        PointsWalk(schedule="linear", spacing="leading", steps=6, **common),
        PointsWalk(schedule="scaled_linear", prediction_type="v_prediction", spacing="linspace", steps=18, **common),
        PointsWalk(schedule="cosine", prediction_type="sample", spacing="linspace", steps=9, **common),
        PointsWalk(schedule="linear", spacing="linspace", steps=1, **common),
    )


def _dpm(name: str, solver: str, k: int, **case: Any) -> SolverCase:
    """A DPM-Solver of diffusers' multistep scheduler."""
    algorithm = {"dpmpp": "dpmsolver++", "dpm": "dpmsolver", "dpmpp_sde": "sde-dpmsolver++", "dpm_sde": "sde-dpmsolver"}
    options = {"order": k, **case.pop("options", {})}
    theirs: dict[str, Any] = {"solver_order": k, "algorithm_type": algorithm[solver]}
    if "solver_type" in options:
        theirs["solver_type"] = options["solver_type"]
    ours = {"third_order": "diffusers"} if k == 3 else {}
    walks = _ending_above_zero(ours, {**theirs, **SIGMA_MIN})
    if solver.startswith("dpmpp"):
        walks += _ending_at_zero(ours, theirs)
    return SolverCase(name=name, solver=solver, options=options, diffusers=MULTI, walks=walks, **case)


def _single(name: str, solver: str, k: int, solver_type: str, **case: Any) -> SolverCase:
    """A DPM-Solver of diffusers' single-step scheduler, which only knows linspace; it ends in groups of its own."""
    algorithm = {"dpmpp_single": "dpmsolver++", "dpm_single": "dpmsolver", "dpmpp_single_sde": "sde-dpmsolver++"}
    options = {"order": k, "solver_type": solver_type}
    theirs = {"solver_order": k, "algorithm_type": algorithm[solver], "solver_type": solver_type}
    theirs |= {"lower_order_final": True}
    ours = {"third_order": "diffusers"} if solver.endswith("sde") else {}
    to_sigma_min: dict[str, Any] = {"ours": ours, "theirs": {**theirs, **SIGMA_MIN}, "spacing": None}
    walks: tuple[Walk, ...] = (
        # numbers of steps that end in a whole group on both sides
        PointsWalk(schedule="linear", steps=6 * k - 1, **to_sigma_min),
        PointsWalk(schedule="cosine", prediction_type="sample", steps=2 * k - 1, **to_sigma_min),
        PointsWalk(schedule="scaled_linear", prediction_type="v_prediction", steps=1, **to_sigma_min),
    )
    if solver.startswith("dpmpp"):
        common: dict[str, Any] = {"ours": ours, "theirs": theirs, "spacing": "linspace"}
        walks += tuple(LinspaceWalk(steps=steps, **common) for steps in (1, 2, 6, 7, 8))
        walks += (
            LinspaceWalk(schedule="scaled_linear", prediction_type="v_prediction", steps=16, **common),
            LinspaceWalk(schedule="cosine", prediction_type="sample", steps=9, **common),
            PointsWalk(
                schedule="scaled_linear",
                steps=9,
                **{**common, "theirs": {**theirs, "use_karras_sigmas": True}, "spacing": None},
            ),
        )
    return SolverCase(name=name, solver=solver, options=options, diffusers=SINGLE, walks=walks, **case)


def _unipc(order: int, solver_type: str = "bh2", *, predict_x0: bool = True, **case: Any) -> SolverCase:
    options = {"order": order, "solver_type": solver_type, "predict_x0": predict_x0}
    theirs = {"solver_order": order, "solver_type": solver_type, "predict_x0": predict_x0}
    walks = _ending_above_zero({}, {**theirs, **SIGMA_MIN})
    if predict_x0 and solver_type == "bh2":  # diffusers' bh1 multiplies infinity by 0 in a step to sigma = 0
        walks += _ending_at_zero({}, theirs)
    name = f"unipc-{order}" + ("" if solver_type == "bh2" else "-bh1") + ("" if predict_x0 else "-noise")
    # the corrector lifts the order by one (Zhao et al. 2023, theorem 3.1)
    return SolverCase(
        name=name,
        solver="unipc",
        options=options,
        diffusers="UniPCMultistepScheduler",
        walks=walks,
        order=order + 1,
        order_steps=240,
        order_schedule=EARLY[0.1],
        order_arguments=FULL_ORDER,
        order_tolerance=0.2,
        **case,
    )


def _deis(order: int, **case: Any) -> SolverCase:
    return SolverCase(
        name=f"deis-{order}",
        solver="deis",
        options={"order": order},
        diffusers="DEISMultistepScheduler",
        walks=_ending_above_zero({}, {"solver_order": order}),
        order=order,
        **case,
    )


def _sa(name: str, predictor: int, corrector: int, tau: float, *, predict_x0: bool = True, **case: Any) -> SolverCase:
    """diffusers' scheduler draws noise in every step, and so does this one's where tau > 0."""
    options = {"predictor_order": predictor, "corrector_order": corrector, "tau": tau, "predict_x0": predict_x0}
    theirs: dict[str, Any] = {"predictor_order": predictor, "corrector_order": corrector}
    theirs |= {"algorithm_type": "data_prediction" if predict_x0 else "noise_prediction"}
    theirs |= {"tau_func": lambda t: torch.tensor(tau)}
    ours = {"solver_type": "simplified"} if predict_x0 else {}
    return SolverCase(
        name=name,
        solver="sa",
        options=options,
        diffusers="SASolverScheduler",
        walks=_ending_above_zero(ours, theirs),
        stochastic=tau > 0,
        order_arguments=FULL_ORDER,
        **case,
    )


# High orders show where the first rows, of low order, err less than the rest: from so much noise that x0 hardly depends
# on it. The error at one end of one trajectory may pass through 0 and then show any order, so the ends differ.
EARLY = {sigma: NoiseSchedule.edm(sigma_min=sigma, sigma_max=1e4) for sigma in (0.1, 0.5, 1.0)}
NOTE_3M = "diffusers and k-diffusion weigh the second difference by half of this and are of order 2"

CASES: tuple[SolverCase, ...] = (
    _dpm("dpmpp-1", "dpmpp", 1, order=1),
    _dpm("dpmpp_2m", "dpmpp", 2, order=2, k_diffusion="sample_dpmpp_2m"),
    _dpm("dpmpp_2m-heun", "dpmpp", 2, options={"solver_type": "heun"}, order=2),
    _dpm("dpmpp_3m", "dpmpp", 3, order=3, order_steps=120, order_schedule=EARLY[0.5], note=NOTE_3M),
    _dpm("dpm-1", "dpm", 1, order=1),
    _dpm("dpm-2", "dpm", 2, order=2),
    _dpm("dpm-2-heun", "dpm", 2, options={"solver_type": "heun"}, order=2),
    _dpm("dpm-3", "dpm", 3, order=3, order_steps=240, order_schedule=EARLY[0.5], note=NOTE_3M),
    _single("dpmpp_single-2", "dpmpp_single", 2, "midpoint", order=2),
    _single("dpmpp_single-3", "dpmpp_single", 3, "heun", order=3, order_steps=120),
    _single("dpmpp_single-3-midpoint", "dpmpp_single", 3, "midpoint", order=3),
    _single("dpm_single-2", "dpm_single", 2, "heun", order=2),
    _single("dpm_single-3", "dpm_single", 3, "heun", order=3),
    _dpm("dpmpp_sde-1", "dpmpp_sde", 1, stochastic=True, order=1),
    _dpm("dpmpp_2m_sde", "dpmpp_sde", 2, stochastic=True, order=2, k_diffusion="sample_dpmpp_2m_sde"),
    _dpm("dpmpp_2m_sde-heun", "dpmpp_sde", 2, options={"solver_type": "heun"}, stochastic=True, order=2),
    _dpm("dpmpp_3m_sde", "dpmpp_sde", 3, stochastic=True, order=2, k_diffusion="sample_dpmpp_3m_sde", note=NOTE_3M),
    _dpm("dpm_sde-1", "dpm_sde", 1, stochastic=True, order=1, order_steps=240, order_schedule=EARLY[0.5]),
    _dpm("dpm_sde-2", "dpm_sde", 2, stochastic=True, order=2),
    _single("dpmpp_single_sde-2", "dpmpp_single_sde", 2, "midpoint", stochastic=True, order=1, order_steps=240),
    _single("dpmpp_single_sde-3", "dpmpp_single_sde", 3, "heun", stochastic=True, order=1, order_steps=240),
    *(_unipc(order) for order in (1, 2, 3, 4)),
    *(_unipc(order, predict_x0=False) for order in (1, 2, 3, 4)),
    _unipc(2, "bh1"),
    _deis(1),
    _deis(2),
    _deis(3, order_steps=240, order_schedule=EARLY[0.5]),
    _sa("sa-2-2", 2, 2, 1.0, order=2, order_steps=480, order_schedule=EARLY[0.5]),
    _sa("sa-3-4", 3, 4, 0.6, order=2, order_steps=240, order_schedule=EARLY[0.1]),
    _sa("sa-2-2-ode", 2, 2, 0.0, order=2, order_steps=480, order_schedule=EARLY[1.0]),
    _sa("sa-3-3-ode", 3, 3, 0.0, order=3, order_steps=480, order_schedule=EARLY[1.0], order_tolerance=0.4),
    _sa("sa-3-3-noise", 3, 3, 0.6, predict_x0=False, order=2, order_steps=240, order_schedule=EARLY[0.1]),
)
