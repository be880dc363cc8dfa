"""Grids: points between their own, where walks end, spacings, and starts without any signal."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import Grid, build, euler, kdpm2, pndm
from fastdiff.spacing import SIGMA_SPACINGS
from fastdiff.table import StepTable, run_table

SCHEDULES = {
    "vp": NoiseSchedule.linear(),
    "zero_terminal": NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(),
    "flow": NoiseSchedule.flow(shift=3.0),
    "edm": NoiseSchedule.edm(),
}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm")


def grid_over(schedule, timesteps, *, prediction_type="v_prediction", exploding=True, **options):
    """The grid that `build` lays over timesteps."""
    arguments = {"clip_sample": 0.9, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.7)} | options
    return Grid.over(
        schedule, timesteps, *schedule.at(timesteps), prediction_type=prediction_type, exploding=exploding, **arguments
    )


@pytest.mark.parametrize("exploding", [False, True], ids=["preserving", "exploding"])
@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
def test_a_point_of_the_grid_is_found_by_its_level(kind, exploding):
    for prediction_type in PREDICTION_TYPES:
        grid = grid_over(SCHEDULES[kind], [800, 500, 100], prediction_type=prediction_type, exploding=exploding)
        for i, scale in itertools.product(range(3), (1.0, 0.3)):
            # a state of any scale: the same point, whose model input is the same
            alpha, sigma = scale * grid.alpha[i], scale * grid.sigma[i]
            found, own = grid.point(alpha, sigma).row(0), grid.row(i)
            for name in ("t", "lim", "g"):
                assert getattr(found, name) == pytest.approx(getattr(own, name), rel=1e-9), name
            assert found.c_in * scale == pytest.approx(own.c_in, rel=1e-9)
            # x0 of the same model input and output
            assert found.px * scale == pytest.approx(own.px, rel=1e-9)
            if prediction_type not in ("epsilon",):
                assert (found.pm, found.mg) == pytest.approx((own.pm, own.mg), rel=1e-9)
            assert found.at == (alpha, sigma)


def test_bare_points_have_no_others():
    grid = Grid.from_points(np.ones(3), np.array([4.0, 1.0, 0.0]), [900, 300], prediction_type="epsilon")
    assert len(euler.euler(grid)) == 2
    for solver in (kdpm2.kdpm2, pndm.pndm):
        with pytest.raises(ValueError, match="own points only"):
            solver(grid)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", *SIGMA_SPACINGS])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_a_walk_to_sigma_min_ends_at_the_least_noise(solver, spacing):
    named = {"sigma_spacing" if spacing in SIGMA_SPACINGS else "timestep_spacing": spacing}
    schedule = SCHEDULES["vp"]
    for steps in (1, 2, 9):
        table = build(solver, schedule, steps, final_sigmas_type="sigma_min", **named)
        alpha, sigma = table.end
        assert sigma / alpha == pytest.approx(schedule.noise_level[0], rel=1e-9)
        assert len(np.unique(table.columns["t"])) == steps + (solver == "heun")
        assert np.isfinite(table.columns["cx"]).all()
    with pytest.raises(ValueError, match="1 to 999"):
        build("ddim", schedule, 1000, final_sigmas_type="sigma_min", timestep_spacing="leading")


@pytest.mark.parametrize("kind", ["vp", "edm", "flow"])
def test_logsnr_spacing_is_even_in_the_log_signal_to_noise_ratio(kind):
    schedule = SCHEDULES[kind]
    limits = {"sigma_max": 0.99} if kind == "flow" else {}
    alpha, sigma = schedule.from_noise_level(schedule.sigmas(12, "logsnr", **limits))
    gaps = np.diff(np.log(alpha / sigma))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
    assert gaps[0] > 0
    if kind == "flow":
        assert sigma[0] == pytest.approx(0.99)
        with pytest.raises(ValueError, match="sigma_max below 1"):
            schedule.sigmas(12, "logsnr")
        build("heun", schedule, 5, prediction_type="flow_prediction", sigma_spacing="logsnr", sigma_max=0.99)


def test_a_distilled_walk_takes_timesteps_of_the_original_one():
    original = SCHEDULES["vp"].timesteps(50, "trailing")
    for steps in (1, 3, 4, 8, 50):
        chosen = build("lcm", SCHEDULES["vp"], steps).columns["t"]
        assert len(chosen) == steps
        assert set(chosen) <= set(original)
        assert chosen[0] == 999
    assert build("lcm", SCHEDULES["vp"], 4).columns["t"].tolist() == [999, 759, 499, 259]
    assert build("ddim", SCHEDULES["vp"], 2, original_inference_steps=20).columns["t"].tolist() == [999, 499]
    assert len(build("tcd", NoiseSchedule.linear(12), 12)) == 12


@pytest.mark.parametrize(
    ("solver", "order"),
    [("euler", 1), ("ddim", 1), ("heun", 2), ("kdpm2", 2), ("pndm", 2), ("lms", 2), ("dpmpp_2m", 2)],
)
def test_order_from_a_start_without_signal(solver, order):
    """Data N(mean, std²) and v prediction on a zero-terminal-SNR schedule, from alpha = 0."""
    schedule, mean, std = SCHEDULES["zero_terminal"], 0.4, 0.5
    levels = np.log(schedule.noise_level[:-1])

    def model(model_input, t):
        if t == 999:
            return torch.full_like(model_input, -mean)  # -x0, of which a state without signal says nothing
        alpha, sigma = map(float, schedule.from_noise_level(np.exp(np.interp(t, np.arange(999), levels))))
        unit = (model_input - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return alpha * sigma * unit - sigma * (mean + alpha * std**2 * unit)

    def error(steps):
        table = build(solver, schedule, steps, prediction_type="v_prediction", final_sigmas_type="sigma_min")
        start = torch.tensor([1.1], dtype=torch.float64)
        alpha, sigma = table.end
        exact = alpha * mean + math.hypot(alpha * std, sigma) * 1.1
        return abs(run_table(table, model, start).item() - exact)

    measured = math.log2(error(40) / error(80))
    assert measured > order - 0.3
    assert error(80) < (0.02 if order == 1 else 0.005)


def test_points_where_sigma_is_zero_or_signal_is_missing_say_so():
    one, zero = np.ones(2), np.zeros(2)
    with pytest.raises(ValueError, match="nothing about the noise at timestep 7, where sigma = 0"):
        Grid.from_points(one, zero, [7], prediction_type="sample")
    with pytest.raises(ValueError, match="does not determine x0 at timestep 7, where alpha = 0"):
        Grid.from_points(zero, one, [7], prediction_type="epsilon")


def test_lms_forgets_a_start_on_another_line():
    # x itself at alpha = 0, x / alpha after it: slopes along different lines do not mix
    table = build("lms", SCHEDULES["zero_terminal"], 5, prediction_type="v_prediction")
    assert not table.h[1].any()
    assert table.h[2].any()
    assert isinstance(table, StepTable)
