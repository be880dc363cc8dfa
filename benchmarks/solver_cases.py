"""Every solver with its names elsewhere, its distance from diffusers' scheduler and its measured order of convergence.

The cases serve the tests and the README's table (`python -m benchmarks.solver_table`). Distance: whole walks in float64
on a smooth network with fixed noise, against diffusers' own source with every float32 made a float64. Order: Gaussian
data, for which the ideal model and the solution of the probability-flow ODE are known.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.prediction import model_input_scale, prediction_target
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build
from fastdiff.table import StepTable, run_table

Network = Callable[[Tensor, float], Tensor]

LINEAR = NoiseSchedule.linear()
SCALED = NoiseSchedule.scaled_linear(beta_start=0.00085, beta_end=0.012)
# name: the engine's schedule, and the part of a diffusers configuration that means the same
SCHEDULES: dict[str, tuple[NoiseSchedule, dict[str, Any]]] = {
    "linear": (LINEAR, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (SCALED, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "zero_terminal": (
        SCALED.rescale_zero_terminal_snr(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    ),
    "short": (NoiseSchedule.linear(20), {"beta_schedule": "linear", "num_train_timesteps": 20}),
    "edm": (NoiseSchedule.edm(), {}),
    "edm_short": (NoiseSchedule.edm(num_train_timesteps=40), {}),
    "flow": (NoiseSchedule.flow(), {}),
    "flow_shifted": (NoiseSchedule.flow(shift=3.0), {"shift": 3.0}),
}
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
DIFFUSERS_SIGMA_SPACING = {"logsnr": "use_lu_lambdas"}


def network(x: Tensor, t: float) -> Tensor:
    """A smooth network whose slope is below 1, so that walks stay tame."""
    return 0.6 * torch.tanh(0.7 * x + math.sin(0.01 * t)) + 0.2 * x


@functools.cache
def normals(n: int = 400) -> Tensor:
    """Unit noise float64 [n, 3, 5]: the start, then the draws of a walk."""
    return torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@functools.cache
def float64_module(class_name: str) -> types.ModuleType:
    """The module of a diffusers scheduler, executed anew with every float32 made a float64."""
    original = importlib.import_module(getattr(importlib.import_module("diffusers"), class_name).__module__)
    module = types.ModuleType(f"{original.__name__}_float64")
    module.__package__ = original.__package__
    sys.modules[module.__name__] = module  # dataclasses look their module up
    source = inspect.getsource(original).replace("torch.float32", "torch.float64").replace("np.float32", "np.float64")
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def diffusers_scheduler(
    class_name: str,
    config: Mapping[str, Any],
    randn: Callable[..., Tensor],
    dtype: torch.dtype = torch.float64,
) -> Iterator[Any]:
    """A diffusers scheduler in float64, or as it is for float32, whose noise comes from `randn`."""
    module = float64_module(class_name)
    if dtype != torch.float64:
        module = importlib.import_module(module.__name__.removesuffix("_float64"))
    default, own_randn = torch.get_default_dtype(), module.__dict__.get("randn_tensor")
    torch.set_default_dtype(dtype)  # tensors that it makes of Python numbers
    try:
        module.__dict__["randn_tensor"] = randn
        yield getattr(module, class_name)(**config)
    finally:
        module.__dict__["randn_tensor"] = own_randn
        torch.set_default_dtype(default)


def diffusers_walk(
    class_name: str,
    config: Mapping[str, Any],
    steps: int,
    start: Tensor,
    *,
    model: Network = network,
    noise: Tensor | None = None,
    set_timesteps: Mapping[str, Any] | None = None,
    step_options: Mapping[str, Any] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Tensor:
    """The end of a whole walk of a diffusers scheduler, in the dtype of `start`.

    Args:
        start: float64 (or float32 for the scheduler as it is), already scaled by the scheduler's init_noise_sigma.
        noise: [n, *start.shape] the scheduler's draws in their order; None: `normals` from the second on.
        set_timesteps: arguments of set_timesteps instead of the number of steps.
        step_options: further arguments of `step`.
        prepare: called with the scheduler once its timesteps are set.
    """
    draws = iter((normals()[1:] if noise is None else noise).to(start.dtype))
    with diffusers_scheduler(class_name, config, lambda *args, **kwargs: next(draws), start.dtype) as theirs:
        theirs.set_timesteps(**({"num_inference_steps": steps} if set_timesteps is None else set_timesteps))
        if hasattr(theirs, "set_begin_index"):
            theirs.set_begin_index(0)
        if prepare is not None:
            prepare(theirs)
        x = start
        for t in theirs.timesteps:
            model_input = theirs.scale_model_input(x, t) if hasattr(theirs, "scale_model_input") else x
            x = theirs.step(model(model_input, float(t)), t, x, **(step_options or {})).prev_sample
        return x


def engine_walk(
    table: StepTable, start: Tensor, *, model: Network = network, noise: Tensor | None = None, **inpainting: Tensor
) -> Tensor:
    """The end of a table's walk from `start`, in its dtype, with the same draws as `diffusers_walk`.

    inpainting: known and mask, for an in-painting table.
    """
    draws = (normals()[1:] if noise is None else noise).to(start.dtype)
    return run_table(table, model, start, lambda stream, draw: draws[draw], **inpainting)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


@dataclass(frozen=True)
class GaussianProblem:
    """Data x0 ~ N(mean, std²): the ideal model and the exact solution of the probability-flow ODE.

    Attributes:
        level_at: (alpha, sigma) of the process where the model is told t.
        prediction_type: what the ideal model predicts.
    """

    level_at: Callable[[float], tuple[float, float]]
    prediction_type: str = "sample"
    mean: float = 0.3
    std: float = 0.6
    sigma_data: float = 0.5

    @classmethod
    def on(cls, schedule: NoiseSchedule, prediction_type: str = "sample", **moments: float) -> GaussianProblem:
        """The problem for a model that a schedule's own conditioning is told, at any fractional timestep."""
        index = np.arange(schedule.num_train_timesteps)
        with np.errstate(divide="ignore"):
            log_level = np.log(schedule.noise_level)

        def level_at(t: float) -> tuple[float, float]:
            if prediction_type == "edm":
                point = schedule.nearest(1.0, math.exp(4 * t))
            elif schedule.kind == "flow":
                point = schedule.from_noise_level(t / len(index))
            elif t == round(t):
                point = schedule.at([int(t)])
            else:
                point = schedule.from_noise_level(np.exp(np.interp(t, index, log_level)))
            return point[0].item(), point[1].item()

        return cls(level_at, prediction_type, sigma_data=schedule.sigma_data, **moments)

    def model(self, model_input: Tensor, t: float) -> Tensor:
        """What the ideal model answers: the mean of its target, given its input."""
        alpha, sigma = (np.float64(value) for value in self.level_at(t))
        x = model_input / float(model_input_scale(self.prediction_type, alpha, sigma, self.sigma_data))
        unit = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        x0, eps = self.mean + alpha * self.std**2 * unit, sigma * unit
        c_x0, c_eps = prediction_target(self.prediction_type, alpha, sigma, self.sigma_data)
        return float(c_x0) * x0 + float(c_eps) * eps

    def solution(self, z: float, alpha: float, sigma: float) -> float:
        """The state at (alpha, sigma) of the trajectory that stays z standard deviations from the mean."""
        return alpha * self.mean + math.hypot(alpha * self.std, sigma) * z

    def ode_error(self, table: StepTable, end: tuple[float, float], z: float = 1.3) -> float:
        """|x - exact| at the end (alpha, sigma) of a table without noise, in standard deviations."""
        x = torch.tensor([self.solution(z, *table.start)], dtype=torch.float64)
        got = run_table(table, self.model, x).item()
        return abs(got - self.solution(z, *end)) / math.hypot(end[0] * self.std, end[1])

    def weak_error(self, table: StepTable, end: tuple[float, float]) -> float:
        """Error of mean and standard deviation at the end of a table with noise, in standard deviations.

        The walk is affine in its start and its draws: a batch of their unit vectors gives all its coefficients.
        """
        n_draws = int(table.draw.max()) + 1
        x = torch.zeros(n_draws + 2, dtype=torch.float64)
        x[1] = 1.0
        draws = torch.cat([torch.zeros(2, n_draws), torch.eye(n_draws)]).double()
        walked = run_table(table, self.model, x, lambda stream, draw: draws[:, draw])
        offset, slopes = walked[0], walked[1:] - walked[0]
        alpha, sigma = table.start
        mean = float(offset + slopes[0] * alpha * self.mean)
        std = float((slopes * slopes.new_tensor([math.hypot(alpha * self.std, sigma)] + [1.0] * n_draws)).norm())
        exact = math.hypot(end[0] * self.std, end[1])
        return math.hypot(mean - end[0] * self.mean, std - exact) / exact


