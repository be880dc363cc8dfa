"""Solvers on data N(0, s²), whose ideal network is linear in x and whose probability-flow ODE has a closed form."""

import math

import numpy as np
import pytest
import torch

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build
from fastdiff.table import run_table

STD = 0.6
# Both reach so little noise that the last step, always of order 1, does not decide the order.
SCHEDULES = {
    "vp": NoiseSchedule.linear(1000, beta_start=1e-9),
    "edm": NoiseSchedule.edm(sigma_min=1e-5, sigma_max=20.0, num_train_timesteps=1000),
}


def ideal_x0(schedule):
    """E[x0 | x] at a fractional training timestep, the inverse of `NoiseSchedule.timestep_of`."""
    log_level, index = np.log(schedule.noise_level), np.arange(schedule.num_train_timesteps)

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = map(float, schedule.from_noise_level(np.exp(np.interp(t, index, log_level))))
        return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x

    return network


def ode_error(solver, schedule, steps, **options):
    table = build(solver, schedule, steps, prediction_type="sample", sigma_spacing="exponential", **options)
    end = run_table(table, ideal_x0(schedule), torch.tensor([table.init_noise_sigma], dtype=torch.float64))
    # Along the ODE x stays the same number of its own standard deviations sqrt(alpha² s² + sigma²) from 0.
    alpha, sigma, c_in = float(schedule.alpha[-1]), float(schedule.sigma[-1]), float(table.columns["c_in"][0])
    exact = table.init_noise_sigma * c_in / math.hypot(alpha * STD, sigma) * STD
    return abs(end.item() - exact) / STD


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        ("euler", {}, 1),
        ("ddim", {}, 1),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ],
    ids=["euler", "ddim", "dpmpp_2m", "dpmpp_2m-heun"],
)
def test_order_of_convergence(solver, options, order, schedule):
    coarse, fine = (ode_error(solver, schedule, steps, **options) for steps in (60, 120))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert fine < (0.1 if order == 1 else 0.01)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("solver", "options"),
    [("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {"eta": 1.0}), ("euler_a", {})],
    ids=["ddpm", "ddpm-fixed_large", "ddim-eta1", "euler_a"],
)
def test_stochastic_walks_end_with_the_variance_of_the_data(solver, options, schedule):
    table = build(solver, schedule, 480, prediction_type="sample", sigma_spacing="exponential", **options)
    network, c = ideal_x0(schedule), table.columns
    variance = table.init_noise_sigma**2
    for i in range(len(table)):
        slope = network(torch.tensor(c["c_in"][i]), c["t"][i]).item()  # x0 = pm * slope * x
        factor = c["cx"][i] + c["c0"][i] * (c["px"][i] + c["pm"][i] * slope) + c["cm"][i] * slope
        variance = factor**2 * variance + c["cz"][i] ** 2
    assert math.sqrt(variance) == pytest.approx(STD, rel=0.02)
