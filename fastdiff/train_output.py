"""The folder of a training run: log.jsonl, loss.png, checkpoints and pictures of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff import checkpoint, superres
from fastdiff.superres import SuperresScore
from fastdiff.train_config import TrainConfig
from fastdiff.train_evaluation import EVALUATION_IMAGES, draw_samples, held_out_loss
from fastdiff.train_folder import SAMPLES, RunFolder
from fastdiff.train_log import LOG, TrainLog
from fastdiff.train_setup import Setup, conditions, dtype_name
from fastdiff.unet import UNet


class RunOutput:
    """What a run writes; one process does it for all."""

    _log: TrainLog

    def __init__(self, config: TrainConfig, setup: Setup, folder: RunFolder) -> None:
        self.config, self.setup, self._run_folder, self.folder = config, setup, folder, folder.path

    def open(self, start: int) -> None:
        """Take the folder and open the log; what the run logged after step `start` is dropped.

        Raises what `RunFolder.open` does, and OSError where the log cannot be written.
        """
        self._run_folder.open()
        self._log = TrainLog(self.folder / LOG, start)

    def write(self, record: Mapping[str, Any]) -> None:
        """A line of the log."""
        self._log.write(record)

    def write_losses(self, records: Sequence[Mapping[str, float]], saved: Path | None) -> float:
        """As TrainLog.write_losses."""
        return self._log.write_losses(records, saved)

    def save(self, step: int, averages: UNet, train_state: Mapping[str, Tensor]) -> tuple[Path, float | None]:
        """A checkpoint, its line in the log and the loss curve; the checkpoint's path and its held-out loss.

        Raises CheckpointError where the checkpoint cannot be written; those that were there are still there then.
        """
        config, setup = self.config, self.setup
        loss = held_out_loss(setup.objective, averages, setup.held_out, conditions(config))
        self._log.write({"step": step, "held_out_loss": loss})
        saved = checkpoint.save_checkpoint(
            self.folder / f"step-{step}",
            weights=averages.state_dict(),
            config={**_description(config, setup), "step": step, "held_out_loss": loss},
            train_state=train_state,
            state={"step": step, "options": asdict(config), "dtype": dtype_name(setup.objective.dtype)},
        )
        checkpoint.prune_checkpoints(self.folder, keep_last=config.keep_last, keep_every=config.keep_every)
        self._log.plot(self.folder / "loss.png")
        return saved, loss

    def draw(self, step: int, averages: UNet) -> None:
        """A picture of samples."""
        path = self.folder / SAMPLES / f"step-{step}.png"
        draw_samples(averages, self.setup.schedule, self.config, self.setup.held_out or self.setup.dataset, path)

    def score(self, step: int, averages: UNet) -> SuperresScore | None:
        """How well a model of task superres restores held-out images, also in the log; None for other tasks."""
        config, setup = self.config, self.setup
        if config.task != "superres" or setup.held_out is None:
            return None
        images = setup.held_out.images[:EVALUATION_IMAGES]
        score = superres.evaluate(averages, setup.schedule, config.prediction_type, images, config.superres_factor)
        self._log.write({"step": step, "superres": asdict(score)})
        return score


def _description(config: TrainConfig, setup: Setup) -> dict[str, Any]:
    """What config.json of a checkpoint says of the run."""
    dataset = setup.dataset
    return {
        "format_version": 1,
        "model": setup.model_config.to_dict(),
        "schedule": setup.schedule.to_config(),
        "prediction_type": config.prediction_type,
        "task": config.task,
        "superres_factor": config.superres_factor if config.task == "superres" else None,
        "dataset": config.dataset,
        "image_shape": list(dataset.image_shape),
        "num_classes": setup.model_config.num_classes,
        "class_names": list(dataset.class_names) if dataset.class_names and dataset.labels is not None else None,
        "label_dropout": setup.objective.label_dropout,
        "seed": config.seed,
        "command": config.command(),
    }
