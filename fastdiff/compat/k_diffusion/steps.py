"""k-diffusion's methods as rows: what each step from sigma to sigma_next does, in float64.

The state is x = x0 + sigma * eps and the model returns x0 ("denoised"). Multistep methods are the engine's own. Steps
of two evaluations, for which the engine asks a schedule about points between those of its grid, are made here:
A x + B1 denoised + B2 denoised_2 with A + B1 + B2 = 1, so that a constant image is kept.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from fastdiff.prediction import FloatArray
from fastdiff.solvers import Grid
from fastdiff.solvers.dpm import dpmpp, dpmpp_sde
from fastdiff.solvers.line import euler_step
from fastdiff.solvers.lms import lms
from fastdiff.table import Row

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row, and the levels between which the noise sampler is asked for noise after the row's evaluation.

    A row may have no use for the noise, and a stage no row: the original draws it all the same.
    """

    row: Row | None
    noise: Interval | None = None


Step = list[Stage]


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> Interval:
    """(sigma_down, sigma_up): the level a step goes down to, and the noise that takes it to sigma_next."""
    if sigma_next > sigma and eta:
        raise ValueError(f"sigmas rise from {sigma} to {sigma_next}, but a step that adds noise needs falling ones")
    if not eta:
        return sigma_next, 0.0
    ratio = sigma_next / sigma
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - ratio**2))
    # sqrt(sigma_next² - up²) without its cancellation
    return sigma_next * math.sqrt(max(1 - eta**2 + (eta * ratio) ** 2, 0.0)), up


def _move(sigma: float, target: float, *, std: float = 0.0) -> Row:
    """Euler's step, to the point of the line through x and denoised where the noise is `target`."""
    columns = euler_step((1.0, sigma), (1.0, target))
    return Row(t=sigma, pm=1.0, cx=columns["cx"], c0=columns["c0"], cz=std)


def _two_stages(
    first: int, sigma: float, target: float, middle: float, weight: float, *, reached: float | None = None
) -> tuple[Row, Row]:
    """Rows first and first + 1: `_move` to the level `reached` (None: middle), an evaluation at `middle`, the step.

    weight: B2, of denoised_2.
    """
    ratio = target / sigma
    start = replace(_move(sigma, middle if reached is None else reached), ux=ratio, u0=1 - ratio - weight)
    return start, Row(t=middle, pm=1.0, c0=weight, history={first: 1.0})


def churned(
    sigmas: FloatArray, method: str, *, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> list[Step]:
    """Karras et al. 2022, algorithm 2: "euler", "heun", or "dpm_2" with the evaluation at the geometric middle.

    The noise that raises a step's sigma to sigma_hat is added by the row before it.
    """
    n = len(sigmas) - 1
    gammas = np.where((sigmas >= s_tmin) & (sigmas <= s_tmax), min(s_churn / n, math.sqrt(2) - 1), 0.0)
    hats, stds = sigmas * (1 + gammas), s_noise * sigmas * np.sqrt(gammas * (gammas + 2))
    start = Row(ev=False, cx=1.0, cz=float(stds[0])) if stds[0] else None
    steps, count = [[Stage(row=start, noise=(sigmas[0], hats[0]))]], int(start is not None)
    for i in range(n):
        hat, target = float(hats[i]), float(sigmas[i + 1])
        if method == "euler" or target == 0:
            rows: tuple[Row, ...] = (_move(hat, target),)
        elif method == "heun":
            rows = _two_stages(count, hat, target, target, (hat - target) / (2 * target))
        else:
            middle = math.sqrt(hat * target)
            rows = _two_stages(count, hat, target, middle, (hat - target) / middle)
        count += len(rows)
        step = [Stage(row=row) for row in rows]
        if i + 1 < n:
            step[-1] = Stage(row=replace(rows[-1], cz=float(stds[i + 1])), noise=(target, hats[i + 1]))
        steps[i:] = [[*steps[i], *step]] if i == 0 else [step]
    return steps


def ancestral(sigmas: FloatArray, method: str, *, eta: float, s_noise: float) -> list[Step]:
    """A step of "euler", "dpm_2" or "dpmpp_2s" to sigma_down, and noise sigma_up.

    A step to sigma_down = 0 is Euler's; dpm_2 adds no noise there.
    """
    steps: list[Step] = []
    count = 0
    for sigma, target in itertools.pairwise(map(float, sigmas)):
        down, up = ancestral_step(sigma, target, eta)
        if method == "euler" or down == 0:
            rows: tuple[Row, ...] = (_move(sigma, down),)
        else:
            middle = math.sqrt(sigma * down)
            weight = (sigma - down) / middle if method == "dpm_2" else 1 - down / sigma
            rows = _two_stages(count, sigma, down, middle, weight)
        count += len(rows)
        step = [Stage(row=row) for row in rows]
        if down > 0 if method == "dpm_2" else target > 0:
            step[-1] = Stage(row=replace(rows[-1], cz=up * s_noise), noise=(sigma, target))
        steps.append(step)
    return steps


def dpmpp_sde_steps(sigmas: FloatArray, *, eta: float, s_noise: float, r: float) -> list[Step]:
    """DPM-Solver++ on the SDE with an ancestral step to the level a fraction r of the way, in ln sigma."""
    steps: list[Step] = []
    count = 0
    for sigma, target in itertools.pairwise(map(float, sigmas)):
        if target == 0:
            steps.append([Stage(row=_move(sigma, target))])
            continue
        middle = sigma ** (1 - r) * target**r
        reached, up = ancestral_step(sigma, middle, eta)
        down, up_last = ancestral_step(sigma, target, eta)
        weight = (1 - down / sigma) / (2 * r)
        first, last = _two_stages(count, sigma, down, middle, weight, reached=reached)
        count += 2
        steps.append(
            [
                Stage(row=replace(first, cz=up * s_noise), noise=(sigma, middle)),
                Stage(row=replace(last, cz=up_last * s_noise), noise=(sigma, target)),
            ]
        )
    return steps


def _grid(sigmas: FloatArray) -> Grid:
    return Grid.from_points(np.ones_like(sigmas), sigmas, sigmas[:-1], prediction_type="sample")


def dpmpp_2m_steps(sigmas: FloatArray) -> list[Step]:
    """Lu et al. 2022b, algorithm 2, at its full order in every step but the first and one to sigma = 0."""
    return [[Stage(row=row)] for row in dpmpp(_grid(sigmas), order=2, lower_order_final=False)]


def dpmpp_multistep_sde(sigmas: FloatArray, *, order: int, eta: float, s_noise: float, solver_type: str) -> list[Step]:
    """DPM-Solver++ 2M or 3M on the SDE; the original's third order takes half of the parabola's integral."""
    options = {"lower_order_final": False, "third_order": "half", "solver_type": solver_type}
    steps: list[Step] = []
    for i, row in enumerate(dpmpp_sde(_grid(sigmas), order=order, eta=eta, **options)):
        noise = (float(sigmas[i]), float(sigmas[i + 1])) if row.draws else None
        steps.append([Stage(row=replace(row, cz=row.cz * s_noise), noise=noise)])
    return steps


def lms_steps(sigmas: FloatArray, *, order: int) -> list[Step]:
    """Adams-Bashforth in sigma; the first steps are of lower orders."""
    return [[Stage(row=row)] for row in lms(_grid(sigmas), order=order)]
