"""DDIM inversion: what it undoes exactly, and how near a round trip comes."""

import numpy as np
import pytest
import torch

from fastdiff.prediction import prediction_target
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build
from fastdiff.table import run_table

SCHEDULES = {
    "vp": NoiseSchedule.linear(),
    "zero_terminal": NoiseSchedule.scaled_linear().rescale_zero_terminal_snr(),
    "flow": NoiseSchedule.flow(shift=2.0),
    "edm": NoiseSchedule.edm(sigma_max=10.0),
}
GENERATOR = torch.Generator().manual_seed(5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction", "edm"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_known_noise_is_added_exactly(kind, prediction_type):
    """A model that knows the one pair (x0, eps) its state is made of leads x0 to alpha * x0 + sigma * eps."""
    schedule = SCHEDULES[kind]
    from_alpha_0 = kind in ("zero_terminal", "flow") and prediction_type in ("epsilon", "edm")
    spacing = "leading" if from_alpha_0 else "trailing"
    x0, eps = torch.randn(2, 7, generator=GENERATOR, dtype=torch.float64)
    table = build("ddim_inverse", schedule, 9, prediction_type=prediction_type, timestep_spacing=spacing)
    timesteps = schedule.timesteps(9, spacing)
    told = dict(zip(table.columns["t"].tolist(), timesteps[::-1].tolist()))

    def model(x, t):
        alpha, sigma = schedule.at([told[t]])
        c_x0, c_eps = prediction_target(prediction_type, alpha, sigma, schedule.sigma_data)
        return float(c_x0[0]) * x0 + float(c_eps[0]) * eps

    alpha, sigma = schedule.at(timesteps[:1])
    got = run_table(table, model, x0)
    torch.testing.assert_close(got, float(alpha[0]) * x0 + float(sigma[0]) * eps, rtol=1e-11, atol=1e-11)
    assert (table.start, table.init_noise_sigma) == ((1.0, 0.0), 1.0)
    np.testing.assert_allclose(table.end, (alpha[0], sigma[0]))


def test_a_round_trip_comes_back_the_nearer_the_more_steps():
    x = torch.randn(5, generator=GENERATOR, dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        there, back = (build(name, SCHEDULES["vp"], steps) for name in ("ddim_inverse", "ddim"))
        noise = run_table(there, lambda x, t: 0.9 * torch.tanh(x), x)
        errors.append((run_table(back, lambda x, t: 0.9 * torch.tanh(x), noise) - x).abs().max().item())
    assert errors[2] < 0.15
    # first order: half the error for twice the steps, within the next order's term
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.08)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.05)


def test_strength_inverts_part_of_the_way():
    whole, half = (build("ddim_inverse", SCHEDULES["vp"], 10, strength=strength) for strength in (1.0, 0.5))
    np.testing.assert_array_equal(half.columns["t"], whole.columns["t"][:5])
    np.testing.assert_allclose(half.end, [value[0] for value in SCHEDULES["vp"].at([499])])
