"""Solvers on Gaussian data, whose ideal network is linear in x and whose probability-flow ODE has a closed form."""

import math

import numpy as np
import pytest
import torch

from benchmarks.solver_table import CASES
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build

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


@pytest.mark.parametrize("case", [case for case in CASES if case.order], ids=lambda case: case.name)
def test_order_of_convergence(case):
    # Measured between two numbers of steps, an order still holds a little of the next one's term.
    assert case.measured_order() == pytest.approx(case.order, abs=case.order_tolerance)
    assert case.convergence_error(2 * case.order_steps) < 0.05


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
