"""`build`: names, options, guidance, clipping, and combinations that have no walk."""

import math

import numpy as np
import pytest

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build, names, register
from fastdiff.solvers.registry import _SOLVERS

LINEAR = NoiseSchedule.linear()
FIVE = ["ddim", "ddpm", "dpmpp_2m", "euler", "euler_a"]


def test_five_solvers_are_registered():
    assert set(FIVE) <= set(names())


def test_register_adds_a_solver_and_refuses_a_taken_name(monkeypatch):
    monkeypatch.setattr("fastdiff.solvers.registry._SOLVERS", dict(_SOLVERS))

    @register("to_x0")
    def to_x0(grid, *, gain=1.0):
        return [grid.row(i, c0=gain) for i in range(len(grid))]

    assert build("to_x0", LINEAR, 2, gain=3.0).columns["c0"].tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="registered already"):
        register("to_x0")(to_x0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddjm", LINEAR, 5), "known solvers are .*ddim.*ddpm"),
        (("ddim", LINEAR, 0), "num_inference_steps is 0"),
        (("ddim", LINEAR, 1001), "1 to 1000"),
        (("ddim", LINEAR, 2.5), "num_inference_steps is 2.5"),
    ],
    ids=["solver", "no_steps", "too_many_steps", "fractional_steps"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "eps"}, "prediction_type is 'eps'"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"sigma_spacing": "even"}, "sigma_spacing is 'even'"),
        ({"clip_sample": -1.0}, "clip_sample is -1.0"),
        ({"clip_sample": True}, "clip_sample is True"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_interval": (0.2, 0.8)}, "needs a guidance_scale"),
        ({"guidance_scale": 2.0, "guidance_interval": (0.8, 0.2)}, "guidance_interval is"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"churn": 1.0}, "no option 'churn', it takes eta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build("ddim", LINEAR, 5, **options)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [("ddpm", {"variance": "small"}, "fixed_small"), ("dpmpp_2m", {"solver_type": "rk4"}, "midpoint")],
    ids=["ddpm", "dpmpp_2m"],
)
def test_bad_choices_name_the_accepted_ones(solver, options, message):
    with pytest.raises(ValueError, match=message):
        build(solver, LINEAR, 5, **options)


@pytest.mark.parametrize("solver", FIVE)
@pytest.mark.parametrize("prediction_type", ["epsilon", "edm"])
@pytest.mark.parametrize(
    "schedule", [LINEAR.rescale_zero_terminal_snr(), NoiseSchedule.flow()], ids=["zero_terminal", "flow"]
)
def test_a_start_at_alpha_0_says_why_it_is_impossible(solver, schedule, prediction_type):
    with pytest.raises(ValueError, match="alpha = 0"):
        build(solver, schedule, 5, prediction_type=prediction_type)
    build(solver, schedule, 5, prediction_type=prediction_type, timestep_spacing="leading")


def test_sigma_spacing_of_an_infinite_range_says_why():
    with pytest.raises(ValueError, match="finite largest noise level"):
        build("euler", LINEAR.rescale_zero_terminal_snr(), 5, prediction_type="sample", sigma_spacing="karras")


@pytest.mark.parametrize("solver", FIVE)
def test_every_step_count_of_a_short_schedule_has_a_finite_table(solver):
    schedule = NoiseSchedule.cosine(12)
    for steps in range(1, 13):
        for spacing in ("leading", "trailing", "linspace"):
            table = build(solver, schedule, steps, timestep_spacing=spacing)
            assert len(table) == steps
            assert (np.diff(table.columns["t"]) < 0).all()


def test_guidance_holds_inside_its_interval_only():
    table = build("ddim", LINEAR, 10, guidance_scale=4.0, guidance_interval=(0.2, 0.6))
    inside = (table.columns["t"] >= 200) & (table.columns["t"] <= 600)
    np.testing.assert_array_equal(table.columns["g"], np.where(inside, 4.0, 1.0))
    assert inside.sum() == 4
    assert (build("ddim", LINEAR, 10, guidance_scale=4.0).columns["g"] == 4.0).all()


def test_noise_is_drawn_where_it_is_added_and_not_in_the_last_row():
    for solver, options in (("ddpm", {}), ("ddim", {"eta": 0.5}), ("euler_a", {})):
        assert build(solver, LINEAR, 4, **options).draw.tolist() == [0, 1, 2, -1]
    for solver in ("ddim", "euler", "dpmpp_2m"):
        assert not build(solver, LINEAR, 4).draws_noise


def test_history_slots():
    assert build("dpmpp_2m", LINEAR, 6).n_slots == 1
    assert build("dpmpp_2m", LINEAR, 2).n_slots == 0  # first and last row are of order 1
    assert build("ddim", LINEAR, 6).n_slots == 0


def test_learned_range_spans_the_two_fixed_variances():
    learned = build("ddpm", LINEAR, 8, variance="learned_range").columns
    for v, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        fixed = build("ddpm", LINEAR, 8, variance=variance).columns
        np.testing.assert_allclose(learned["cz"] * np.exp(learned["lv"] * v), fixed["cz"], rtol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction", "edm"])
def test_classifier_gradient_moves_eps_by_minus_sigma(prediction_type):
    # eps = (x - alpha * x0) / sigma, so x0 moves by sigma² / alpha of a gradient in x (Dhariwal and Nichol 2021).
    table = build("ddim", LINEAR, 5, prediction_type=prediction_type)
    timesteps = LINEAR.timesteps(5)
    moved = table.columns["pm"] * table.columns["mg"]
    np.testing.assert_allclose(moved, LINEAR.sigma[timesteps] ** 2 / LINEAR.alpha[timesteps], rtol=1e-12)


def test_ddpm_takes_the_gradient_through_its_mean():
    columns = build("ddpm", LINEAR, 5).columns
    np.testing.assert_array_equal(columns["vg"], columns["cz"] ** 2)
    assert not columns["mg"].any()


def test_walks_start_from_the_noise_of_their_state():
    assert build("ddim", LINEAR, 5).init_noise_sigma == 1.0
    assert build("euler", LINEAR, 5).init_noise_sigma == pytest.approx(LINEAR.noise_level[-1], rel=1e-14)
    assert build("dpmpp_2m", NoiseSchedule.edm(), 5).init_noise_sigma == pytest.approx(80.0, rel=1e-14)
    flow = build("euler", NoiseSchedule.flow(), 5, prediction_type="flow_prediction")
    assert flow.init_noise_sigma == 1.0
    assert flow.columns["c_in"].tolist() == [1.0] * 5


@pytest.mark.parametrize("solver", FIVE)
def test_strength_keeps_the_last_steps_and_restarts_the_history(solver):
    whole, part = (build(solver, LINEAR, 10, strength=strength) for strength in (1.0, 0.4))
    np.testing.assert_array_equal(part.columns["t"], whole.columns["t"][6:])
    assert not part.h[0].any()
    assert len(build(solver, LINEAR, 10, strength=1e-3)) == 1
    for strength in (0.0, 1.1):
        with pytest.raises(ValueError, match="strength is"):
            build(solver, LINEAR, 10, strength=strength)
