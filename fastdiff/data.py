"""Datasets held in memory as uint8, and the order in which training sees them.

The whole set moves to the device once. A batch is then an `index_select` there, so that a training step copies nothing
from the host and never waits for it. Which image comes when depends on (seed, epoch) alone: to resume is to know the
step number.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.kernels.uniform import uniform_words

SPLITS = ("train", "held_out")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class EmptySplitError(ValueError):
    """A folder has no images in the split asked for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Images uint8 [N, C, H, W] in channels-last memory, labels int64 [N] in [0, num_classes) or None."""

    name: str
    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or len(self.images) == 0:
            found = f"{self.images.dtype} {list(self.images.shape)}"
            raise ValueError(f"images must be a non-empty uint8 tensor [N, C, H, W], got {found}")
        object.__setattr__(self, "images", self.images.contiguous(memory_format=torch.channels_last))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, None without labels."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        """The same set on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 [B, C, H, W] (channels-last) and labels int64 [B] of `indices` int64 [B]."""
        # index_select writes NCHW order; selecting from the [N, H, W, C] view keeps channels last without another copy.
        images = self.images.permute(0, 2, 3, 1).index_select(0, indices).permute(0, 3, 1, 2)
        return images, None if self.labels is None else self.labels.index_select(0, indices)


def load_dataset(
    spec: str, *, split: str = "train", image_size: int | None = None, root: str | Path = "data", download: bool = True
) -> Dataset:
    """Load a whole dataset into memory.

    spec: `digits` (scikit-learn's 1,797 real handwritten digits, 8x8, bundled), `mnist` or `cifar10` (through
        torchvision, kept under `root` and downloaded there if missing and `download`), or `folder:PATH` (image files,
        sorted by path; each first-level sub-folder is a class; images directly in PATH have no labels).
    split: "train" or "held_out". digits and folders hold out every tenth image (index % 10 == 9), mnist and cifar10
        their test set.
    image_size: side in pixels to which images are resized (folders: the shorter side, then centre-cropped). None keeps
        them as they are; the images of a folder must then have one size.

    Raises ValueError for an unknown spec or split and for a file that is not a readable image (it is named),
    ImportError with the extra to install where an optional dependency is missing, RuntimeError where a download fails.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if spec.startswith("folder:"):
        return _load_folder(spec, split, image_size)
    if spec == "digits":
        dataset = _load_digits(split)
    elif downloads(spec):
        dataset = _load_torchvision(spec, split, Path(root), download)
    else:
        raise ValueError(f"dataset must be digits, mnist, cifar10 or folder:PATH, got {spec!r}")
    if image_size is None or dataset.image_shape[1:] == (image_size, image_size):
        return dataset
    size = (image_size, image_size)
    images = torch.nn.functional.interpolate(dataset.images.float(), size, mode="bicubic", antialias=True)
    return replace(dataset, images=images.round().clamp(0, 255).to(torch.uint8))


def downloads(spec: str) -> bool:
    """Whether `load_dataset` may have to download this set."""
    return spec in ("mnist", "cifar10")


def _missing(package: str, spec: str) -> ImportError:
    return ImportError(f"the dataset {spec} needs {package}: pip install fastdiff[data]")


def _in_split(index: int, split: str) -> bool:
    return (index % 10 == 9) == (split == "held_out")


def _load_digits(split: str) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn", "digits") from error
    digits = load_digits()
    chosen = [index for index in range(len(digits.target)) if _in_split(index, split)]
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    labels = torch.from_numpy(digits.target[chosen].astype(np.int64))
    names = tuple(str(digit) for digit in range(10))
    return Dataset(name="digits", images=torch.from_numpy(pixels)[:, None], labels=labels, class_names=names)


def _load_torchvision(spec: str, split: str, root: Path, download: bool) -> Dataset:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise _missing("torchvision", spec) from error
    load: Any = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[spec]
    try:
        source = load(str(root), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"the dataset {spec} could not be read from or downloaded to {root}: {reason}") from error
    pixels = torch.as_tensor(source.data)
    images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(source.targets, dtype=torch.int64)
    return Dataset(name=spec, images=images, labels=labels, class_names=tuple(source.classes))


