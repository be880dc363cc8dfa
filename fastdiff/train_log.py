"""What a training run writes down: log.jsonl, one line a step, and the loss curve drawn from it."""

from __future__ import annotations

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


class TrainLog:
    """Losses wait on the device until `flush` reads them all at once, so that logging does not slow the steps down."""

    def __init__(self, path: Path, start: int) -> None:
        lines = path.read_text().splitlines() if start and path.exists() else []
        self.path, self.step, self.warned = path, start, False
        self.pending: list[tuple[Tensor, float]] = []
        # What an interrupted run logged after its last checkpoint will be logged again.
        path.write_text("".join(f"{line}\n" for line in lines if _step(line) <= start))

    def add(self, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Note the next step: float32 scalars on the device."""
        self.pending.append((torch.stack([loss, gradient_norm]), learning_rate))

    def write(self, *records: dict[str, Any]) -> None:
        """Append a line for each record."""
        with open(self.path, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def flush(self, saved: Path | None) -> float:
        """Write the pending steps and return their mean loss; `saved` is the last checkpoint.

        Raises TrainingDiverged at the first step that is not finite. The caller flushes before it writes a checkpoint,
        so no checkpoint holds what such a step left behind.
        """
        records: list[dict[str, Any]] = []
        values = torch.stack([value for value, _ in self.pending]).tolist()
        for (loss, norm), (_, learning_rate) in zip(values, self.pending):
            self.step += 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.write(*records)
                last = f"the last checkpoint is {saved}" if saved else "no checkpoint was written yet"
                raise TrainingDiverged(f"loss {loss} with gradient norm {norm} at step {self.step}; {last}")
            records.append({"step": self.step, "loss": loss, "gradient_norm": norm, "learning_rate": learning_rate})
        self.write(*records)
        self.pending = []
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
