"""Training in one process: resumed at every step, with a NaN at every step, out of memory."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from fastdiff.checkpoint import latest_checkpoint
from fastdiff.train_log import TrainingDiverged
from fastdiff.unet import UNet
from soak.nan_program import poisoned
from soak.programs import program
from soak.small_runs import STEPS, copied, losses_of, options, require_equal, require_same_checkpoint, run
from soak.trial import Attempt, NotSurvived, require, trial

RECIPES: tuple[dict[str, object], ...] = (
    {},
    {"gradient_accumulation_steps": 3, "horizontal_flip": True, "weighting": "min_snr", "weight_decay": 0.1},
)
HARMLESS = "A NaN stops the run, harmlessly"


@trial(promise="Resume is exact", tried="resumption after a step", short=3, full=len(RECIPES) * (STEPS - 1))
def resumed(folder: Path) -> Iterator[Attempt]:
    """Every checkpoint from there on, against that of the run that was not interrupted."""
    for kind, recipe in enumerate(RECIPES):
        run(options(folder / f"whole-{kind}", checkpoint_every=1, **recipe))

    def attempt(number: int) -> None:
        # 7 and the 11 steps share no factor: every step comes up, and a few attempts are spread over them
        kind, step = number % len(RECIPES), number // len(RECIPES) * 7 % (STEPS - 1) + 1
        whole, part = folder / f"whole-{kind}", folder / f"part-{number}"
        part.mkdir()
        for name in (f"step-{step}", "log.jsonl"):
            (shutil.copytree if name.startswith("step") else shutil.copy)(whole / name, part / name)
        # what another process would have drawn from it
        torch.manual_seed(number + 1000)
        run(options(part, checkpoint_every=1, resume=True, **RECIPES[kind]))
        for later in range(step + 1, STEPS + 1):
            require_same_checkpoint(whole / f"step-{later}", part / f"step-{later}")
        shutil.rmtree(part)

    yield attempt


@trial(promise=HARMLESS, tried="step with a NaN", short=3, full=STEPS)
def nan(folder: Path) -> Iterator[Attempt]:
    """The log is read every fourth step: until then the run goes on and must change nothing."""
    weights: dict[int, dict[str, Tensor]] = {}
    settings = {"log_every": 4, "checkpoint_every": 5}
    run(options(folder / "whole", **settings), lambda step, model: weights.update({step: copied(model.state_dict())}))

    def attempt(number: int) -> None:
        step, out = number * 7 % STEPS + 1, folder / str(number)
        models: list[UNet] = []

        def watch(_: int, model: UNet) -> None:
            models[:] = [model]

        told = ""
        with poisoned(step, number):
            try:
                run(options(out, **settings), watch)
            except TrainingDiverged as error:
                told = str(error)
        require(f"at step {step};" in told, f"a NaN in step {step} was reported as {told!r}")
        last = (step - 1) // 5 * 5
        latest = latest_checkpoint(out)
        require(latest == (out / f"step-{last}" if last else None), f"after step {step} the last one is {latest}")
        if last:
            require_same_checkpoint(latest, folder / "whole" / latest.name)
            require(str(latest) in told, f"it does not name {latest}: {told!r}")
        if step > 1 and models:
            require_equal(copied(models[0].state_dict()), weights[step - 1], f"weights after a NaN in step {step}")
        shutil.rmtree(out)

    yield attempt


@trial(promise=HARMLESS, tried="run of the command line with a NaN", short=1, full=3)
def nan_command(folder: Path) -> Iterator[Attempt]:
    """Its exit status, what it prints and the checkpoint that is left."""

    def attempt(number: int) -> None:
        step, out = (7, 1, 12)[number % 3], folder / str(number)
        words = ("--steps", "12", "--batch-size", "4", "--log-every", "4", "--checkpoint-every", "5", "--device", "cpu")
        done = program("soak.nan_program", str(step), "train", *words, "--no-progress", "--output", str(out))
        told = done.stderr.strip()
        require(done.returncode == 1, f"a NaN in step {step}: exit status {done.returncode}: {told[-500:]}")
        require(f"at step {step};" in told, f"a NaN in step {step} was reported as {told[-500:]!r}")
        require("Traceback" not in told, f"a NaN in step {step} is no sentence: {told[-500:]!r}")
        last = (step - 1) // 5 * 5
        latest = latest_checkpoint(out)
        require(latest == (out / f"step-{last}" if last else None), f"after step {step} the last one is {latest}")

    yield attempt


@trial(promise="Out of memory", tried="step that is too large", short=2, full=20)
def out_of_memory(folder: Path) -> Iterator[Attempt]:
    """From a random step on, no more than so many images fit."""
    settings = {"steps": 6, "warmup_steps": 6, "checkpoint_every": 6}
    run(options(folder / "whole", **settings))
    expected = losses_of(folder / "whole")

    def attempt(number: int) -> None:
        chosen = random.Random(number)
        room, first, out = chosen.choice([3, 4, 6, 11]), chosen.randrange(6), folder / str(number)
        genuine, done = UNet.forward, 0

        def crowded(self, x, *args, **kwargs):
            if self.training and done >= first and len(x) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return genuine(self, x, *args, **kwargs)

        def count(step: int, _: UNet) -> None:
            nonlocal done
            done = step

        with mock.patch.object(UNet, "forward", crowded), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(options(out, **settings), count)
        told = [str(one.message) for one in caught if "memory" in str(one.message)]
        pieces = 2 if room >= 6 else 4
        require(len(told) == 1 or (pieces == 4 and len(told) == 2), f"room for {room}: it said {told}")
        # the same numbers in another order: weights move by what float32 rounds off
        losses = losses_of(out)
        require(losses.keys() == expected.keys(), f"room for {room}: the log has the steps {list(losses)}")
        far = max(abs(losses[step] - loss) / loss for step, loss in expected.items())
        if far > 1e-6:
            raise NotSurvived(f"room for {room} of 12 images from step {first + 1} on: a loss is off by {far:.1e}")

    yield attempt
