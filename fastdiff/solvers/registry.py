"""The solvers by name, and `build`, which lays out a solver's grid and packs its rows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.prediction import FloatArray
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.grid import Grid
from fastdiff.table import Row, StepTable

SolverFunction = Callable[..., list[Row]]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A registered solver: its function and the grid it walks."""

    function: SolverFunction
    exploding: bool
    inverse: bool
    final_sigmas_type: str
    timestep_options: dict[str, Any]

    @property
    def options(self) -> list[str]:
        """Names of the options the solver takes besides its grid."""
        return list(inspect.signature(self.function).parameters)[1:]


_SOLVERS: dict[str, Solver] = {}

FINAL_SIGMAS_TYPES = ("zero", "sigma_min")


def register(
    name: str,
    *,
    exploding: bool = False,
    inverse: bool = False,
    final_sigmas_type: str = "zero",
    **timestep_options: Any,
) -> Callable[[SolverFunction], SolverFunction]:
    """Register a function (grid, **options) -> rows as the solver `name`.

    Args:
        exploding: walk x / alpha, whose noise explodes, instead of x = alpha * x0 + sigma * eps (see `Grid`).
        inverse: the rows lead from the grid's end, the data, back to its first point.
        final_sigmas_type: where the grid ends by default, "zero" or "sigma_min" (see `build`).
        timestep_options: how the solver lays out timesteps: `extra_point`, `rounded` and `original_inference_steps` of
            `NoiseSchedule.timesteps`.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: SolverFunction) -> SolverFunction:
        if name in _SOLVERS:
            raise ValueError(f"a solver named {name!r} is registered already")
        _SOLVERS[name] = Solver(
            function=function,
            exploding=exploding,
            inverse=inverse,
            final_sigmas_type=final_sigmas_type,
            timestep_options=timestep_options,
        )
        return function

    return add


def names() -> list[str]:
    """The registered solvers, sorted."""
    return sorted(_SOLVERS)


def build(
    name: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    prediction_type: str = "epsilon",
    timestep_spacing: str = "trailing",
    sigma_spacing: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigmas_type: str | None = None,
    original_inference_steps: int | None = None,
    clip_sample: float | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    strength: float = 1.0,
    inpaint: bool = False,
    **solver_options: Any,
) -> StepTable:
    """The step table of a solver on a noise schedule.

    Args:
        name: a registered solver (`names`).
        num_inference_steps: 1 to schedule.num_train_timesteps.
        prediction_type: "epsilon", "sample", "v_prediction", "flow_prediction" or "edm".
        timestep_spacing: "leading", "trailing" or "linspace" (`NoiseSchedule.timesteps`).
        sigma_spacing: "karras", "exponential", "beta" or "logsnr" (`NoiseSchedule.sigmas`) takes the place of
            timestep_spacing, between the noise levels sigma_min and sigma_max (None: the schedule's own).
        final_sigmas_type: "zero" ends the walk at x0, "sigma_min" at the least noise of the grid: sigma_min, or that of
            timestep 0; None: what the solver was registered with.
        original_inference_steps: the walk takes every so manieth timestep of a walk with this many steps, which a model
            was distilled from; None: what the solver was registered with (50 for "lcm" and "tcd", else none).
        clip_sample: predictions of x0 are clipped to [-clip_sample, clip_sample]; None: not at all.
        guidance_scale: classifier-free guidance of every row; None: 1.
        guidance_interval: (low, high) within [0, 1]: only rows with low <= timestep / num_train_timesteps <= high are
            guided, the others have scale 1 (Kynkäänniemi et al. 2024).
        strength: in (0, 1]: keep the last round(strength * num_inference_steps) steps, at least one: the walk of an
            image that was noised to their first point (Meng et al. 2022, SDEdit).
        inpaint: every row keeps the known part of an image (`Sampler.sample` with mask and known), noised to the level
            that the row's state arrives at; the last row keeps it as it is. A row has one draw of noise: where the
            solver adds noise too, the known and the unknown part get the same one.
        solver_options: what the solver's function takes besides its grid, such as eta.

    Raises:
        ValueError: an argument out of its range, or a combination that has no walk, such as epsilon prediction where
            alpha = 0.
    """
    if name not in _SOLVERS:
        raise ValueError(f"solver is {name!r}, known solvers are {', '.join(names())}")
    solver = _SOLVERS[name]
    unknown = [option for option in solver_options if option not in solver.options]
    if unknown:
        raise ValueError(
            f"solver {name!r} has no option {unknown[0]!r}, it takes {', '.join(solver.options) or 'none'}"
        )
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, a number in (0, 1] is needed")
    if sigma_spacing is None and not sigma_min is sigma_max is None:
        raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max} need a sigma_spacing")
    timesteps, alpha, sigma, end = _points(
        schedule,
        num_inference_steps,
        final_sigmas_type or solver.final_sigmas_type,
        timestep_options=solver.timestep_options | _original(solver, schedule, original_inference_steps),
        spacings=(timestep_spacing, sigma_spacing),
        limits={"sigma_min": sigma_min, "sigma_max": sigma_max},
    )
    # The grid is cut, not the rows: a multistep solver starts anew at its first point.
    skipped = num_inference_steps - max(round(strength * num_inference_steps), 1)
    grid = Grid.over(
        schedule,
        timesteps[skipped:],
        alpha[skipped:],
        sigma[skipped:],
        prediction_type=prediction_type,
        exploding=solver.exploding,
        clip_sample=clip_sample,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        end=end,
    )
    rows = solver.function(grid, **solver_options)
    first, last = ((float(grid.alpha[i]), float(grid.sigma[i])) for i in (0, -1))
    if solver.inverse:
        first, last = last, first
    if inpaint:
        _keep_known(rows, last)
    # a walk that starts from data is given it as it is
    init_noise_sigma = 1.0 if solver.inverse else grid.init_noise_sigma
    return StepTable.from_rows(rows, init_noise_sigma=init_noise_sigma, start=first, end=last)


def _original(solver: Solver, schedule: NoiseSchedule, original_inference_steps: int | None) -> dict[str, Any]:
    registered = solver.timestep_options.get("original_inference_steps")
    if original_inference_steps is None and registered is not None:
        original_inference_steps = min(registered, schedule.num_train_timesteps)
    return {"original_inference_steps": original_inference_steps}


def _points(
    schedule: NoiseSchedule,
    steps: int,
    final_sigmas_type: str,
    *,
    timestep_options: dict[str, Any],
    spacings: tuple[str, str | None],
    limits: dict[str, float | None],
) -> tuple[NDArray[Any], FloatArray, FloatArray, tuple[float, float]]:
    """(timesteps, alpha, sigma) [steps] of the process, and (alpha, sigma) at the end of the walk."""
    timestep_spacing, sigma_spacing = spacings
    if final_sigmas_type not in FINAL_SIGMAS_TYPES:
        raise ValueError(f"final_sigmas_type is {final_sigmas_type!r}, accepted are {', '.join(FINAL_SIGMAS_TYPES)}")
    to_zero = final_sigmas_type == "zero"

    def timesteps_of(count: int) -> NDArray[Any]:
        return schedule.timesteps(count, timestep_spacing, **timestep_options)

    if sigma_spacing is None:
        timesteps = timesteps_of(steps)
        if not to_zero and timesteps[-1] > 0:
            timesteps = np.append(timesteps, 0)
        elif not to_zero:
            _check_end(schedule, steps)
            timesteps = timesteps_of(steps + 1)
        alpha, sigma = schedule.at(timesteps)
    else:
        if not to_zero:
            _check_end(schedule, steps)
        levels = schedule.sigmas(steps + (not to_zero), sigma_spacing, **limits)
        timesteps = schedule.timestep_of(levels)
        alpha, sigma = schedule.from_noise_level(levels)
    end = (1.0, 0.0) if to_zero else (float(alpha[steps]), float(sigma[steps]))
    return timesteps[:steps], alpha[:steps], sigma[:steps], end


def _check_end(schedule: NoiseSchedule, steps: int) -> None:
    if steps == schedule.num_train_timesteps:
        raise ValueError(
            f"final_sigmas_type='sigma_min' takes one noise level for the end of the walk: num_inference_steps is "
            f"{steps}, accepted are 1 to {steps - 1}"
        )


def _keep_known(rows: list[Row], end: tuple[float, float]) -> None:
    """Make every row blend in the known image at the noise level where the next row takes the state to be."""
    if any(row.k0 or row.kz for row in rows):
        raise ValueError("inpaint=True is for solvers that do not keep the known part by themselves")
    alpha, sigma = end
    for row in reversed(rows):
        row.k0, row.kz = alpha, sigma
        row.draws = row.draws or sigma > 0
        alpha, sigma = row.at or (alpha, sigma)