def _load_folder(spec: str, split: str, image_size: int | None) -> Dataset:
    from PIL import Image, ImageOps

    folder = Path(spec.removeprefix("folder:")).expanduser()
    if not folder.is_dir():
        raise ValueError(f"dataset {spec!r}: {folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    unlabelled = [path for path in files if path.parent == folder]
    if classes and unlabelled:
        raise ValueError(f"dataset {spec!r}: {unlabelled[0]} lies beside the class folders, so it has no class")
    files = [path for index, path in enumerate(files) if _in_split(index, split)]
    if not files:
        raise EmptySplitError(f"dataset {spec!r} has no images in its {split} split (every tenth image is held out)")

    def read(path: Path, mode: str) -> np.ndarray:
        try:
            with Image.open(path) as image:
                # convert() would clip 16-bit values to 255
                eight_bit = image.point(lambda value: value / 256, "L") if image.mode.startswith("I;16") else image
                pixels = ImageOps.exif_transpose(eight_bit).convert(mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is not a readable image") from error
        if image_size is not None:
            pixels = ImageOps.fit(pixels, (image_size, image_size), Image.Resampling.BICUBIC)
        return np.array(pixels).reshape(pixels.height, pixels.width, -1)

    mode = "L" if all(_is_grey(path) for path in files) else "RGB"
    first = read(files[0], mode)
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    for index, path in enumerate(files):
        pixels = read(path, mode)
        if pixels.shape != first.shape:
            found = f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, {files[0]} {first.shape[1]}x{first.shape[0]}"
            raise ValueError(f"images of different sizes need an image_size: {found}")
        images[index] = pixels
    labels = [classes.index(path.relative_to(folder).parts[0]) for path in files] if classes else None
    return Dataset(
        name=spec,
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        labels=None if labels is None else torch.tensor(labels),
        class_names=tuple(classes) or None,
    )


def _is_grey(path: Path) -> bool:
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            return image.mode in ("1", "L") or image.mode.startswith("I;16")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image") from error


def epoch_order(seed: int, epoch: int, length: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The permutation int64 [length] in which `epoch` visits the set: samples sorted by a random 63-bit key each."""
    samples = torch.arange(length, device=device)
    high, low = uniform_words(seed, samples, stream="order", draw=epoch)[:2]
    return torch.argsort((high << 31) | (low >> 1), stable=True)


class BatchOrder:
    """Which images make up the batch of a step, for any step.

    The epochs follow each other without a gap, so a batch may straddle two (or, if it is larger than the set, more).
    Nothing is remembered but the permutation of the last epochs used, as a cache.
    """

    def __init__(self, seed: int, length: int, batch_size: int, *, device: torch.device | str = "cpu") -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
        self.seed, self.length, self.batch_size, self.device = seed, length, batch_size, device
        self._orders: dict[int, Tensor] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Sample indices and their epochs, both int64 [batch_size] on the device, for `step` counted from 0."""
        first, stop = step * self.batch_size, (step + 1) * self.batch_size
        used = range(first // self.length, (stop - 1) // self.length + 1)
        self._orders = {epoch: self._orders[epoch] for epoch in used if epoch in self._orders}
        indices, epochs = [], []
        for epoch in used:
            if epoch not in self._orders:
                self._orders[epoch] = epoch_order(self.seed, epoch, self.length, device=self.device)
            start = epoch * self.length
            part = self._orders[epoch][max(first - start, 0) : stop - start]
            indices.append(part)
            epochs.append(torch.full_like(part, epoch))
        return torch.cat(indices), torch.cat(epochs)


def random_flip(images: Tensor, *, seed: int, sample_indices: Tensor, epochs: Tensor) -> Tensor:
    """Mirror about half of `images` [B, C, H, W] left to right, chosen by (seed, sample index, epoch)."""
    word = uniform_words(seed, sample_indices, stream="augment", draw=epochs)[0]
    flip = word < 2**31
    return torch.where(flip[:, None, None, None], images.flip(-1), images)