def measured_order(error: Callable[[int], float], steps: int) -> float:
    """log2 of the ratio of the errors with `steps` and with 2 * steps steps."""
    return math.log2(error(steps) / error(2 * steps))


# Little noise at the end, and at the start so much that a multistep method's first steps, of low order, err little.
ORDER_SCHEDULE = NoiseSchedule.edm(sigma_min=0.01, sigma_max=80.0)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One walk that the engine and a diffusers scheduler both take.

    Attributes:
        schedule: a name in `SCHEDULES`.
        spacing: a timestep spacing, or a sigma spacing (which diffusers combines with "linspace" timesteps).
        ours: further arguments of `build`; theirs: of the scheduler.
        set_timesteps, step_options, prepare: see `diffusers_walk`.
    """

    schedule: str = "linear"
    steps: int = 10
    prediction_type: str | None = "epsilon"
    spacing: str | None = "leading"
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    set_timesteps: Mapping[str, Any] | None = None
    step_options: Mapping[str, Any] | None = None
    prepare: Callable[[Any], None] | None = None

    def __str__(self) -> str:
        parts = [self.schedule, self.prediction_type, self.spacing, self.steps]
        parts += [f"{name}={value}" for name, value in self.ours.items()]
        return "-".join(str(part) for part in parts if part is not None)

    @property
    def build_arguments(self) -> dict[str, Any]:
        """Arguments of `build` besides solver, schedule and steps."""
        arguments = {} if self.prediction_type is None else {"prediction_type": self.prediction_type}
        if self.spacing is not None:
            arguments["timestep_spacing" if self.spacing in TIMESTEP_SPACINGS else "sigma_spacing"] = self.spacing
        return {**arguments, **self.ours}

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the diffusers scheduler."""
        config = dict(SCHEDULES[self.schedule][1])
        if SCHEDULES[self.schedule][0].kind == "vp":
            if self.prediction_type is not None:
                config["prediction_type"] = self.prediction_type
            if self.spacing in TIMESTEP_SPACINGS:
                config["timestep_spacing"] = self.spacing
            elif self.spacing is not None:
                config |= {"timestep_spacing": "linspace"}
                config[DIFFUSERS_SIGMA_SPACING.get(self.spacing, f"use_{self.spacing}_sigmas")] = True
        return {**config, **self.theirs}

    def table(self, solver: str, options: Mapping[str, Any]) -> StepTable:
        """The engine's table."""
        return build(solver, SCHEDULES[self.schedule][0], self.steps, **self.build_arguments, **options)

    def theirs_from(self, start: Tensor, diffusers: str) -> Tensor:
        """The end of the diffusers scheduler's walk, in the dtype of `start`."""
        return diffusers_walk(
            diffusers,
            self.config,
            self.steps,
            start,
            set_timesteps=self.set_timesteps,
            step_options=self.step_options,
            prepare=self.prepare,
        )

    def error(self, solver: str, options: Mapping[str, Any], diffusers: str) -> float:
        """Relative distance of the two ends in float64."""
        table = self.table(solver, options)
        start = normals()[0] * table.init_noise_sigma
        return relative_error(engine_walk(table, start), self.theirs_from(start, diffusers))


