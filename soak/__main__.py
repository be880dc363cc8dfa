"""Try every promise as often as it says: python -m soak, or a part with --only.

A row is written after each trial. An attempt that fails is described with the command that repeats it, and makes the
exit status 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from pathlib import Path

import torch

# before anything imports Triton: without a GPU the kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# solver steps compiled by Inductor take seconds for each kind of arguments; trials of those switch it on
os.environ.setdefault("FASTDIFF_COMPILE_STEP", "0")

from benchmarks.store import device_name
from fastdiff.environment import environment
from fastdiff.kernels import dispatch
from soak import record
from soak.trial import Outcome, Trial, run
from soak.trials import TRIALS

# the trial of the kernels sends its own calls there; all else runs the references, as a program does without a GPU
dispatch.INTERPRET = False
WITHOUT_GPU = (
    "Kernels: Triton's interpreter ran them, not a GPU. Tensors of more than 2³¹ elements were not tried, nor would a "
    "read out of bounds have been noticed that changes no result.",
    "CUDA graphs: nothing was captured; a replay ran the step on the static buffers.",
    "Threads: no side streams.",
    "The compiler may fail: that of C++ and its cache were broken, not Triton, which compiles nothing on a CPU.",
    "Resume is exact: on the CPU only, not with --deterministic on a GPU. There are no loader workers: the data is in "
    "memory.",
    "A NaN stops the run: that the host does not wait for the device in a step is tested on a GPU only.",
    "Out of memory: the error was raised in place of a full GPU's.",
)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the JSON file; by default benchmarks/results/soak_DEVICE_DATE.json")
    parser.add_argument("--only", default="", help="trials whose name or promise contains this text")
    parser.add_argument("--count", type=int, help="make this many attempts instead of the full number")
    parser.add_argument("--attempt", type=int, help="make this one attempt, to repeat a failure; nothing is written")
    parser.add_argument("--missing", action="store_true", help="only what the file has no full number of")
    parser.add_argument("--list", action="store_true", help="name the trials and make none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 where all was survived, 1 where not, 2 for a wrong argument."""
    options = parse(arguments)
    chosen = [trial for trial in TRIALS if options.only in trial.name or options.only in trial.promise]
    if not chosen:
        print(
            f"--only must be part of a trial's name or promise, got {options.only!r}; --list shows them",
            file=sys.stderr,
        )
        return 2
    if options.list:
        for trial in chosen:
            print(f"{trial.name}: {trial.promise}: {trial.full} × {trial.tried}")
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.out or RESULTS / f"soak_{device_name(device)}_{datetime.date.today()}.json"
    about = {
        "environment": environment(),
        "limits": [] if device.type == "cuda" else list(WITHOUT_GPU),
        "what": f"`make soak`, {datetime.date.today()}, {device_name(device)}, torch {torch.__version__}, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}",
    }
    # now: the files may be edited while the trials run
    commit = record.commit()
    failed = 0
    for trial in chosen:
        if options.missing and record.is_done(record.load(path), trial):
            continue
        outcome = attempt(trial, options)
        print(verdict(trial, outcome), flush=True)
        failed += not outcome.ok
        if options.attempt is None:
            # anew: another part may be under way beside this one
            results = {**record.load(path), **about}
            record.add(results, trial, outcome, commit)
            # in the order of the promises, whatever was tried first
            rows = results["rows"]
            results["rows"] = {one.name: rows[one.name] for one in TRIALS if one.name in rows}
            record.save(results, path, TRIALS)
    return 1 if failed else 0


def attempt(trial: Trial, options: argparse.Namespace) -> Outcome:
    """The trial in a folder of its own."""
    numbers = range(options.count or trial.full)
    if options.attempt is not None:
        numbers = range(options.attempt, options.attempt + 1)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return run(trial, numbers, Path(folder))


def verdict(trial: Trial, outcome: Outcome) -> str:
    """A line on what came of it, and two more after a failure."""
    if outcome.absent:
        return f"{trial.name}: not applicable here: {outcome.absent}"
    line = f"{trial.name}: {outcome.survived} of {outcome.tried} survived in {outcome.seconds:.0f} s ({trial.tried})"
    return line if outcome.ok else f"{line}\n  {outcome.failure}\n  again: {record.repeat(trial, outcome)}"


if __name__ == "__main__":
    sys.exit(main())
