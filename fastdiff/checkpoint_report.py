"""What is in a checkpoint, or in all of a training run, and whether it is whole: `fastdiff checkpoint`."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import CONFIG, MANIFEST, MODEL, STATE, CheckpointError, checkpoints, load_config, verify


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """One checkpoint. damage: what is wrong with it, None where every file is what its manifest says."""

    path: Path
    damage: str | None

    def describe(self) -> str:
        """One line."""
        return f"whole    {self.path}" if self.damage is None else f"DAMAGED  {self.path}: {self.damage}"


def verify_all(directory: str | Path) -> list[CheckpointReport]:
    """Compare every file of a checkpoint, or of all checkpoints of a training run, with its recorded hash.

    Raises CheckpointError where the folder holds none.
    """
    directory = Path(directory)
    found = [path for _, path in checkpoints(directory)]
    if not found:
        if not directory.is_dir():
            raise CheckpointError(
                f"checkpoint {directory} {'is no folder' if directory.exists() else 'does not exist'}"
            )
        ours = (directory / MANIFEST).exists() or ((directory / CONFIG).exists() and (directory / MODEL).exists())
        if not ours:
            raise CheckpointError(f"{directory} is no checkpoint and holds none")
        found = [directory]
    reports = []
    for path in found:
        try:
            verify(path)
        except CheckpointError as error:
            reports.append(CheckpointReport(path=path, damage=str(error)))
        else:
            reports.append(CheckpointReport(path=path, damage=None))
    return reports


def inspect(directory: str | Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself, JSON-serialisable; weights are not loaded.

    Raises CheckpointError where it is missing or damaged.
    """
    directory = Path(directory)
    verify(directory)
    config = load_config(directory)
    tensors = _tensors(directory / MODEL)
    options = json.loads((directory / STATE).read_text()).get("options") if (directory / STATE).exists() else None
    return {
        "path": str(directory),
        "step": config.get("step"),
        "parameters": sum(math.prod(entry["shape"]) for entry in tensors.values()),
        "dtypes": sorted({entry["dtype"] for entry in tensors.values()}),
        "files": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
        "continues": options is not None,
        **{name: config.get(name) for name in ("task", "dataset", "image_shape", "num_classes", "prediction_type")},
        **{name: config.get(name) for name in ("held_out_loss", "seed", "command", "schedule", "model")},
        "options": options,
    }


def describe(content: dict[str, Any]) -> str:
    """The result of `inspect` as aligned lines, what is not known left out."""
    lines = [(name, value) for name, value in content.items() if value is not None and name != "options"]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_words(value)}" for name, value in lines)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length, then JSON (its format's documentation)."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
