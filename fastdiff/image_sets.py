"""Images to compare, uint8 RGB by the batch: from a folder, from an npz file or from a dataset of training."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.bulk import SETTINGS
from fastdiff.data import IMAGE_SUFFIXES, load_dataset


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """A finite list of images of one size.

    name: where they come from, in words. count: how many. size: (H, W).
    read: (first, stop) -> uint8 [stop - first, 3, H, W] on the CPU; grey images have three equal channels.
    """

    name: str
    count: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images in order, uint8 [<= batch_size, 3, H, W]."""
        for first in range(0, self.count, batch_size):
            yield self.read(first, min(first + batch_size, self.count))


def of_tensor(name: str, images: Tensor) -> ImageSet:
    """uint8 [N, 1 or 3, H, W]; ValueError naming the set for anything else."""
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"{name} must hold uint8 images of 1 or 3 channels, got {images.dtype} {list(images.shape)}")
    height, width = images.shape[2:]

    def read(first: int, stop: int) -> Tensor:
        return images[first:stop].expand(-1, 3, -1, -1).contiguous()

    return ImageSet(name=name, count=len(images), size=(height, width), read=read)


def of_path(path: Path) -> ImageSet:
    """A folder of images or an npz file, as `fastdiff generate` writes them.

    Raises ValueError naming the file that is missing, unreadable or of another shape than the rest.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".npz":
        return _of_npz(path)
    raise ValueError(f"{path} is neither a folder of images nor an npz file")


def of_dataset(spec: str, *, split: str, size: tuple[int, int], root: Path) -> ImageSet:
    """A dataset as in training, resized to the square `size` as training does; errors are those of `load_dataset`."""
    dataset = load_dataset(spec, split=split, image_size=size[0] if size[0] == size[1] else None, root=root)
    return of_tensor(f"{spec} ({split})", dataset.images)


def _of_npz(path: Path) -> ImageSet:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except KeyError as error:
        raise ValueError(f"{path} must hold the images as arr_0") from error
    except (OSError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a readable npz file") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or len(array) == 0:
        raise ValueError(f"{path} must hold arr_0 as uint8 [N, H, W, 1 or 3], got {array.dtype} {list(array.shape)}")
    return of_tensor(str(path), torch.from_numpy(array).permute(0, 3, 1, 2))


def _of_folder(folder: Path) -> ImageSet:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    if not files:
        raise ValueError(f"{folder} has no images directly in it")
    if (folder / SETTINGS).exists():
        wanted = json.loads((folder / SETTINGS).read_text())["num"]
        if len(files) != wanted:
            raise ValueError(f"{folder} has {len(files)} of the {wanted} samples it was made for: resume their making")
    height, width = _read_file(files[0]).shape[:2]

    def read(first: int, stop: int) -> Tensor:
        images = np.empty((stop - first, height, width, 3), dtype=np.uint8)
        for image, path in zip(images, files[first:stop]):
            pixels = _read_file(path)
            if pixels.shape != image.shape:
                found = f"{pixels.shape[1]}x{pixels.shape[0]}"
                raise ValueError(f"{path} is {found}, but {files[0]} is {width}x{height}: images must have one size")
            image[:] = pixels
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    return ImageSet(name=str(folder), count=len(files), size=(height, width), read=read)


def _read_file(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            # 16-bit and float pixels would be clipped
            pixels = None if image.mode[0] in "IF" else np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image") from error
    if pixels is None:
        raise ValueError(f"{path} is not an image of 8 bits a channel")
    return pixels
