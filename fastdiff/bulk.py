"""Many samples as files, on any number of processes, restartable: what `fastdiff generate` does.

The indices are cut into blocks of batch_size, the last one padded with samples that are thrown away, and the blocks are
dealt to the processes in turn. A sample depends on its seed and index, and a model call on its block alone: the files
are the same bytes for any number of processes and after any interruption.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.bulk_config import BulkConfig
from fastdiff.checkpoint import MANIFEST, load_model
from fastdiff.device import resolve_device
from fastdiff.durable_files import alone_in, is_leftover, write_files
from fastdiff.generate import Draw, find_checkpoint, prepare
from fastdiff.images import save_png, to_uint8
from fastdiff.interruption import Interruption
from fastdiff.launch_file import LAUNCH, forget_launch, is_of_this_launch, note_launch
from fastdiff.processes import Processes

SETTINGS = "generation.json"
# digits of a file's number, more where there are more samples
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class BulkResult:
    """What this process did.

    drawn: samples that it wrote; seconds: what it took, without loading. completed: False after an interruption.
    out: the folder, or the npz file.
    """

    drawn: int
    seconds: float
    completed: bool
    out: Path


def generate_many(config: BulkConfig, *, progress: bool = False) -> BulkResult:
    """Draw the samples 0 to config.num - 1 that are not in config.out yet, and write them.

    Under torchrun every process calls it and draws its share. On Ctrl-C or SIGTERM a process finishes its block; the
    same options with resume=True go on, with any number of processes. Where torchrun or SLURM starts the program again
    it goes on by itself.

    Raises ValueError for options that do not fit the model or the folder, CheckpointError for a checkpoint that is
    missing or damaged, OSError where a file cannot be written, FloatingPointError for samples that are not finite. What
    was written before an error is whole and stays. Only one run at a time may write to a folder.
    """
    with Processes.of_environment() as processes, contextlib.ExitStack() as held:
        device = resolve_device(processes.device_name(config.device))
        directory = find_checkpoint(config.checkpoint)
        loaded = load_model(directory, device=device, weights=config.weights)
        draw = prepare(config, loaded, device, num=config.num)
        if draw.condition is not None:
            raise ValueError("checkpoint must be one of task generate, a model of task superres needs its images")
        if draw.shape[0] not in (1, 3) and config.format == "png":
            raise ValueError(f"format must be npz for samples of {draw.shape[0]} channels, a PNG has 1 or 3")
        wanted = _settings(config, draw, directory, device)
        processes.first_does(lambda: _take_folder(config, wanted, held))
        _compare(config.out, wanted)  # in every process: a checkpoint may have been written since the first one looked
        blocks = _Blocks(config, draw)
        mine = [block for block in range(processes.rank, blocks.count, processes.size) if not blocks.is_done(block)]
        started, drawn = time.perf_counter(), 0
        bar = tqdm(total=sum(map(blocks.size, mine)), unit=" images", disable=not progress or processes.rank > 0)
        with Interruption() as interruption, bar:
            for block in mine:
                if interruption.requested:
                    break
                blocks.write(block, _sample(draw, config, blocks.indices(block), device))
                drawn += blocks.size(block)
                bar.update(blocks.size(block))
        seconds = time.perf_counter() - started
        completed = processes.all_true(not interruption.requested)
        out = config.out
        if completed and config.format == "npz":
            out = blocks.joined
            processes.first_does(blocks.join)
        if completed:
            # what is done holds nothing but samples
            processes.first_does(forget_launch, config.out)
    return BulkResult(drawn=drawn, seconds=seconds, completed=completed, out=out)


def _sample(draw: Draw, config: BulkConfig, indices: Tensor, device: torch.device) -> Tensor:
    """uint8 [batch_size, C, H, W] on the CPU."""
    labels = None if draw.labels is None else draw.labels[indices % len(draw.labels)].to(device)
    images = draw.sampler.sample(
        (len(indices), *draw.shape),
        seed=config.seed,
        sample_indices=indices.to(device),
        model_kwargs={} if labels is None else {"class_labels": labels},
    )
    if not images.isfinite().all():
        raise FloatingPointError(f"samples {int(indices[0])} to {int(indices[-1])} with {config.solver} are not finite")
    return to_uint8(images).cpu()


def _settings(config: BulkConfig, draw: Draw, checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """All that decides the samples."""
    return {
        "num": config.num,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "format": config.format,
        "shape": list(draw.shape),
        "weights": config.weights,
        "class_labels": None if config.class_labels is None else list(config.class_labels),
        "solver": config.solver,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": draw.guidance_scale,
        "dtype": config.dtype,
        "compile": config.compile,
        "device": device.type,
        # of the hashes of all its files
        "checkpoint_sha256": hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest(),
    }


def _take_folder(config: BulkConfig, wanted: dict[str, Any], held: contextlib.ExitStack) -> None:
    """Make the folder, lock it, and write down what is in it; or find that it holds a part of the same samples."""
    refusal = f"out {config.out} must be an empty folder, or one with samples of the same options to resume"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(refusal) from error
    held.enter_context(alone_in(config.out, "out"))
    path = config.out / SETTINGS
    if path.exists():
        if not config.resume and not is_of_this_launch(config.out):
            raise ValueError(f"out {config.out} holds samples already: resume them or choose another folder")
        _compare(config.out, wanted)
    elif not all(is_leftover(path) or path.name == LAUNCH for path in config.out.iterdir()):
        raise ValueError(refusal)
    for leftover in config.out.glob(".*.tmp"):
        leftover.unlink()
    note_launch(config.out)
    if not path.exists():
        write_files({path: lambda file: file.write(json.dumps(wanted, indent=2).encode())})


def _compare(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise ValueError where the folder's samples are of other options."""
    try:
        found = dict(json.loads((folder / SETTINGS).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / SETTINGS} is damaged: {error}") from error
    for name, value in wanted.items():
        if found.get(name) != value:
            before = found.get(name)
            raise ValueError(f"{name} must be {before!r} as in the samples that {folder} holds, got {value!r}")


class _Blocks:
    """The blocks of a range of samples and their files."""

    def __init__(self, config: BulkConfig, draw: Draw) -> None:
        self.config, self.shape = config, draw.shape
        self.count = -(-config.num // config.batch_size)
        self.digits = max(DIGITS, len(str(config.num - 1)))
        channels, height, width = draw.shape
        self.joined = config.out / f"samples_{config.num}x{height}x{width}x{channels}.npz"

    def indices(self, block: int) -> Tensor:
        """int64 [batch_size], past the end too."""
        size = self.config.batch_size
        return torch.arange(block * size, (block + 1) * size)

    def size(self, block: int) -> int:
        """Samples of a block that are kept."""
        size = self.config.batch_size
        return min(size, self.config.num - block * size)

    def files(self, block: int) -> list[Path]:
        """A PNG for each sample, or one array for the block."""
        first = block * self.config.batch_size
        if self.config.format == "npz":
            return [self.config.out / f"block-{first:0{self.digits}}.npy"]
        return [self.config.out / f"{first + i:0{self.digits}}.png" for i in range(self.size(block))]

    def is_done(self, block: int) -> bool:
        """A file is there as a whole or not at all."""
        # a file that a power failure left empty is none
        return self.joined.exists() or all(path.exists() and path.stat().st_size for path in self.files(block))

    def write(self, block: int, images: Tensor) -> None:
        """Write uint8 [>= size, C, H, W]: all of the block's files, or none."""
        kept = images[: self.size(block)]
        if self.config.format == "npz":
            array = kept.permute(0, 2, 3, 1).contiguous().numpy()
            write_files({self.files(block)[0]: lambda file: np.save(file, array)})
        else:
            write_files(
                {path: functools.partial(save_png, image) for path, image in zip(self.files(block), kept)},
            )

    def join(self) -> None:
        """All blocks as `arr_0` of one npz file, which takes their place."""
        if not self.joined.exists():
            write_files({self.joined: self._write_npz})
        for path in self.config.out.glob("block-*.npy"):
            path.unlink()

    def _write_npz(self, target: IO[bytes]) -> None:
        channels, height, width = self.shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.config.num, height, width, channels)}
        # a fixed date: the same samples are the same bytes
        entry = zipfile.ZipInfo("arr_0.npy", date_time=(1980, 1, 1, 0, 0, 0))
        with (
            zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive,
            archive.open(entry, "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for block in range(self.count):
                for part in self.files(block):
                    file.write(np.load(part).tobytes())
