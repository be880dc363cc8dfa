"""What a training run writes down: log.jsonl, one line a step, and the loss curve drawn from it."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.durable_files import write_files
from fastdiff.processes import Processes

LOG = "log.jsonl"


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is NaN or infinite; the message names the step and the last good checkpoint."""


class Throughput:
    """Images per second of the steps alone: the clock stands still while a run does something else."""

    def __init__(self) -> None:
        self._images = self._pending = 0
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Count what follows, and its time."""
        self._pending, self._since = 0, time.perf_counter()

    def add(self, images: int) -> None:
        """Note the images of a step."""
        self._pending += images

    def stop(self) -> None:
        """Take what came since the start, if there was one; the device must have finished it."""
        if self._since is not None:
            self._images += self._pending
            self._seconds += time.perf_counter() - self._since
        self._since = None

    @property
    def images_per_s(self) -> float | None:
        """None as long as nothing was counted."""
        return self._images / self._seconds if self._images else None


class PendingLosses:
    """Losses wait on the device until `read` takes them all at once, so that reading them does not slow the steps down.

    step: steps done before. images: of a batch, which the `processes` share.
    """

    def __init__(self, step: int, images: int, processes: Processes) -> None:
        self.step, self._images, self._processes = step, images, processes
        self._pending: list[tuple[Tensor, Tensor, float]] = []

    def add(self, losses: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Note the next step: the losses of this process and the norm of the whole gradient, both on the device."""
        # In float64 the sum of float32 losses is exact as long as none is 2^20 times another: no matter who adds what.
        self._pending.append((losses.sum(dtype=torch.float64), gradient_norm.clone(), learning_rate))

    def read(self) -> list[dict[str, float]]:
        """A record of each pending step, the same in all processes, which must ask at once."""
        sums, norms, rates = zip(*self._pending)
        self._pending = []
        totals = self._processes.add(torch.stack(sums).cpu()).tolist()
        records = []
        for total, norm, rate in zip(totals, torch.stack(norms).tolist(), rates):
            self.step += 1
            loss = total / self._images
            records.append({"step": self.step, "loss": loss, "gradient_norm": norm, "learning_rate": rate})
        return records


class TrainLog:
    """log.jsonl, one line a step; opened anew, it loses the lines after step `start`, all at once or not at all."""

    def __init__(self, path: Path, start: int) -> None:
        self.path, self.warned = path, False
        if not start:
            path.unlink(missing_ok=True)
        before = path.read_text() if path.exists() else ""
        # What an interrupted run logged after its last checkpoint will be logged again.
        kept = "".join(f"{line}\n" for line in before.splitlines() if _step(line) <= start)
        if kept != before:
            write_files({path: lambda file: file.write(kept.encode())})

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append a line for each record; OSError, which names the file, where that is not possible."""
        try:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write_losses(self, records: Sequence[Mapping[str, float]], saved: Path | None) -> float:
        """Append what `PendingLosses.read` gave and return the mean loss; `saved` is the last checkpoint.

        Raises TrainingDiverged at the first step that is not finite. A run writes its losses before a checkpoint, so no
        checkpoint holds what came after such a step.
        """
        for number, record in enumerate(records):
            loss, norm = record["loss"], record["gradient_norm"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.write(*records[:number])
                last = f"the last checkpoint is {saved}" if saved else "no checkpoint was written yet"
                raise TrainingDiverged(f"loss {loss} with gradient norm {norm} at step {record['step']}; {last}")
        self.write(*records)
        return sum(record["loss"] for record in records) / len(records)

    def plot(self, path: Path) -> None:
        """The loss curve as a PNG, where matplotlib is installed; where it is not, the first call warns."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            if not self.warned:
                warnings.warn("no loss curve without matplotlib: pip install fastdiff[plot]", stacklevel=2)
            self.warned = True
            return
        records = [json.loads(line) for line in self.path.read_text().splitlines()]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, style in (("loss", "-"), ("held_out_loss", "o-")):
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axes.plot(*zip(*points), style, linewidth=1, label=key.replace("_", " "))
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
        figure.savefig(path, dpi=150)


def _step(line: str) -> float:
    """The step of a line; infinite for one that a crash cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
