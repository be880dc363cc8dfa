"""SIGTERM and Ctrl-C at a random time of a real training run, alone and under torchrun."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from fastdiff import checkpoint
from fastdiff.train import TrainConfig
from soak.children import command, launch, stop
from soak.small_runs import run
from soak.trial import Attempt, require, trial

SAVED = "SIGTERM and Ctrl-C save"
WORDS = ("train", "--batch-size", "4", "--log-every", "1", "--sample-every", "0", "--no-progress", "--device", "cpu")
WORDS += ("--dropout", "0.1", "--gradient-accumulation-steps", "2")


def wait_for(running: subprocess.Popen[str], log: Path, *, lines: int, seconds: float = 180) -> None:
    """Until the run has logged so many steps."""
    deadline = time.monotonic() + seconds
    while not log.exists() or log.read_text().count("\n") < lines:
        if running.poll() is not None or time.monotonic() > deadline:
            stop(running)
            output, _ = running.communicate()
            require(False, f"the run did not begin: {output[-500:]}")
        time.sleep(0.01)


def interrupt(out: Path, number: int, processes: int | None) -> None:
    """SIGTERM to the command, or SIGINT to all its processes, as a terminal does; then one step more."""
    chosen = random.Random(number)
    words = (*WORDS, "--steps", "1000000", "--checkpoint-every", "1000000", "--output", str(out))
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
    told = re.search(r"stopped after step (\d+); continue with: (.* train .* --resume)", output)
    require(told, f"{name}: no command that goes on in {output[-800:]!r}")
    saved = checkpoint.latest_checkpoint(out)
    require(saved == out / f"step-{told[1]}", f"{name}: the checkpoint is {saved}, after step {told[1]}")
    require(str(out) in told[2], f"{name}: the command names another folder: {told[2]}")
    state = checkpoint.load_train_state(saved)[2]
    steps = state["step"] + 1
    config = {**state["options"], "resume": True, "steps": steps}
    result = run(TrainConfig(**config))
    require(result.completed and result.step == steps, f"{name}: resumed, it ended at step {result.step}, not {steps}")
    logged = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    require(logged == list(range(1, steps + 1)), f"{name}: the log has the steps {logged[:3]} ... {logged[-3:]}")
    shutil.rmtree(out)


@trial(promise=SAVED, tried="signal to a run", short=1, full=20)
def signal_alone(folder: Path) -> Iterator[Attempt]:
    yield lambda number: interrupt(folder / str(number), number, None)


@trial(promise=SAVED, tried="signal to a run of two processes", short=0, full=20)
def signal_torchrun(folder: Path) -> Iterator[Attempt]:
    yield lambda number: interrupt(folder / str(number), number, 2)
