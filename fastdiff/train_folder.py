"""The output folder of a training run: what it must hold, and that one run at a time has it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from fastdiff.checkpoint import CheckpointError, latest_checkpoint
from fastdiff.durable_files import alone_in, is_leftover
from fastdiff.launch_file import LAUNCH, is_of_this_launch, note_launch
from fastdiff.train_config import TrainConfig
from fastdiff.train_log import LOG

SAMPLES = "samples"


class RunFolder:
    """config.output. Entered, and from the first look into it, locked against other runs; one process does it for all.

    A new run needs an empty folder, or what a run leaves that was interrupted before its first checkpoint.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path, self._resume = Path(config.output), config.resume
        self._held = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def find_run(self) -> Path | None:
        """The checkpoint to continue from, None for a new run; a program that is started again continues its own.

        Raises CheckpointError where there is nothing to resume, and ValueError where there is something and it is not
        to be resumed, or another run writes there. Nothing is written but the lock.
        """
        self._locked = self.path.is_dir()
        if self._locked:
            self._lock()
        latest = latest_checkpoint(self.path)
        if self._resume and latest is None:
            raise CheckpointError(f"output {self.path} has no undamaged checkpoint to resume from")
        if latest and not self._resume and not is_of_this_launch(self.path):
            raise ValueError(f"output {self.path} already holds a run: resume it or choose another folder")
        if latest is None:
            self._check_new()
        return latest

    def open(self) -> None:
        """Make and lock the folder, if it was not there, and write down which launch it belongs to.

        Raises CheckpointError where it cannot be written to, and ValueError where another run was faster.
        """
        if not self._locked:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritable(error) from error
            self._lock()
            self._check_new()
        note_launch(self.path)

    def _lock(self) -> None:
        try:
            self._held.enter_context(alone_in(self.path, "output"))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot write to output {self.path}: {error.strerror or error}")

    def _check_new(self) -> None:
        """Raise ValueError, naming what is in the way."""
        if not self.path.is_dir():
            return
        for entry in sorted(self.path.iterdir()):
            unfinished = re.fullmatch(r"step-\d+\.tmp", entry.name)
            if not (unfinished or is_leftover(entry) or entry.name in (LOG, LAUNCH, SAMPLES)):
                raise ValueError(
                    f"output {self.path} must be empty, or hold a run to resume, and holds {entry.name}:"
                    " choose another folder"
                )
