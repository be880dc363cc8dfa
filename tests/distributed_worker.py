"""What test_distributed.py starts under torchrun: training runs of a tiny model one after the other, with faults.

Its argument is JSON: a list of runs, each a pair of TrainConfig's options and a dictionary of faults:
    signal, at: after that step the first process sends torchrun, its parent, this signal
    kill, at: after that step the last process kills itself, unless it was started again
    nan, at: in the backward pass of that step a gradient of the last process is NaN
    full: nothing can be flushed to disk after the first step
How each run ends is printed as a line of JSON by every process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
from typing import Any
from unittest import mock

from fastdiff.loss import DiffusionLoss
from fastdiff.processes import Processes
from fastdiff.shards import local
from fastdiff.train import train
from fastdiff.train_config import TrainConfig
from fastdiff.unet import UNet, UNetConfig

MODEL = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_num_groups=8,
    num_classes=10,
    dropout=0.1,
)


def digest(model: UNet) -> str:
    """Of this process's part of the weights."""
    return hashlib.sha256(b"".join(local(value).numpy().tobytes() for value in model.state_dict().values())).hexdigest()


class Faults:
    """`at` counts steps of the run; every process computes one piece a step."""

    def __init__(self, processes: Processes, faults: dict[str, Any]) -> None:
        self.rank, self.last = processes.rank, processes.rank == processes.size - 1
        self.faults, self.at, self.calls = faults, faults.get("at"), 0
        self.objective = DiffusionLoss.__call__
        self.weights: list[str] = []

    def loss(self, objective, *arguments, **keywords):
        self.calls += 1
        loss, output, gradient = self.objective(objective, *arguments, **keywords)
        if "nan" in self.faults and self.last and self.calls == self.at:
            gradient[0] = float("nan")
        return loss, output, gradient

    def on_step(self, step: int, model: UNet) -> None:
        if "nan" in self.faults:
            self.weights.append(digest(model))
        if step != self.at:
            return
        if "signal" in self.faults and self.rank == 0:
            os.kill(os.getppid(), getattr(signal, self.faults["signal"]))
        if "kill" in self.faults and self.last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


def run(processes: Processes, options: dict[str, Any], faults: dict[str, Any]) -> dict[str, Any]:
    """How it ended."""
    fault = Faults(processes, faults)

    def call(objective, *arguments, **keywords):
        return fault.loss(objective, *arguments, **keywords)

    flush = os.fsync

    def flush_or_fail(descriptor):
        if "full" in faults and fault.calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with (
        mock.patch.object(DiffusionLoss, "__call__", call),
        mock.patch.object(os, "fsync", flush_or_fail),
    ):
        try:
            result = train(TrainConfig(**options), model_config=MODEL, on_step=fault.on_step)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}", "weights": fault.weights}
    return {"step": result.step, "completed": result.completed, "averages": digest(result.model)}


def main() -> int:
    with Processes.of_environment(training=True) as processes:
        for options, faults in json.loads(sys.argv[1]):
            outcome = run(processes, options, faults)
            # in one piece: both processes write to the same pipe, unbuffered
            sys.stdout.write(json.dumps({"run": options["output"], "rank": processes.rank, **outcome}) + "\n")
    return 0 if outcome.get("completed") else 1


if __name__ == "__main__":
    sys.exit(main())
