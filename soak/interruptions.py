"""SIGTERM and Ctrl-C at a random time of a real training run, alone and under torchrun."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastdiff import checkpoint
from soak.children import command, launch, stop
from soak.small_runs import losses_of, require_same_checkpoint
from soak.trial import Attempt, require, trial

SAVED = "SIGTERM and Ctrl-C save"
WORDS = ("train", "--batch-size", "4", "--log-every", "1", "--sample-every", "0", "--no-progress", "--device", "cpu")
WORDS += ("--dropout", "0.1", "--gradient-accumulation-steps", "2")
# with a constant learning rate the first steps of a run are the same whatever its end
ALIKE, EVERY = ("--lr-schedule", "constant"), 20


def wait_for(running: subprocess.Popen[str], log: Path, *, lines: int, seconds: float = 180) -> None:
    """Until the run has logged so many steps."""
    deadline = time.monotonic() + seconds
    while not log.exists() or log.read_text().count("\n") < lines:
        if running.poll() is not None or time.monotonic() > deadline:
            stop(running)
            output, _ = running.communicate()
            require(False, f"the run did not begin: {output[-500:]}")
        time.sleep(0.01)


def printed(line: str) -> list[str]:
    """The words of a command that a run has printed, with the programs of this environment."""
    name, *words = shlex.split(line)
    programs = {"fastdiff": "fastdiff", "torchrun": "torch.distributed.run"}
    require(name in programs, f"the command that goes on begins with {name!r}")
    return [sys.executable, "-m", programs[name], *words]


def finish(words: Sequence[str]) -> None:
    """Run a command to its end."""
    running = launch(words)
    try:
        output, _ = running.communicate(timeout=300)
    finally:
        stop(running)
    require(running.returncode == 0, f"exit status {running.returncode} of {shlex.join(words)}: {output[-600:]}")


def interrupt(folder: Path, number: int, processes: int | None) -> None:
    """SIGTERM to the command, or SIGINT to its group, as a terminal does; then on with the command that it prints."""
    out, chosen = folder / str(number), random.Random(number)
    words = (*WORDS, *ALIKE, "--steps", "1000000", "--checkpoint-every", "1000000", "--output", str(out))
    running = launch(command(*words, processes=processes))
    try:
        wait_for(running, out / "log.jsonl", lines=1)
        time.sleep(chosen.uniform(0, 1))
        name = "SIGTERM" if number % 2 == 0 else "SIGINT"
        if name == "SIGTERM":
            running.terminate()
        else:
            os.killpg(running.pid, signal.SIGINT)
        output, _ = running.communicate(timeout=120)
    finally:
        stop(running)
    require(running.returncode != 0, f"{name}: the exit status is 0")
    told = re.search(r"stopped after step (\d+); continue with: (.* --resume)$", output, re.MULTILINE)
    require(told, f"{name}: no command that goes on in {output[-800:]!r}")
    saved = checkpoint.latest_checkpoint(out)
    require(saved == out / f"step-{told[1]}", f"{name}: the checkpoint is {saved}, after step {told[1]}")
    # the next end of a run that was not interrupted
    steps = (int(told[1]) // EVERY + 1) * EVERY
    finish([*printed(told[2]), "--steps", str(steps)])
    logged = list(losses_of(out))
    require(logged == list(range(1, steps + 1)), f"{name}: the log has the steps {logged[:3]} ... {logged[-3:]}")
    whole = folder / f"whole-{steps}"
    if not whole.exists():
        finish(command(*WORDS, *ALIKE, "--steps", str(steps), "--output", str(whole), processes=processes))
    require_same_checkpoint(whole / f"step-{steps}", out / f"step-{steps}")
    shutil.rmtree(out)


@trial(promise=SAVED, tried="signal to a run, and on with the command that it prints", short=1, full=20)
def signal_alone(folder: Path) -> Iterator[Attempt]:
    yield lambda number: interrupt(folder, number, None)


@trial(
    promise=SAVED, tried="signal to a run of two processes, and on with the command that it prints", short=0, full=20
)
def signal_torchrun(folder: Path) -> Iterator[Attempt]:
    yield lambda number: interrupt(folder, number, 2)
