"""Checkpoints: directories of safetensors and JSON that are whole or absent, and never run code.

    step-2500/
      model.safetensors        weights for sampling: the exponential moving average
      config.json              model, schedule, prediction type, data: all that sampling needs
      train_state.safetensors  raw weights and optimizer state  } only where training is to continue
      state.json               step and training options        }
      manifest.json            SHA-256 of every file above

Everything is written to `step-2500.tmp`, each file and then the directory flushed to disk, the manifest last, and the
directory renamed: a crash leaves the previous checkpoint untouched. One of the same name that is replaced is
`step-2500.old` between two renames, and is read there after a crash. Loading compares every hash first, because
safetensors by itself reads flipped bits without complaint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastdiff.durable_files import flush
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet, UNetConfig

MODEL, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
TRAIN_STATE, STATE = "train_state.safetensors", "state.json"
# of the names of the trained weights in the training state
TRAINED = "model."
ALL_FILES = {MODEL, CONFIG, MANIFEST, TRAIN_STATE, STATE}


TrainState = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged or cannot be written; the message names the file."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """What sampling needs: the model (eval mode, float32), its schedule and prediction type; and config.json."""

    model: UNet
    schedule: NoiseSchedule
    prediction_type: str
    config: dict[str, Any]


def save_checkpoint(
    directory: str | Path,
    *,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    train_state: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a checkpoint atomically, replacing `directory` if it exists, and return its path.

    weights: state dict of the model used for sampling; floating-point weights are stored as `dtype` if given
        (torch.float16 halves the size). config: JSON-serialisable. train_state, state: tensors and JSON needed to
        continue training.
    Raises CheckpointError where the directory cannot be written; then nothing is left behind but what was there before.
    """
    directory = Path(os.path.abspath(directory))
    if dtype is not None:
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    files = {CONFIG: _json_bytes(config), MODEL: _tensor_bytes(weights)}
    if train_state is not None:
        files[TRAIN_STATE] = _tensor_bytes(train_state)
    if state is not None:
        files[STATE] = _json_bytes(state)
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[MANIFEST] = _json_bytes({"sha256": manifest})  # last: a directory with a manifest has everything else
    temporary, replaced = directory.with_name(directory.name + ".tmp"), _replaced(directory)
    try:
        if directory.exists() and not _is_ours(directory):
            raise CheckpointError(f"cannot write checkpoint {directory}: it exists and is not a checkpoint")
        directory.parent.mkdir(parents=True, exist_ok=True)
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)  # of a writer that was killed between its two renames
        for leftover in (temporary, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir()
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        flush(temporary)
        if directory.exists():
            directory.rename(replaced)
        temporary.rename(directory)
        flush(directory.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.exists(replaced) and not os.path.exists(directory):
            replaced.rename(directory)
        raise CheckpointError(f"cannot write checkpoint {directory}: {error.strerror or error}") from error
    return directory


def verify(directory: str | Path) -> None:
    """Raise CheckpointError naming the file if anything is missing or differs from its recorded hash."""
    _read_verified(Path(directory), None)


def load_model(
    directory: str | Path, *, device: torch.device | str = "cpu", weights: Literal["average", "trained"] = "average"
) -> Checkpoint:
    """Load the model of a verified checkpoint onto `device`, in float32 whatever it was stored in.

    weights: "average" for the moving average, "trained" for the weights of the last step themselves.

    Raises CheckpointError where a file is missing, damaged or does not describe a model, and for the trained weights of
    a model that was exported without them.
    """
    if weights not in ("average", "trained"):
        raise ValueError(f"weights must be average or trained, got {weights!r}")
    directory = Path(directory)
    file = MODEL if weights == "average" else TRAIN_STATE
    files = _read_verified(directory, {CONFIG, file})
    config = json.loads(files[CONFIG])
    try:
        model = UNet(UNetConfig.from_dict(config["model"]))
        schedule = NoiseSchedule.from_config(config["schedule"])
        prediction_type = config["prediction_type"]
        tensors = load(files[file])
        if weights == "trained":
            tensors = {name[len(TRAINED) :]: value for name, value in tensors.items() if name.startswith(TRAINED)}
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        # A state dict that does not fit is reported over many lines, one for each tensor.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {directory} does not describe a model: {reason}") from error
    model = model.to(device).eval()
    return Checkpoint(model=model, schedule=schedule, prediction_type=prediction_type, config=config)


def load_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint, compared with its manifest; raises CheckpointError like `load_model`."""
    return json.loads(_read_verified(Path(directory), {CONFIG})[CONFIG])


def load_train_state(directory: str | Path) -> TrainState:
    """EMA weights, training tensors (both on the CPU) and state.json of a verified checkpoint.

    Raises CheckpointError where a file is missing or damaged, also for a model exported without its training state.
    """
    files = _read_verified(Path(directory), {MODEL, TRAIN_STATE, STATE})
    return load(files[MODEL]), load(files[TRAIN_STATE]), json.loads(files[STATE])


def export_model(source: str | Path, target: str | Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write the sampling half of checkpoint `source` to `target`, its weights stored as `dtype`."""
    files = _read_verified(Path(source), {CONFIG, MODEL})
    return save_checkpoint(target, weights=load(files[MODEL]), config=json.loads(files[CONFIG]), dtype=dtype)


def latest_checkpoint(run: str | Path) -> Path | None:
    """The undamaged `step-N` directory with the largest N in `run`, or None; each damaged one is named in a warning."""
    for _, path in reversed(checkpoints(run)):
        try:
            verify(path)
        except CheckpointError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
        else:
            return path
    return None


def checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """The step and the path of every `step-N` directory in `run`, damaged ones too, in ascending order.

    `step-N.old` counts where a writer was killed before its successor had that name.
    """
    found: dict[int, Path] = {}
    for path in Path(run).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)(\.old)?", path.name)
        if match and path.is_dir() and not (match[2] and path.with_suffix("").is_dir()):
            found[int(match[1])] = path
    return sorted(found.items())


def prune_checkpoints(run: str | Path, *, keep_last: int | None = None, keep_every: int | None = None) -> list[Path]:
    """Remove all checkpoints of `run` but the newest `keep_last` and those of a multiple of `keep_every` steps.

    keep_last counts undamaged ones; None keeps all. Damaged ones stay, for somebody to look at. A directory is renamed
    before it is emptied, so that no half of one is ever taken for a checkpoint. Returns the paths that are gone. Raises
    ValueError for numbers below 1.
    """
    for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be None or an integer of at least 1, got {value!r}")
    removed: list[Path] = []
    if keep_last is None:
        return removed
    # of an earlier call, if it was killed
    for doomed in Path(run).glob("step-*.pruned"):
        shutil.rmtree(doomed, ignore_errors=True)
    newer = 0
    for step, path in reversed(checkpoints(run)):
        kept = keep_every is not None and step % keep_every == 0
        if newer < keep_last or not kept:
            try:
                verify(path)
            except CheckpointError:
                continue
        newer += 1
        if newer > keep_last and not kept and _is_ours(path):
            doomed = path.with_name(f"{path.name}.pruned")
            try:
                path.rename(doomed)
            except OSError as error:
                warnings.warn(f"checkpoint {path} cannot be removed: {error.strerror or error}", stacklevel=2)
                continue
            shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
    return removed[::-1]


def _replaced(directory: Path) -> Path:
    """Where a checkpoint is while another takes its place."""
    return directory.with_name(directory.name + ".old")


def _is_ours(directory: Path) -> bool:
    """Whether replacing `directory` loses nothing but a checkpoint, even a damaged one."""
    return directory.is_dir() and {path.name for path in directory.iterdir()} <= ALL_FILES


def _read_verified(directory: Path, wanted: set[str] | None) -> dict[str, bytes]:
    """The content of the `wanted` files (None: of all), each compared with the manifest."""
    if not directory.is_dir():
        if not _replaced(directory).is_dir():
            raise CheckpointError(f"checkpoint {directory} does not exist")
        directory = _replaced(directory)
    try:
        hashes = json.loads(_read(directory / MANIFEST))["sha256"]
        expected = {name: hashes[name] for name in wanted or hashes}
        if not {CONFIG, MODEL} <= hashes.keys():
            raise ValueError
    except KeyError as error:
        exported = error.args[0] in (TRAIN_STATE, STATE)
        reason = ": it was exported for sampling, with averaged weights alone" if exported else ""
        raise CheckpointError(f"checkpoint {directory} has no {error.args[0]} in its {MANIFEST}{reason}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise error if isinstance(error, CheckpointError) else _damaged(directory / MANIFEST) from error
    files = {name: _read(directory / name) for name in expected}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != expected[name]:
            raise _damaged(directory / name)
    return files


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"checkpoint file {path} is damaged: its content does not match {MANIFEST}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint file {path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error.strerror or error}") from error


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    # No final newline: a manifest that lost its last byte must not parse.
    return json.dumps(content, indent=2, sort_keys=True).encode()


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    # safetensors stores contiguous tensors only: channels-last weights are written in their logical order.
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
