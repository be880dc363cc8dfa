"""Exponential integrators: their building blocks, and the ends where limits are needed (walks and orders are in
`test_solver_cases`)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.solver_cases import GaussianProblem, engine_walk, normals, relative_error
from benchmarks.solver_cases_exponential import CASES, EARLY, FUNCTIONS
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import Grid, build, dpm
from fastdiff.solvers.exponential import Interval, divided_difference, lagrange_integrals, phi
from fastdiff.table import StepTable

DATA_FORM = ["dpmpp", "dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]
DATA_FORM += ["dpmpp_single", "dpmpp_single_sde", "unipc", "sa"]
NOISE_FORM = ["dpm", "dpm_sde", "dpm_single", "deis"]
SOLVERS = {**FUNCTIONS, **{name: getattr(dpm, name) for name in DATA_FORM[1:] if hasattr(dpm, name)}}


@pytest.mark.parametrize("solver", ["dpmpp", "dpm"])
def test_half_the_second_difference_is_of_second_order(solver):
    case = next(case for case in CASES if (case.solver, case.order) == (solver, 3))
    half = replace(case, options={"order": 3, "third_order": "half"}, order_schedule=EARLY[0.1], order_steps=240)
    assert half.measured_order() == pytest.approx(2, abs=0.1)


def test_dpmpp_sde_with_eta_0_is_the_ode():
    schedule = NoiseSchedule.cosine()
    ode = build("dpmpp", schedule, 9, order=3)
    sde = build("dpmpp_sde", schedule, 9, order=3, eta=0.0)
    assert not sde.draws_noise
    for name, column in ode.columns.items():
        np.testing.assert_array_equal(sde.columns[name], column)


@pytest.mark.parametrize("z", [-60.0, -1.6, -1.4, -1e-9, 0.0, 0.3, 1.6, 20.0])
def test_phi_and_lagrange_integrals_equal_quadrature(z):
    s, w = np.polynomial.legendre.leggauss(60)
    s, w = (s + 1) / 2, w / 2
    kernel = np.exp(z * (1 - s))
    for k in range(1, 6):
        assert phi(k, z) == pytest.approx(float(w @ (kernel * s ** (k - 1))) / math.factorial(k - 1), rel=1e-12)
    nodes = [0.0, 1.0, -0.7, -1.9]
    values = np.vander(nodes, increasing=True).T  # s^k at the nodes: the interpolation is exact
    want = [float(w @ (kernel * s**k)) for k in range(4)]
    # weights of size 1 cancel to integrals as small as 1 / |z|^4
    np.testing.assert_allclose(values @ lagrange_integrals(nodes, z), want, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(values @ divided_difference(nodes), [0, 0, 0, 1], atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize("solver", [*DATA_FORM, *NOISE_FORM])
def test_the_last_row_is_x0(solver, n):
    """At sigma = 0 the state is the last x0 of the model, whatever came before."""
    table = build(solver, NoiseSchedule.linear(), n, prediction_type="v_prediction")
    c = {name: column[-1] for name, column in table.columns.items()}
    assert c["cz"] == 0
    assert table.draw[-1] == -1
    np.testing.assert_allclose([c["cx"], c["c0"], c["cm"]], [0.0, 1.0, 0.0], atol=1e-14)
    assert not table.h[-1].any()


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear().rescale_zero_terminal_snr(), NoiseSchedule.flow()])
@pytest.mark.parametrize("solver", DATA_FORM)
def test_from_alpha_0_is_the_limit_of_small_alpha(solver, schedule):
    prediction_type = "flow_prediction" if schedule.kind == "flow" else "v_prediction"
    exact = build(solver, schedule, 8, prediction_type=prediction_type)
    assert exact.start[0] == 0.0
    timesteps = schedule.timesteps(8, "trailing", extra_point=True)
    alpha, sigma = schedule.at(timesteps)
    # so little signal that exp(-h) is below rounding; h is 345, so the first point still has a weight near 1/345
    alpha = np.append(np.maximum(alpha, 1e-150), 1.0)
    t = exact.timesteps[exact.ev]
    grid = Grid.from_points(alpha, np.append(sigma, 0.0), t, prediction_type=prediction_type)
    options = {"orders": [1, 1, 2, 1, 2, 1, 2, 1]} if "single" in solver else {}
    near = StepTable.from_rows(SOLVERS[solver](grid, **options))
    start = normals()[0]
    assert relative_error(engine_walk(exact, start), engine_walk(near, start)) < 2e-2
    assert exact.columns["cx"][exact.ev][0] == pytest.approx(near.columns["cx"][near.ev][0])


@pytest.mark.parametrize("solver", [*DATA_FORM, *NOISE_FORM])
def test_a_step_of_no_length_leaves_the_state_alone(solver):
    """Rounding repeats timesteps where a walk has nearly as many steps as its schedule."""
    schedule = NoiseSchedule.scaled_linear()
    timesteps = np.array([900, 700, 700, 600, 400, 300, 100, 100])
    alpha, sigma = schedule.at(timesteps)
    grid = Grid.from_points(np.append(alpha, 1.0), np.append(sigma, 0.0), timesteps, prediction_type="v_prediction")
    table = StepTable.from_rows(SOLVERS[solver](grid))
    end = engine_walk(table, normals()[0])
    assert end.isfinite().all()
    if "single" not in solver and solver not in ("unipc", "sa"):  # whose stages and corrections belong to other steps
        c = {name: table.columns[name][1] for name in ("cx", "c0", "cm", "cz")}
        assert c == {"cx": 1.0, "c0": 0.0, "cm": 0.0, "cz": 0.0}


@pytest.mark.parametrize("solver", NOISE_FORM)
def test_the_noise_form_does_not_start_at_alpha_0(solver):
    with pytest.raises(ValueError, match="data-prediction form"):
        build(solver, NoiseSchedule.flow(), 5, prediction_type="flow_prediction")


@pytest.mark.parametrize("solver", [*DATA_FORM, *NOISE_FORM])
def test_a_late_start_is_a_walk_of_its_own(solver):
    schedule = NoiseSchedule.scaled_linear()
    late = build(solver, schedule, 10, strength=0.4)
    timesteps = schedule.timesteps(10, "trailing", extra_point=True)[6:]
    alpha, sigma = schedule.at(timesteps)
    grid = Grid.from_points(np.append(alpha, 1.0), np.append(sigma, 0.0), timesteps, prediction_type="epsilon")
    own = StepTable.from_rows(SOLVERS[solver](grid))
    for name in ("cx", "c0", "cm", "cz", "t"):
        np.testing.assert_array_equal(late.columns[name], own.columns[name])
    np.testing.assert_array_equal(late.h, own.h)


@pytest.mark.parametrize("solver", NOISE_FORM)
def test_clipping_is_felt_in_the_noise_form(solver):
    """eps follows from the clipped x0, so that a walk on a model without bounds stays near the clip range."""
    table = build(solver, NoiseSchedule.linear(), 12, clip_sample=0.5)
    end = engine_walk(table, normals()[0] * 3, model=lambda x, t: 0.4 * x + 1.0)
    assert end.abs().max() <= 0.5 + 1e-12


def test_a_single_step_group_of_an_sde_saves_its_first_state():
    table = build("dpmpp_single_sde", NoiseSchedule.linear(), 7, order=3)
    assert table.ev.tolist() == [False, True, True, True, False, True, True, True, True]
    assert table.columns["cx"][~table.ev].tolist() == [1.0, 1.0]
    problem = GaussianProblem.on(NoiseSchedule.linear(), "epsilon")
    assert problem.weak_error(table, table.end) < 1.0


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("dpmpp", {"order": 4}, "order is 4"),
        ("dpmpp", {"solver_type": "bh1"}, "solver_type is 'bh1'"),
        ("dpmpp", {"third_order": "third"}, "third_order is 'third'"),
        ("dpmpp_sde", {"eta": -1.0}, "eta is -1.0"),
        ("dpmpp_single", {"orders": [1, 2, 3]}, "orders is"),
        ("dpmpp_single", {"orders": [1, 2, 3, 1, 2]}, "row 4 is of order 2"),
        ("unipc", {"order": 0}, "order is 0"),
        ("unipc", {"solver_type": "heun"}, "solver_type is 'heun'"),
        ("deis", {"order": True}, "order is True"),
        ("sa", {"tau": -0.1}, "tau is -0.1"),
        ("sa", {"corrector_order": 5}, "order is 5"),
    ],
)
def test_options_out_of_range_are_named(solver, options, message):
    with pytest.raises(ValueError, match=message):
        build(solver, NoiseSchedule.linear(), 5, **options)


def test_sa_without_noise_or_corrector_is_dpmpp():
    schedule = NoiseSchedule.linear()
    sa = build("sa", schedule, 6, tau=0.0, corrector_order=0)
    dpmpp = build("dpmpp", schedule, 6, order=2, solver_type="heun")
    start = normals()[0]
    assert relative_error(engine_walk(sa, start), engine_walk(dpmpp, start)) < 1e-14


def test_an_interval_keeps_the_mean_of_the_process():
    """With v = x0 known, alpha * x0 goes to alpha_next * x0, and the variance to sigma_next² for tau = 1."""
    grid = Grid.from_points(np.array([0.3, 0.8]), np.array([0.9, 0.5]), [1.0], prediction_type="sample")
    interval = Interval.between(grid, 0, 1, form="data", tau=1.0)
    assert interval.decay * 0.3 + interval.constant == pytest.approx(0.8, abs=1e-15)
    assert math.hypot(interval.decay * 0.9, interval.std) == pytest.approx(0.5, abs=1e-15)
    assert torch.tensor(interval.weights([0.0, -1.0])).sum().item() == pytest.approx(interval.constant)
