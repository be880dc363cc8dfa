"""Churn against algorithm 2 of Karras et al. 2022, written out in the paper's terms."""

import math

import pytest
import torch

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build
from fastdiff.table import run_table

LINEAR, EDM, FLOW = NoiseSchedule.linear(), NoiseSchedule.edm(), NoiseSchedule.flow()
GENERATOR = torch.Generator().manual_seed(3)
NORMALS = torch.randn(40, 2, 3, generator=GENERATOR, dtype=torch.float64)
CHURN = {"s_churn": 2.5, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}


def denoise(x, sigma):
    """A denoiser D(x; sigma) that says more of x where there is less noise."""
    return torch.tanh(x / math.hypot(1, sigma)) * 0.8 + 0.1 * math.atan(sigma)


def algorithm_2(levels, x, *, s_churn, s_tmin, s_tmax, s_noise, corrected=True):
    """Lines 2 to 13; noise is drawn where gamma > 0. corrected=False leaves out lines 9 to 12."""
    draws, n = iter(NORMALS[1:]), len(levels)
    for sigma, sigma_next in zip(levels, [*levels[1:], 0.0]):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma + gamma * sigma
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * next(draws)
        d = (x - denoise(x, sigma_hat)) / sigma_hat
        x_next = x + (sigma_next - sigma_hat) * d
        if sigma_next > 0 and corrected:
            d_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2
        x = x_next
    return x


def edm_network(model_input, t):
    """The network inside D: c_skip * x + c_out * F(c_in * x; ln(sigma) / 4) = D(x; sigma)."""
    sigma = math.exp(4 * t)
    x = model_input * math.hypot(0.5, sigma)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.hypot(0.5, sigma)
    return (denoise(x, sigma) - c_skip * x) / c_out


@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=["vp", "edm"])
@pytest.mark.parametrize("options", [CHURN, CHURN | {"s_churn": 1e3}, CHURN | {"s_tmax": math.inf, "s_tmin": 0.0}])
@pytest.mark.parametrize("solver", ["edm", "euler"])
def test_walk_equals_algorithm_2(solver, options, schedule):
    for steps in (1, 2, 9):
        table = build(solver, schedule, steps, prediction_type="edm", sigma_spacing="karras", **options)
        start = NORMALS[0] * table.init_noise_sigma
        got = run_table(table, edm_network, start, lambda stream, draw: NORMALS[1 + draw])
        levels = schedule.sigmas(steps, "karras").tolist()
        want = algorithm_2(levels, start, **options, corrected=solver == "edm")
        # A correction multiplies the difference of two x0, each with its rounding, by half the ratio of two sigmas.
        rounding = 2**-53 * levels[0] / levels[-1]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 + rounding)


def test_the_first_step_is_churned_by_a_row_that_does_not_evaluate():
    table = build("edm", EDM, 4, prediction_type="edm", sigma_spacing="karras", s_churn=1.0)
    assert table.ev.tolist() == [False] + [True] * 7
    # predictors draw nothing, correctors the noise of the step after them, and nothing follows the last step
    assert table.draw.tolist() == [0, -1, 1, -1, 2, -1, 3, -1]
    calm = build("edm", EDM, 4, prediction_type="edm", sigma_spacing="karras", s_churn=1.0, s_tmax=1.0)
    assert calm.ev.all()
    assert 0 < calm.draw.max() + 1 < 4


def test_walks_without_churn_are_heuns():
    for schedule, prediction_type in ((LINEAR, "epsilon"), (EDM, "edm"), (FLOW, "flow_prediction")):
        heun, edm = (build(name, schedule, 6, prediction_type=prediction_type) for name in ("heun", "edm"))
        assert all((heun.columns[name] == edm.columns[name]).all() for name in heun.columns)


def test_churn_of_a_flow_walk_keeps_its_marginals():
    # A point mass x0 = c: the ideal denoiser is c, and every state alpha * c + sigma * z must keep that form.
    table = build("edm", FLOW, 6, prediction_type="sample", s_churn=2.0)
    states = []

    def model(x, t):
        states.append((x, t / 1000))
        return torch.full_like(x, 0.7)

    x = torch.randn(20_000, generator=GENERATOR, dtype=torch.float64)
    draws = torch.randn(6, 20_000, generator=GENERATOR, dtype=torch.float64)
    end = run_table(table, model, x, lambda stream, draw: draws[draw])
    torch.testing.assert_close(end, torch.full_like(end, 0.7))
    assert len(states) == 11
    for state, sigma in states:
        # mean and standard deviation of 20,000 normals are within 5 / sqrt(20,000) = 0.035 of theirs
        assert state.mean().item() == pytest.approx((1 - sigma) * 0.7, abs=0.035 * sigma)
        assert state.std().item() == pytest.approx(sigma, rel=0.035)
