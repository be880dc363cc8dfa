"""The README's table of solvers, measured: python -m benchmarks.solver_table

For every case of benchmarks/solver_cases*.py: its names elsewhere, the worst relative error of whole float64 walks
against diffusers' scheduler, and the order of convergence measured on Gaussian data. Writes a JSON with every walk, a
page with the table, and the table between its two markers in the README.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks import solver_cases_ancestral, solver_cases_exponential, solver_cases_sigma
from benchmarks.solver_cases import SolverCase
from fastdiff.environment import environment
from fastdiff.solvers import names

CASES: tuple[SolverCase, ...] = (
    *solver_cases_ancestral.CASES,
    *solver_cases_sigma.CASES,
    *solver_cases_exponential.CASES,
)
MARKERS = ("<!-- solver table: python -m benchmarks.solver_table -->", "<!-- end of the solver table -->")


def measure(case: SolverCase) -> dict[str, Any]:
    """Everything the table says about a case, and every walk's error."""
    errors = case.errors()
    facades = importlib.import_module("fastdiff.compat.diffusers")
    facade = None if case.diffusers is None else f"Fast{case.diffusers}"
    return {
        "name": case.name,
        "solver": case.solver,
        "options": dict(case.options),
        "diffusers": case.diffusers,
        "facade": facade if facade and hasattr(facades, facade) else None,
        "guided_diffusion": case.guided_diffusion,
        "k_diffusion": case.k_diffusion,
        "walks": errors,
        "worst_error": max(errors.values(), default=None),
        "bound": case.bound,
        "expected_order": case.order,
        "order": case.measured_order(),
        "order_is_weak": case.stochastic,
        "note": case.note,
    }


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown, a line for each measured case."""
    lines = [
        "| solver | diffusers | guided-diffusion or k-diffusion | worst error | order |",
        "|---|---|---|---|---|",
    ]
    for case in measured:
        options = ", ".join(f"{name}={value}" for name, value in case["options"].items())
        name = f"`{case['solver']}`" + (f" {options}" if options else "")
        if case["name"] in names():  # options under a name of their own
            name = f"`{case['name']}`"
        theirs = ("(Fast)" if case["facade"] else "") + (case["diffusers"] or "–")
        functions = [case[key] for key in ("guided_diffusion", "k_diffusion") if case[key]]
        error = "–" if case["worst_error"] is None else f"{case['worst_error']:.0e}"
        order = "–" if case["order"] is None else f"{case['order']:.2f}{' (weak)' if case['order_is_weak'] else ''}"
        lines.append(f"| {name} | {theirs} | {', '.join(functions) or '–'} | {error} | {order} |")
    return "\n".join(lines)


def write_between_markers(text: str, content: str) -> str:
    """`text` with `content` between the two markers, each of which must be there once."""
    first, last = MARKERS
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"the text must hold {first!r} and {last!r} once each")
    return f"{text.split(first)[0]}{first}\n{content}\n{last}{text.split(last)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the page")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="file with the two markers")
    options = parser.parse_args()
    measured = [measure(case) for case in CASES]
    day = datetime.date.today().isoformat()
    command = shlex.join(["python", "-m", "benchmarks.solver_table", *sys.argv[1:]])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"solver-table_cpu_{day}"
    report: dict[str, Any] = {"command": command, "date": day, "environment": environment(), "cases": measured}
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    notes = "\n".join(f"- `{case['name']}`: {case['note']}." for case in measured if case["note"])
    page = f"# Solvers\n\n`{command}`, {day}, torch {report['environment']['torch']}, diffusers "
    page += f"{importlib.import_module('diffusers').__version__}.\n\n{table(measured)}\n\n{notes}\n"
    path.with_suffix(".md").write_text(page)
    options.readme.write_text(write_between_markers(options.readme.read_text(), table(measured)))
    print(page)


if __name__ == "__main__":
    main()
