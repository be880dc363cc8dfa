"""Draw samples from a checkpoint and write them as a picture and as an array: what `fastdiff sample` does."""

from __future__ import annotations

import contextlib
import importlib.resources
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fastdiff import superres
from fastdiff.checkpoint import CONFIG, Checkpoint, CheckpointError, latest_checkpoint, load_model
from fastdiff.device import resolve_device
from fastdiff.images import image_grid, save_png, to_uint8
from fastdiff.sample_config import SampleConfig
from fastdiff.sampler import Sampler
from fastdiff.sampling_options import SamplingOptions

DEFAULT_GUIDANCE_SCALE = 1.5
# Samples smaller than this are enlarged in the picture.
READABLE_PIXELS = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Generated:
    """What was drawn, and how long it took.

    images: float32 [N, C, H, W] in [-1, 1], on the CPU. labels: int64 [N], None for a model without classes.
    seconds: of sampling, without loading and writing (with compile, including compilation).
    files: what was written.
    """

    images: Tensor
    labels: Tensor | None
    seconds: float
    checkpoint: Path
    guidance_scale: float | None
    device: str
    files: tuple[Path, ...]

    @property
    def images_per_second(self) -> float:
        """Samples by the time that sampling took."""
        return len(self.images) / self.seconds


def generate(config: SampleConfig, *, progress: bool = False) -> Generated:
    """Draw config.num samples and write them; each file is replaced as a whole, or left as it was.

    Everything that can be wrong with the options is found before the first step. Raises ValueError naming the option,
    CheckpointError for a checkpoint that is missing or damaged, OSError where a file cannot be written, and
    FloatingPointError for samples that are not finite.
    """
    device = resolve_device(config.device)
    directory = find_checkpoint(config.checkpoint)
    loaded = load_model(directory, device=device, weights=config.weights)
    draw = prepare(config, loaded, device, num=config.num, input=config.input)
    shape = draw.shape
    if config.out is not None and shape[0] not in (1, 3):
        raise ValueError(f"out must be None for samples of {shape[0]} channels, a PNG has 1 or 3: use save_npy")
    with contextlib.ExitStack() as outputs:
        # Opened before sampling: a place that cannot be written to is not found out at the end.
        png = outputs.enter_context(_replacing(config.out)) if config.out else None
        npy = outputs.enter_context(_replacing(config.save_npy)) if config.save_npy else None
        started = time.perf_counter()
        images = _sample(draw, config, device, progress=progress)
        seconds = time.perf_counter() - started
        if not images.isfinite().all():
            raise FloatingPointError(f"the samples of {directory} with {config.solver} are not finite")
        images = images.clamp(-1, 1)
        if png is not None:
            scale = config.scale or max(1, READABLE_PIXELS // max(shape[1:]))
            save_png(image_grid(to_uint8(images), _columns(config, loaded, len(images))), png, scale=scale)
        if npy is not None:
            np.save(npy, images.numpy())
    return Generated(
        images=images,
        labels=draw.labels,
        seconds=seconds,
        checkpoint=directory,
        guidance_scale=draw.guidance_scale,
        device=str(device),
        files=tuple(path for path in (config.out, config.save_npy) if path is not None),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Draw:
    """A sampler, and what its calls are given.

    shape: (C, H, W) of a sample. labels: int64 [N] on the CPU, None for a model without classes. condition: float32
    [N, C, H, W] on the CPU, what a model of task superres is shown, None for another one.
    """

    sampler: Sampler
    shape: tuple[int, ...]
    labels: Tensor | None
    condition: Tensor | None
    guidance_scale: float | None

    def model_kwargs(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The model's arguments for the samples `indices` [B]."""
        given = {"class_labels": self.labels, "condition": self.condition}
        return {name: value[indices].to(device) for name, value in given.items() if value is not None}


def prepare(
    options: SamplingOptions,
    loaded: Checkpoint,
    device: torch.device,
    *,
    num: int,
    input: tuple[Path, ...] | None = None,
    cuda_graph: bool | str = "auto",
) -> Draw:
    """The sampler that the options ask for, and what it takes to draw `num` samples, or one for each image of `input`.

    Raises ValueError naming the option that does not fit the model.
    """
    model_config = loaded.model.config
    labels = _labels(options, loaded, num)
    guidance_scale = _guidance_scale(options, loaded)
    condition = _condition(input, loaded)
    sampler = Sampler(
        loaded.model,
        loaded.schedule,
        solver=options.solver,
        num_inference_steps=options.num_inference_steps,
        prediction_type=loaded.prediction_type,
        guidance_scale=guidance_scale,
        dtype=getattr(torch, options.dtype),
        device=device,
        compile=options.compile,
        cuda_graph=cuda_graph,
    )
    size = (model_config.sample_size, model_config.sample_size) if condition is None else tuple(condition.shape[2:])
    return Draw(
        sampler=sampler,
        shape=(model_config.in_channels, *size),
        labels=labels,
        condition=condition,
        guidance_scale=guidance_scale,
    )


def packaged_model() -> Path:
    """The checkpoint of class-conditional digits that comes with the package; CheckpointError if it is not there."""
    directory = Path(str(importlib.resources.files("fastdiff"))) / "models" / "digits"
    if not directory.is_dir():
        raise CheckpointError(f"the packaged model {directory} is missing from this installation: name a checkpoint")
    return directory


def find_checkpoint(path: str | Path | None) -> Path:
    """The checkpoint at `path`, the newest one of a training run there, or for None the packaged model."""
    if path is None:
        return packaged_model()
    path = Path(path)
    if (path / CONFIG).exists():
        return path
    return latest_checkpoint(path) or path


def _labels(options: SamplingOptions, loaded: Checkpoint, num: int) -> Tensor | None:
    num_classes = loaded.model.config.num_classes
    if num_classes is None:
        if options.class_labels is not None:
            raise ValueError(f"class_labels must be None for a model without classes, got {list(options.class_labels)}")
        return None
    classes = options.class_labels or range(num_classes)
    if outside := [label for label in classes if not 0 <= label < num_classes]:
        raise ValueError(f"class_labels must be in [0, {num_classes - 1}], got {outside[0]}")
    return torch.tensor(classes)[torch.arange(num) % len(classes)]


def _guidance_scale(options: SamplingOptions, loaded: Checkpoint) -> float | None:
    """What the sampler gets; None where there is nothing to guide."""
    # The null class of a model that never lost a label in training means nothing.
    has_null_class = loaded.model.null_class is not None and loaded.config.get("label_dropout") != 0
    scale = options.guidance_scale
    if scale is None:
        scale = DEFAULT_GUIDANCE_SCALE if has_null_class else 1.0
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale}")
    if scale != 1 and not has_null_class:
        raise ValueError(f"guidance_scale must be 1 for a model without a null class, got {scale}")
    return None if scale == 1 else scale


def _condition(input: tuple[Path, ...] | None, loaded: Checkpoint) -> Tensor | None:
    """float32 [N, C, H, W] what a model of task superres is shown, None for another model."""
    channels = loaded.model.config.condition_channels
    if not channels:
        if input is not None:
            raise ValueError("input must be None for a model that was not trained with task superres")
        return None
    if input is None:
        raise ValueError("input is needed, the images to enlarge: this model was trained with task superres")
    images = superres.read_images(input, channels)
    factor = loaded.config["superres_factor"]
    height, width = (factor * size for size in images.shape[2:])
    multiple = loaded.model.config.downsampling_factor
    if height % multiple or width % multiple:
        raise ValueError(
            f"input images of {images.shape[3]}x{images.shape[2]} pixels become {width}x{height}, "
            f"but this model takes multiples of {multiple} only"
        )
    return superres.enlarge(images, (height, width))


def _columns(config: SampleConfig, loaded: Checkpoint, count: int) -> int:
    """Near a square, and whole cycles of the classes in a row where these are few."""
    side = math.ceil(math.sqrt(count))
    cycle = len(config.class_labels or ()) or loaded.model.config.num_classes or 1
    return min(count, -(-side // cycle) * cycle if cycle <= 2 * side else side)


def _sample(draw: Draw, config: SampleConfig, device: torch.device, *, progress: bool) -> Tensor:
    parts = []
    num = config.num if draw.condition is None else len(draw.condition)
    for first in range(0, num, config.batch_size):
        indices = torch.arange(first, min(first + config.batch_size, num))
        parts.append(
            draw.sampler.sample(
                (len(indices), *draw.shape),
                seed=config.seed,
                sample_indices=indices.to(device),
                model_kwargs=draw.model_kwargs(indices, device),
                progress=progress,
            )
        )
    return torch.cat(parts).cpu().contiguous()


@contextlib.contextmanager
def _replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes if it does not."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # mkstemp keeps the file to its owner; a picture gets the usual permissions
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
