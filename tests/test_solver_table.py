"""The README's table of solvers is the one that the command wrote, and the command knows every case."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from benchmarks.solver_table import CASES, MARKERS, table, write_between_markers

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("solver-table_cpu_*.json"))


def test_readme_shows_the_committed_table():
    newest, text = RESULTS[-1], (ROOT / "README.md").read_text()
    measured = json.loads(newest.read_text())["cases"]
    assert text == write_between_markers(text, table(measured))
    assert newest.name in text
    assert table(measured) in newest.with_suffix(".md").read_text()


def test_committed_table_has_every_case_within_its_bounds():
    measured = {case["name"]: case for case in json.loads(RESULTS[-1].read_text())["cases"]}
    assert list(measured) == [case.name for case in CASES]
    for case in CASES:
        row = measured[case.name]
        assert list(row["walks"]) == [str(walk) for walk in case.walks], case.name
        assert row["worst_error"] is None or row["worst_error"] <= case.bound, case.name
        assert case.order is None or abs(row["order"] - case.order) <= case.order_tolerance, case.name


def test_text_without_markers_is_refused():
    first, last = MARKERS
    assert write_between_markers(f"a {first}\nold\n{last} b", "new") == f"a {first}\nnew\n{last} b"
    with pytest.raises(ValueError, match="once each"):
        write_between_markers(f"{first} {first} {last}", "new")
