"""The benchmark suite: python -m benchmarks all --out DIR, and again until nothing is open.

Each run adds to the newest result file in DIR that was begun on this device with these versions and sources, and
measures what is not in it. `report` turns result files into a page and plots, `compare` says what has changed between
two of them.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.runner import DeviceLost, Outcome, Runner
from benchmarks.suite import SECTIONS, Row

MODULES = {
    "kernels": "benchmarks.kernel_rows",
    "unet": "benchmarks.unet_rows",
    "sampling": "benchmarks.sampling_rows",
    "training": "benchmarks.training_rows",
}


def rows_of(sections: list[str], device: torch.device, *, quick: bool) -> list[Row]:
    """Of the sections' modules, in their order of priority."""
    rows: list[Row] = []
    for section in sections:
        rows += importlib.import_module(MODULES[section]).rows(device, quick=quick)
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*SECTIONS, "all"):
        run = commands.add_parser(name, help="measure every section" if name == "all" else f"measure {name}")
        run.add_argument("--out", type=Path, required=True, help="folder of the result file")
        run.add_argument("--quick", action="store_true", help="tiny workloads, few repeats: a look, no measurement")
        run.add_argument("--budget-s", type=float, default=480.0, help="start no row that would end later than this")
        run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        run.add_argument("--only", default="", help="rows whose key contains this text")
    report = commands.add_parser("report", help="a page and plots from result files of one device")
    report.add_argument("files", type=Path, nargs="+")
    report.add_argument("--out", type=Path, required=True, help="folder of the merged JSON, the page and the plots")
    compare = commands.add_parser("compare", help="what has changed between two result files")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, command: str) -> Outcome:
    """Run the rows of the options. Raises ValueError where they leave none."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device")
    device = torch.device(options.device)
    sections = list(SECTIONS) if options.command == "all" else [options.command]
    rows = [row for row in rows_of(sections, device, quick=options.quick) if options.only in row.key]
    if not rows:
        raise ValueError(f"--only {options.only!r} leaves no row of {', '.join(sections)}")
    runner = Runner(device=device, folder=options.out, quick=options.quick, budget_s=options.budget_s, command=command)
    return runner.run(rows)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        outcome = measure(options, shlex.join(["python", "-m", "benchmarks", *arguments]))
    except (ValueError, DeviceLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(outcome.done)} measured, {len(outcome.failed)} failed, {len(outcome.skipped)} skipped")
    if outcome.open:
        print(f"{len(outcome.open)} open for want of time: run the same command again")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
