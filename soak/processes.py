"""Several processes: one is lost, or there are more or fewer of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fastdiff import checkpoint
from soak.children import command, descendants, launch, stop
from soak.interruptions import WORDS, wait_for
from soak.small_runs import losses_of, require_same_checkpoint
from soak.trial import Attempt, NotSurvived, require, trial

LOST, STEPS = "A lost rank is survived", 50
WORLD = "World size does not change the result"


def finish(out: Path, *words: str, processes: int | None) -> None:
    """A run of 50 steps to its end, or from its newest checkpoint on."""
    running = launch(command(*WORDS, "--steps", str(STEPS), "--output", str(out), *words, processes=processes))
    try:
        output, _ = running.communicate(timeout=300)
    finally:
        stop(running)
    require(running.returncode == 0, f"{processes or 1} processes: exit status {running.returncode}: {output[-600:]}")


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started."""
    return [pid for pid in descendants(launcher) if b"fastdiff" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@trial(promise=LOST, tried="SIGKILL of one of two processes", short=0, full=10)
def lost_rank(folder: Path) -> Iterator[Attempt]:
    words = ("--checkpoint-every", "10")
    finish(folder / "whole", *words, processes=2)

    def attempt(number: int) -> None:
        out, chosen = folder / str(number), random.Random(number)
        everything = (*WORDS, "--steps", str(STEPS), "--output", str(out), *words)
        running = launch(command(*everything, processes=2, torchrun=("--max-restarts=3",)))
        try:
            wait_for(running, out / "log.jsonl", lines=chosen.randrange(1, 40))
            time.sleep(chosen.uniform(0, 0.05))
            os.kill(chosen.choice(workers(running.pid)), signal.SIGKILL)
            output, _ = running.communicate(timeout=300)
        finally:
            stop(running)
        require(running.returncode == 0, f"exit status {running.returncode}: {output[-600:]}")
        require_same_checkpoint(folder / "whole" / f"step-{STEPS}", out / f"step-{STEPS}")
        shutil.rmtree(out)

    yield attempt


# the words of the first 25 steps, their processes; those of the rest, their processes
WALKS: tuple[tuple[tuple[str, ...], int | None, tuple[str, ...], int | None], ...] = (
    ((), 2, (), 2),
    (("--fsdp",), 2, ("--fsdp",), 2),
    ((), None, ("--fsdp",), 2),
    (("--fsdp",), 2, (), None),
    ((), 2, (), None),
    ((), None, (), 2),
)


def _that_matters(key: str, value: torch.Tensor) -> torch.Tensor:
    """The weight without what no output depends on."""
    if not key.endswith("attention.qkv.bias"):
        return value
    queries, _, values = value.chunk(3)
    return torch.cat([queries, values])


@trial(promise=WORLD, tried="50 steps on 2 processes, or on 1 and 2", short=0, full=len(WALKS))
def world_size(folder: Path) -> Iterator[Attempt]:
    """DDP and FSDP2, the U-Net's dropout on; every loss and the weights, against one process alone.

    But for the bias of attention's keys: it adds the same to all scores of a query, which the softmax takes out again,
    so its gradient is nothing but rounding errors, and AdamW divides those by their own size.
    """
    finish(folder / "alone", processes=None)
    expected = losses_of(folder / "alone")
    weights = checkpoint.load_train_state(folder / "alone" / f"step-{STEPS}")[1]

    def attempt(number: int) -> None:
        first_words, first, rest_words, rest = WALKS[number % len(WALKS)]
        out, name = folder / str(number), f"{first or 1} {first_words} then {rest or 1} {rest_words}"
        if (first_words, first) == (rest_words, rest):
            finish(out, *rest_words, processes=rest)
        else:
            # its learning rate must be that of 50 steps: all are done, and those after the 25th thrown away
            finish(out, *first_words, "--checkpoint-every", "25", processes=first)
            shutil.rmtree(out / f"step-{STEPS}")
            finish(out, *rest_words, "--checkpoint-every", "25", "--resume", processes=rest)
        losses = losses_of(out)
        require(losses.keys() == expected.keys(), f"{name}: the log has {len(losses)} steps")
        far = {step: abs(losses[step] - expected[step]) for step in expected}
        worst = max(far, key=lambda step: far[step])
        require(far[worst] <= 1e-6, f"{name}: the loss of step {worst} is off by {far[worst]:.1e}")
        tensors = checkpoint.load_train_state(out / f"step-{STEPS}")[1]
        for key, value in weights.items():
            if key.startswith("model."):
                distance = torch.dist(_that_matters(key, tensors[key]), _that_matters(key, value), p=torch.inf).item()
                if distance > 1e-6:
                    raise NotSurvived(f"{name}: {key} is off by {distance:.1e}")
        shutil.rmtree(out)

    yield attempt
