"""Damage to a checkpoint is found, and no code in one is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from fastdiff import checkpoint
from fastdiff.checkpoint import CheckpointError
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet, UNetConfig
from soak.trial import Attempt, NotSurvived, require, trial

DAMAGE = "Damage is found"
CODE = "No code from a checkpoint"
TINY = UNetConfig(
    sample_size=4,
    in_channels=1,
    out_channels=1,
    model_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_num_groups=4,
)


def two_checkpoints(run: Path) -> dict[str, bytes]:
    """Checkpoints of a small model, step-1 and step-2; the files of the second."""
    torch.manual_seed(0)
    model = UNet(TINY)
    schedule = NoiseSchedule.cosine(num_train_timesteps=50).to_config()
    config = {"model": TINY.to_dict(), "schedule": schedule, "prediction_type": "epsilon"}
    for step in (1, 2):
        checkpoint.save_checkpoint(
            run / f"step-{step}",
            weights=model.state_dict(),
            config=config,
            train_state=model.state_dict(),
            state={"step": step},
        )
    return {path.name: path.read_bytes() for path in sorted((run / "step-2").iterdir())}


def require_found(run: Path, name: str) -> None:
    """step-2 of this run, with a damaged file of this name, is passed over by name and refuses to load."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latest = checkpoint.latest_checkpoint(run)
    require(latest == run / "step-1", f"the newest checkpoint is {latest}")
    told = [str(warning.message) for warning in caught]
    # damage to the manifest may read as that of another file, whose name or hash it holds
    named = str(run / "step-2") if name == checkpoint.MANIFEST else f"{run / 'step-2' / name} is damaged"
    require(len(told) == 1 and named in told[0], f"it said {told}")
    for load, files in (
        (checkpoint.load_model, {checkpoint.CONFIG, checkpoint.MODEL}),
        (checkpoint.load_train_state, {checkpoint.MODEL, checkpoint.TRAIN_STATE, checkpoint.STATE}),
    ):
        if name in files:
            try:
                load(run / "step-2")
            except CheckpointError:
                continue
            raise NotSurvived(f"{load.__name__} took it")


@trial(promise=DAMAGE, tried="file cut off at a random byte", short=40, full=1000)
def truncations(folder: Path) -> Iterator[Attempt]:
    files = two_checkpoints(folder)

    def attempt(number: int) -> None:
        chosen = random.Random(number)
        name = chosen.choice(list(files))
        length = chosen.randrange(len(files[name]))
        path = folder / "step-2" / name
        path.write_bytes(files[name][:length])
        try:
            require_found(folder, name)
        except NotSurvived as error:
            raise NotSurvived(f"{name} cut to {length} of {len(files[name])} bytes: {error}") from error
        path.write_bytes(files[name])

    yield attempt


@trial(promise=DAMAGE, tried="random bit flipped", short=40, full=1000)
def bit_flips(folder: Path) -> Iterator[Attempt]:
    files = two_checkpoints(folder)

    def attempt(number: int) -> None:
        chosen = random.Random(number)
        name = chosen.choice(list(files))
        place, bit = chosen.randrange(len(files[name])), chosen.randrange(8)
        content = bytearray(files[name])
        content[place] ^= 1 << bit
        path = folder / "step-2" / name
        path.write_bytes(content)
        try:
            require_found(folder, name)
        except NotSurvived as error:
            raise NotSurvived(f"bit {bit} of byte {place} of {name}: {error}") from error
        path.write_bytes(files[name])

    yield attempt


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@trial(promise=CODE, tried="pickle in place of a file", short=10, full=10)
def pickles(folder: Path) -> Iterator[Attempt]:
    """The second five have a manifest that says it belongs there."""
    files = two_checkpoints(folder / "run")
    marker = folder / "ran"
    directory = folder / "run" / "step-2"

    def attempt(number: int) -> None:
        name = list(files)[number % len(files)]
        content = pickle.dumps(Payload(marker))
        (directory / name).write_bytes(content)
        if number >= len(files) and name != checkpoint.MANIFEST:
            manifest = json.loads(files[checkpoint.MANIFEST])
            manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
            (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        refused = 0
        for load in (checkpoint.load_model, checkpoint.load_train_state):
            try:
                load(directory)
            except Exception:  # by whatever reads it
                refused += 1
        require(not marker.exists(), f"{name} was unpickled")
        require(refused, f"{name} was taken for what it is not")
        for other, whole in files.items():
            (directory / other).write_bytes(whole)

    yield attempt
