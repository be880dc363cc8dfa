"""Every case of the solver table: whole walks in float64 against diffusers."""

import pytest

pytest.importorskip("diffusers")

from benchmarks.solver_table import CASES
from fastdiff.solvers import names

# what diffusers' own source says of NumPy 2 and of its older options
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`algorithm_type:FutureWarning"),
]


def test_every_solver_has_a_case_and_every_case_its_own_name():
    case_names = [case.name for case in CASES]
    assert set(names()) <= {case.solver for case in CASES} | set(case_names)
    assert len(set(case_names)) == len(case_names)


@pytest.mark.parametrize("case", [case for case in CASES if case.walks], ids=lambda case: case.name)
def test_walks_equal_diffusers(case):
    errors = case.errors()
    assert len(errors) == len(case.walks)
    assert {walk: error for walk, error in errors.items() if not error <= case.bound} == {}
