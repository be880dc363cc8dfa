"""A checkpoint is whole or absent: its writer is killed at any time and at any line, or the disk is full."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fastdiff import checkpoint
from fastdiff.checkpoint import CheckpointError
from soak.children import Child
from soak.trial import Attempt, NotSurvived, require, trial

WHOLE = "A checkpoint is whole or absent"
# no fewer than a write runs of checkpoint.py, and a prime
LINES = 151


def write(run: Path, step: int) -> Path:
    """A checkpoint whose content is that of its step: 200 kB, several writes of the file system each."""
    tensors = {f"tensor {k}": torch.full((5000,), float(step + k)) for k in range(5)}
    return checkpoint.save_checkpoint(
        run / f"step-{step}", weights=tensors, config={"step": step}, train_state=tensors, state={"step": step}
    )


def require_whole(path: Path | None, *, at_least: int) -> int:
    """The step of a checkpoint that is as `write` wrote it, and no older than this."""
    require(path is not None, f"no checkpoint is left, of step {at_least} or later")
    weights, train_state, state = checkpoint.load_train_state(path)
    step = state["step"]
    require(
        path.name in (f"step-{step}", f"step-{step}.old") and step >= at_least,
        f"the newest is {path.name}, step {at_least} was whole",
    )
    for tensors in (weights, train_state):
        values = [float(value) for k in range(5) for value in tensors[f"tensor {k}"].unique()]
        require(values == [float(step + k) for k in range(5)], f"{path.name} holds {values}")
    return step


def newest(run: Path) -> Path | None:
    """The newest checkpoint; one that is only half there must not look like one, so a warning is a failure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = checkpoint.latest_checkpoint(run)
    require(not caught, f"a kill left a damaged checkpoint: {[str(warning.message) for warning in caught]}")
    return path


def write_for_ever(reports: Connection, run: Path, first: int) -> None:
    """Checkpoint after checkpoint, every third one twice, the old ones pruned; reports the step of a whole one."""
    for step in itertools.count(first):
        for _ in range(2 if step % 3 == 0 else 1):
            write(run, step)
            reports.send(step)
        checkpoint.prune_checkpoints(run, keep_last=2)


@trial(promise=WHOLE, tried="SIGKILL of a writer at a random time", short=10, full=100)
def random_kills(folder: Path) -> Iterator[Attempt]:
    write(folder, 0)

    def attempt(number: int) -> None:
        last = require_whole(newest(folder), at_least=0)
        child = Child(write_for_ever, folder, last + 1)
        last = child.first()
        # a write takes some 10 ms
        time.sleep(random.Random(number).uniform(0, 0.05))
        last = max([last, *child.kill()])
        require_whole(newest(folder), at_least=last)

    yield attempt


def write_and_die(reports: Connection, run: Path, step: int, line: int | None) -> None:
    """Write one checkpoint and die at this line that checkpoint.py runs; None lives and reports how many it runs."""
    lines = itertools.count(1)
    passed = 0

    def trace(frame, event, _):
        nonlocal passed
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            passed = next(lines)
            if passed == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    write(run, step)
    sys.settrace(None)
    reports.send(passed)


@trial(promise=WHOLE, tried="SIGKILL before a line of the writing code", short=12, full=2 * LINES)
def kills_at_every_line(folder: Path) -> Iterator[Attempt]:
    """The even numbers write a new checkpoint, the odd ones replace one that is there."""

    def prepared(number: int) -> tuple[Path, int]:
        run = folder / str(number)
        for step in (1,) if number % 2 == 0 else (1, 2):
            write(run, step)
        return run, number % 2 + 1

    lines = [Child(write_and_die, prepared(-2 + k)[0], 2, None).first() for k in range(2)]
    if max(lines) > LINES:
        raise NotSurvived(f"a checkpoint is written in {lines} lines, more than LINES = {LINES} attempts reach")

    def attempt(number: int) -> None:
        run, last = prepared(number)
        total = lines[number % 2]
        # spread over all lines in any number of attempts, and each one hit in the full number: LINES is a prime
        line = number // 2 * 61 % LINES % total + 1
        child = Child(write_and_die, run, 2, line)
        require(child.end() == [] and child.exit_code == -signal.SIGKILL, f"it lived, to be killed at line {line}")
        try:
            require_whole(newest(run), at_least=last)
            write(run, 3)
            require_whole(newest(run), at_least=3)
        except (NotSurvived, CheckpointError) as error:
            raise NotSurvived(f"killed at line {line} of {total}: {error}") from error
        shutil.rmtree(run)

    yield attempt


def write_on_a_full_disk(reports: Connection, run: Path, room: int) -> None:
    """Replace step-1 and begin step-2 where no file may be longer than `room` bytes; reports what is raised."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    for step in (1, 2):
        try:
            write(run, step)
            reports.send("written")
        except CheckpointError as error:
            reports.send(str(error))


@trial(promise=WHOLE, tried="write without room for a whole file", short=4, full=50)
def full_disk(folder: Path) -> Iterator[Attempt]:
    write(folder, 1)
    largest = max(path.stat().st_size for path in (folder / "step-1").iterdir())

    def attempt(number: int) -> None:
        room = random.Random(number).randrange(largest)
        reason = os.strerror(errno.EFBIG)
        expected = [f"cannot write checkpoint {folder / f'step-{step}'}: {reason}" for step in (1, 2)]
        told = Child(write_on_a_full_disk, folder, room).end()
        require(told == expected, f"with room for {room} bytes it said {told}")
        left = [path.name for path in folder.iterdir()]
        require(left == ["step-1"], f"with room for {room} bytes it left {left}")
        require_whole(newest(folder), at_least=1)

    yield attempt