@dataclass(frozen=True, kw_only=True)
class SolverCase:
    """A solver with one set of options.

    Attributes:
        name: of the case, unique: the solver, and the options where a solver has several cases.
        solver, options: arguments of `build`.
        diffusers, k_diffusion, guided_diffusion: class or functions that do the same elsewhere, None for none.
        walks: what is compared with the diffusers class; bound: the largest relative error accepted there, and why it
            is more than 1e-9 in `note`.
        order: the expected order of convergence, None where there is none (a solver for one to eight steps).
        order_steps: number of steps to start measuring with; order_arguments: of `build` while measuring.
        order_tolerance: how far from the expected order a measured one may lie.
        stochastic: the order is that of mean and variance (weak), not of a trajectory.
        note: for the table.
    """

    name: str
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    diffusers: str | None = None
    k_diffusion: str | None = None
    guided_diffusion: str | None = None
    walks: tuple[Walk, ...] = ()
    bound: float = 1e-9
    order: float | None = None
    order_steps: int = 60
    order_schedule: NoiseSchedule = ORDER_SCHEDULE
    order_arguments: Mapping[str, Any] = field(default_factory=dict)
    order_tolerance: float = 0.15
    stochastic: bool = False
    note: str = ""

    def errors(self) -> dict[str, float]:
        """The relative error of every walk, by the walk's name."""
        if self.diffusers is None:
            return {}
        return {str(walk): walk.error(self.solver, self.options, self.diffusers) for walk in self.walks}

    def worst_error(self) -> float | None:
        """The largest relative error against the diffusers class, None where there is nothing to compare."""
        return max(self.errors().values(), default=None)

    def convergence_error(self, steps: int) -> float:
        """The error on Gaussian data after `steps` steps from the noisiest to the least noisy timestep."""
        schedule = self.order_schedule
        arguments: dict[str, Any] = {"prediction_type": "sample", "sigma_spacing": "exponential"}
        arguments["final_sigmas_type"] = "sigma_min"
        arguments |= {**self.order_arguments, **self.options}
        table = build(self.solver, schedule, steps, **arguments)
        problem = GaussianProblem.on(schedule, str(arguments["prediction_type"]))
        end = table.end
        return problem.weak_error(table, end) if self.stochastic else problem.ode_error(table, end)

    def measured_order(self) -> float | None:
        """The order of convergence from order_steps to twice as many steps, None where none is expected."""
        return None if self.order is None else measured_order(self.convergence_error, self.order_steps)
