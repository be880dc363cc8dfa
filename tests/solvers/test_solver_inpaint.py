"""In-painting tables: where the known part stands after every row, and RePaint's jumps."""

import numpy as np
import pytest
import torch

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build, names
from fastdiff.table import run_table

LINEAR = NoiseSchedule.linear()
SOLVERS = [name for name in names() if name not in ("repaint", "ddim_inverse")]
GENERATOR = torch.Generator().manual_seed(1)


def setting(solver):
    """A schedule and a prediction type on which the solver walks."""
    if solver == "flow_heun":
        return NoiseSchedule.flow(), "flow_prediction"
    return LINEAR, "edm" if solver == "consistency" else "epsilon"


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        *((name, {}) for name in SOLVERS),
        ("edm", {"s_churn": 3.0}),
        ("ddim", {"strength": 0.5}),
        ("pndm", {"plms": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_row_keeps_the_known_part_at_the_level_the_model_is_told_next(solver, options):
    schedule, prediction_type = setting(solver)
    table = build(solver, schedule, 6, prediction_type=prediction_type, inpaint=True, **options)
    known, x = torch.randn(2, 50, generator=GENERATOR, dtype=torch.float64)
    draws = torch.randn(len(table), 50, generator=GENERATOR, dtype=torch.float64)
    seen = []

    def model(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    end = run_table(table, model, x, lambda stream, draw: draws[draw], known=known, mask=torch.ones(50))
    torch.testing.assert_close(end, known, rtol=0, atol=0)
    assert (table.columns["k0"][-1], table.columns["kz"][-1]) == (1.0, 0.0)
    evaluated = np.flatnonzero(table.ev)
    for row, (state, t) in list(zip(evaluated, seen))[1:]:
        before = row - 1
        k0, kz, z = table.columns["k0"][before], table.columns["kz"][before], draws[table.draw[before]]
        torch.testing.assert_close(state, table.columns["c_in"][row] * (k0 * known + kz * z))
        if prediction_type == "edm":
            level = np.exp(t / 250)
        elif schedule.kind == "flow":
            level = t / (1000 - t)
        else:
            level = np.exp(np.interp(t, np.arange(1000), np.log(schedule.noise_level)))
        assert kz / k0 == pytest.approx(level, rel=1e-9)


def test_outside_the_mask_a_walk_is_the_solvers_own():
    plain, keeping = (build("euler_a", LINEAR, 5, inpaint=inpaint) for inpaint in (False, True))
    x, known = torch.randn(2, 8, generator=GENERATOR, dtype=torch.float64)
    draws = torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)
    start = x * plain.init_noise_sigma

    def walk(table, **blend):
        return run_table(table, lambda x, t: torch.tanh(x), start, lambda stream, draw: draws[draw], **blend)

    torch.testing.assert_close(walk(keeping, known=known, mask=torch.zeros(8)), walk(plain))
    torch.testing.assert_close(walk(keeping), walk(plain))
    half = (torch.arange(8) < 4).double()
    torch.testing.assert_close(walk(keeping, known=known, mask=half), half * known + (1 - half) * walk(plain))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_jumps_are_forward_noising(eta):
    steps, jump, times = 50, 5, 3
    table = build("repaint", LINEAR, steps, jump_length=jump, jump_n_sample=times, eta=eta)
    n_jumps = len(range(0, steps - jump, jump)) * (times - 1)
    assert (~table.ev).sum() == n_jumps
    assert table.ev.sum() == steps + n_jumps * jump
    c, t = table.columns, table.columns["t"]
    for row in np.flatnonzero(~table.ev):
        # from where the row before arrived to the timestep of the row after: q(x_t | x_s) of the forward process
        alpha, sigma = LINEAR.at([int(t[row + 1])])
        assert c["cx"][row] * c["k0"][row - 1] == pytest.approx(alpha[0], rel=1e-12)
        assert np.hypot(c["cx"][row] * c["kz"][row - 1], c["cz"][row]) == pytest.approx(sigma[0], rel=1e-12)
        assert c["k0"][row] == c["kz"][row] == 0.0
        assert t[row - jump] == t[row + 1]
    assert build("repaint", LINEAR, 5).ev.all()  # too short for a jump of 10


def test_repaint_steps_are_those_of_ddim():
    ours, ddim = build("repaint", LINEAR, 7, eta=0.3, jump_n_sample=1), build("ddim", LINEAR, 7, eta=0.3, inpaint=True)
    for name in ours.columns:
        np.testing.assert_array_equal(ours.columns[name], ddim.columns[name], err_msg=name)
