"""Every case of the solver table: whole float64 walks against diffusers, and the order of convergence."""

import pytest

pytest.importorskip("diffusers")

from benchmarks.solver_table import CASES
from fastdiff.solvers import names

# what diffusers' own source says of NumPy 2 and of its older options
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:diffusers", "ignore:.*:FutureWarning:diffusers")


def test_every_solver_has_a_case_and_every_case_its_own_name():
    case_names = [case.name for case in CASES]
    assert set(names()) <= {case.solver for case in CASES} | set(case_names)
    assert len(set(case_names)) == len(case_names)


@pytest.mark.parametrize("case", [case for case in CASES if case.walks], ids=lambda case: case.name)
def test_walks_equal_diffusers(case):
    errors = case.errors()
    assert len(errors) == len(case.walks)
    assert {walk: error for walk, error in errors.items() if not error <= case.bound} == {}


@pytest.mark.parametrize("case", [case for case in CASES if case.order], ids=lambda case: case.name)
def test_order_of_convergence(case):
    # Measured between two numbers of steps, an order still holds a little of the next one's term.
    assert case.measured_order() == pytest.approx(case.order, abs=case.order_tolerance)
    assert case.convergence_error(2 * case.order_steps) < 0.05
