"""Ours and diffusers' in turns, for a machine whose speed drifts: python -m benchmarks.paired

The rows of `python -m benchmarks` take minutes one after the other. Here every round runs each contender once, in an
order that turns from round to round, and ratios are taken within a round. All have what `keep_host_memory` gives.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.contenders import contenders
from benchmarks.model_row import make_task
from benchmarks.numerics import FLOAT32
from benchmarks.store import commit
from benchmarks.suite import OURS
from benchmarks.training_contenders import trainers
from benchmarks.training_task import TrainingTask
from benchmarks.workloads import Workload
from fastdiff.environment import environment
from fastdiff.host_memory import keep_host_memory

PEERS = ("diffusers", "diffusers-best")
Call = Callable[[], object]


def sampling_calls(workload: Workload, device: torch.device) -> dict[str, Call]:
    """A whole sampling each, with the same weights and noise."""
    task = make_task(workload, device)
    return {one.name: one.walk(task) for one in contenders(device) if one.name in (OURS, *PEERS)}


def training_calls(workload: Workload, device: torch.device) -> dict[str, Call]:
    """An optimizer step each."""
    task = TrainingTask.of(workload, device)
    calls: dict[str, Call] = {}
    for trainer in trainers(device):
        if trainer.name in (OURS, *PEERS):
            training, steps = trainer.begin(task), itertools.count()
            calls[trainer.name] = lambda training=training, steps=steps: training.advance(next(steps))
    return calls


def seconds(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """What each call took in each round; three rounds before that warm up."""
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-3, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            calls[name]()
            if number >= 0:
                taken[name].append(time.perf_counter() - began)
    return taken


def compare(taken: dict[str, list[float]]) -> dict:
    """Medians in ms, and each peer's time over ours within a round: median, 10th and 90th percentile."""
    ratios = {
        name: np.quantile(np.divide(taken[name], taken[OURS]), [0.5, 0.1, 0.9]).tolist()
        for name in taken
        if name != OURS
    }
    medians = {name: 1e3 * statistics.median(values) for name, values in taken.items()}
    return {"ms": medians, "ratios": ratios, "seconds": taken}


def page(report: dict) -> str:
    """Markdown."""
    versions = report["environment"]
    lines = [
        "# In turns with diffusers",
        "",
        f"`{report['command']}`, {report['date']}, commit {report['commit']}, torch {versions['torch']}, diffusers "
        f"{versions['packages'].get('diffusers')}, {versions['cpu']}, {versions['torch_threads']} threads, float32. "
        "diffusers-best: channels-last and compiled.",
        "",
        "| work | contender | ms | its time over ours in a round (10th to 90th percentile) |",
        "|---|---|---|---|",
    ]
    for work, figures in report["work"].items():
        for name, ms in figures["ms"].items():
            ratio = "1"
            if name in figures["ratios"]:
                middle, low, high = figures["ratios"][name]
                ratio = f"**{middle:.2f}** ({low:.2f}–{high:.2f})"
            lines.append(f"| {work} | {name} | {ms:.0f} | {ratio} |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _as_measured() -> Iterator[None]:
    keep_host_memory()
    with FLOAT32.installed():
        yield


def measure(quick: bool, rounds: int) -> dict:
    """Both works on the CPU."""
    device = torch.device("cpu")
    workload = Workload(model="tiny", batch=2) if quick else Workload(model="small", batch=8)
    with _as_measured():
        return {
            f"sampling/{workload.name}": compare(seconds(sampling_calls(workload, device), rounds)),
            f"training/{workload.name}": compare(seconds(training_calls(workload, device), 3 * rounds)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the page")
    parser.add_argument("--rounds", type=int, default=12, help="of sampling; three times as many of training")
    parser.add_argument("--quick", action="store_true", help="a tiny workload: no measurement")
    options = parser.parse_args()
    day = datetime.date.today().isoformat()
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.paired", *sys.argv[1:]]),
        "date": day,
        "commit": commit(),
        "environment": environment(),
        "work": measure(options.quick, options.rounds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"paired_cpu_{day}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
