"""The solvers by name, and `build`, which lays out a solver's grid and packs its rows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.grid import Grid
from fastdiff.table import Row, StepTable

SolverFunction = Callable[..., list[Row]]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A registered solver: its function and the grid it walks."""

    function: SolverFunction
    exploding: bool
    timestep_options: dict[str, Any]

    @property
    def options(self) -> list[str]:
        """Names of the options the solver takes besides its grid."""
        return list(inspect.signature(self.function).parameters)[1:]


_SOLVERS: dict[str, Solver] = {}


def register(
    name: str, *, exploding: bool = False, **timestep_options: Any
) -> Callable[[SolverFunction], SolverFunction]:
    """Register a function (grid, **options) -> rows as the solver `name`.

    Args:
        exploding: walk x / alpha, whose noise explodes, instead of x = alpha * x0 + sigma * eps (see `Grid`).
        timestep_options: how the solver lays out timesteps, `extra_point` and `rounded` of `NoiseSchedule.timesteps`.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: SolverFunction) -> SolverFunction:
        if name in _SOLVERS:
            raise ValueError(f"a solver named {name!r} is registered already")
        _SOLVERS[name] = Solver(function=function, exploding=exploding, timestep_options=timestep_options)
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
    clip_sample: float | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    strength: float = 1.0,
    **solver_options: Any,
) -> StepTable:
    """The step table of a solver on a noise schedule.

    Args:
        name: a registered solver: "ddpm", "ddim", "euler", "euler_a", "dpmpp_2m".
        num_inference_steps: 1 to schedule.num_train_timesteps.
        prediction_type: "epsilon", "sample", "v_prediction", "flow_prediction" or "edm".
        timestep_spacing: "leading", "trailing" or "linspace" (`NoiseSchedule.timesteps`).
        sigma_spacing: "karras", "exponential" or "beta" (`NoiseSchedule.sigmas`) takes the place of timestep_spacing.
        clip_sample: predictions of x0 are clipped to [-clip_sample, clip_sample]; None: not at all.
        guidance_scale: classifier-free guidance of every row; None: 1.
        guidance_interval: (low, high) within [0, 1]: only rows with low <= timestep / num_train_timesteps <= high are
            guided, the others have scale 1 (Kynkäänniemi et al. 2024).
        strength: in (0, 1]: keep the last round(strength * num_inference_steps) steps, at least one: the walk of an
            image that was noised to their first point (Meng et al. 2022, SDEdit).
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
    if sigma_spacing is None:
        timesteps = schedule.timesteps(num_inference_steps, timestep_spacing, **solver.timestep_options)
        alpha, sigma = schedule.at(timesteps)
    else:
        levels = schedule.sigmas(num_inference_steps, sigma_spacing)
        timesteps = schedule.timestep_of(levels)
        alpha, sigma = schedule.from_noise_level(levels)
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, a number in (0, 1] is needed")
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
    )
    return StepTable.from_rows(
        solver.function(grid, **solver_options),
        init_noise_sigma=grid.init_noise_sigma,
        start=(float(grid.alpha[0]), float(grid.sigma[0])),
    )
