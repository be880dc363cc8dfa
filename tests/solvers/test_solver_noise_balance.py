"""The noise that a step leaves and the noise it adds make up the level it arrives at, in every kind of process."""

import math

import pytest

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.consistency import tcd
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.repaint import repaint

SCHEDULES = {
    "vp": NoiseSchedule.cosine(),
    "zero_terminal": NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "edm": NoiseSchedule.edm(),
}
STEPS = {
    "ddpm": (ddpm, {}),
    "ddim": (ddim, {"eta": 0.6}),
    "tcd": (tcd, {"eta": 0.3}),
    "tcd-ddim": (tcd, {"eta": 0.0}),
    "tcd-anew": (tcd, {"eta": 1.0}),
    "repaint": (repaint, {"jump_n_sample": 1}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("solver", "options"), STEPS.values(), ids=STEPS)
def test_a_step_arrives_at_the_level_of_the_next_point(solver, options, kind):
    schedule = SCHEDULES[kind]
    timesteps = schedule.timesteps(7)
    model = {"prediction_type": "sample", "clip_sample": None, "guidance_scale": None, "guidance_interval": None}
    grid = Grid.over(schedule, timesteps, *schedule.at(timesteps), exploding=False, **model)
    for i, row in enumerate(solver(grid, **options)):

        def after(x: float, m: float, row=row) -> float:
            return row.cx * x + row.c0 * (row.px * x + row.pm * m) + row.cm * m

        # a model that knows x0: the coefficients of x0 and of eps in the next state
        of_x0, of_eps = after(float(grid.alpha[i]), 1.0), after(float(grid.sigma[i]), 0.0)
        # float64 rounding of sums whose terms may be some hundred times their value
        assert of_x0 == pytest.approx(float(grid.alpha[i + 1]), rel=1e-12, abs=1e-12)
        assert math.hypot(of_eps, row.cz) == pytest.approx(float(grid.sigma[i + 1]), rel=1e-12, abs=1e-12)
