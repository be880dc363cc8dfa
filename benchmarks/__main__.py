"""The benchmark suite: python -m benchmarks all --out DIR, and again until nothing is open.

Each run adds to the newest result file in DIR that was begun on this device with these versions and sources, and
measures what is not in it. On a machine that keeps nothing, take the JSON away after each run and bring it back into
DIR for the next. `report` turns result files into a page and plots, `compare` says what has changed between two.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import store
from benchmarks.compare import compare, describe
from benchmarks.report import write_pages, write_report
from benchmarks.runner import DeviceLost, Outcome, Runner
from benchmarks.suite import OURS, SECTIONS, Row
from fastdiff.host_memory import keep_host_memory

MODULES = {
    "kernels": "benchmarks.kernel_rows",
    "unet": "benchmarks.unet_rows",
    "sampling": "benchmarks.sampling_rows",
    "training": "benchmarks.training_rows",
}
# What has goals comes first, and what takes minutes to compile after what takes seconds: a CPU's kernels, which are
# plain PyTorch there, come last.
ORDER = {"cuda": ("kernels", "sampling", "training", "unet"), "cpu": ("sampling", "training", "unet", "kernels")}
BUDGET_S = {"cuda": 480.0, "cpu": 300.0}


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
        run.add_argument(
            "--budget-s", type=float, help="start no row that would end later than this (480, on a CPU 300)"
        )
        run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        run.add_argument("--only", default="", help="rows whose key contains this text, and ours beside them")
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
    sections = list(ORDER[device.type]) if options.command == "all" else [options.command]
    budget_s = BUDGET_S[device.type] if options.budget_s is None else options.budget_s
    rows = rows_of(sections, device, quick=options.quick)
    workloads = {row.workload for row in rows if options.only in row.key}
    # ours comes along, so that what is measured can be compared
    rows = [row for row in rows if options.only in row.key or (row.is_ours and row.workload in workloads)]
    if not rows:
        raise ValueError(f"--only {options.only!r} leaves no row of {', '.join(sections)}")
    if device.type == "cpu":
        # ours does so where it compiles or trains, and the setting is the process's: all shall have it
        keep_host_memory()
    runner = Runner(device=device, folder=options.out, quick=options.quick, budget_s=budget_s, command=command)
    return runner.run(rows)


def summary(outcome: Outcome) -> str:
    """A line for each workload that this run measured: our median and everybody else's in multiples of it."""
    report, lines = store.load(outcome.path), []
    for workload in dict.fromkeys(key.rsplit("/", 1)[0] for key in outcome.done):
        ours = store.newest(report, f"{workload}/{OURS}", status="done", run=outcome.run)
        peers = [key for key in outcome.done if key.startswith(f"{workload}/") and not key.endswith(f"/{OURS}")]
        if ours is None or "ms" not in ours:
            continue
        multiples = ", ".join(
            f"{key.rsplit('/', 1)[1]} {report['rows'][key][-1]['ms'] / ours['ms']:.2f}x" for key in peers
        )
        lines.append(f"{workload}: {ours['ms']:.4g} ms; {multiples}".rstrip("; "))
    counts = f"{len(outcome.done)} rows measured, {len(outcome.failed)} failed, {len(outcome.skipped)} skipped"
    if outcome.open:
        counts += f", {len(outcome.open)} open for want of time: run the same command again"
    return "\n".join([*lines, f"{counts}: {outcome.path}"])


def run(options: argparse.Namespace, command: str) -> int:
    """Do what was asked for; 1 where a row failed or, comparing, something has become slower."""
    if options.command == "report":
        for path in write_report(options.files, options.out):
            print(path)
        return 0
    if options.command == "compare":
        changes = compare(store.load(options.before), store.load(options.after))
        print(describe(changes))
        return 1 if any(change.verdict == "slower" for change in changes) else 0
    outcome = measure(options, command)
    print(summary(outcome))
    if outcome.path.exists():
        write_pages(store.load(outcome.path), outcome.path)
    return 1 if outcome.failed else 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        return run(options, shlex.join(["python", "-m", "benchmarks", *arguments]))
    except (ValueError, DeviceLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
