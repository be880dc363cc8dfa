"""Super-resolution by concatenated conditioning (Saharia et al. 2022, SR3): what the model sees, and how good it is.

The low-resolution image, enlarged to the size of the result, is the model's `condition`. A model is judged by its PSNR
on images it has not seen, against bicubic enlargement of the same low-resolution images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.sampler import Sampler

# The mean of this many samples estimates the posterior mean, the image of least expected squared error: a single
# sample, being a plausible image, has up to twice its squared error (Blau and Michaeli 2018, section 3).
SAMPLES_PER_IMAGE = 8
STEPS = 10


def low_resolution(images: Tensor, factor: int) -> Tensor:
    """uint8 [B, C, H, W] -> uint8 [B, C, H / factor, W / factor]: means of squares, rounded as a file would be.

    Raises ValueError where factor does not divide H and W.
    """
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"superres_factor must divide the size of the images, {width}x{height}, got {factor}")
    return F.avg_pool2d(images.float(), factor).round().to(torch.uint8)


def enlarge(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B, C, h, w] -> bicubic float32 [B, C, *size] in [-1, 1], channels-last: a condition, and the baseline."""
    bicubic = F.interpolate(images.float(), size, mode="bicubic", align_corners=False).clamp(0, 255)
    return (bicubic / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def read_images(paths: Sequence[str | Path], channels: int) -> Tensor:
    """Image files of one size as uint8 [N, channels, h, w], grey for one channel, else RGB.

    Raises ValueError naming a file that is no readable image or has another size than the first.
    """
    from PIL import Image

    arrays: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"input {path} is not a readable image") from error
        arrays.append(pixels.reshape(*pixels.shape[:2], -1))
        if arrays[-1].shape != arrays[0].shape:
            sizes = " and ".join(f"{array.shape[1]}x{array.shape[0]}" for array in (arrays[0], arrays[-1]))
            raise ValueError(f"input images must have one size, {paths[0]} and {path} are {sizes}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def condition(images: Tensor, factor: int) -> Tensor:
    """What a model that shall restore uint8 `images` is shown of them: float32 like images, in [-1, 1]."""
    return enlarge(low_resolution(images, factor), (images.shape[-2], images.shape[-1]))


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (clamped): the mean over images [B, ...] of each one's."""
    error = ((images.clamp(-1, 1) - reference) ** 2).flatten(1).mean(1)
    return float((10 * torch.log10(4 / error.clamp(min=1e-12))).mean())


@dataclass(frozen=True, kw_only=True)
class SuperresScore:
    """PSNR in dB on held-out images: of the mean of several samples, of single samples, and of bicubic enlargement."""

    mean_of_samples: float
    single_sample: float
    bicubic: float
    images: int
    samples_per_image: int

    @property
    def gain(self) -> float:
        """dB by which the mean of samples beats bicubic enlargement."""
        return self.mean_of_samples - self.bicubic

    def describe(self) -> str:
        """One sentence."""
        return (
            f"PSNR on {self.images} held-out images: {self.mean_of_samples:.2f} dB (mean of {self.samples_per_image} "
            f"samples), {self.single_sample:.2f} dB (one sample), bicubic {self.bicubic:.2f} dB"
        )


def evaluate(
    model: Any,
    schedule: Any,
    prediction_type: str,
    images: Tensor,
    factor: int,
    *,
    num_inference_steps: int = STEPS,
    samples_per_image: int = SAMPLES_PER_IMAGE,
    seed: int = 0,
    batch_size: int = 256,
) -> SuperresScore:
    """Restore uint8 `images` [N, C, H, W] from their low resolution, and compare.

    Sample s of image i has number i * samples_per_image + s in the noise contract, so that the score is reproducible.
    """
    steps = min(num_inference_steps, schedule.num_train_timesteps)
    sampler = Sampler(
        model, schedule, solver="dpmpp_2m", num_inference_steps=steps, prediction_type=prediction_type, cuda_graph=False
    )
    reference, shown = images.float() / 127.5 - 1, condition(images, factor)
    per_batch = max(1, batch_size // samples_per_image)
    restored = []
    for part in torch.arange(len(images), device=images.device).split(per_batch):
        repeated = shown[part].repeat_interleave(samples_per_image, 0)
        numbers = (part[:, None] * samples_per_image + torch.arange(samples_per_image, device=part.device)).flatten()
        drawn = sampler.sample(
            tuple(repeated.shape), seed=seed, sample_indices=numbers, model_kwargs={"condition": repeated}
        )
        restored.append(drawn.unflatten(0, (len(part), samples_per_image)))
    samples = torch.cat(restored)
    singles = [psnr(samples[:, s], reference) for s in range(samples_per_image)]
    return SuperresScore(
        mean_of_samples=psnr(samples.mean(1), reference),
        single_sample=math.fsum(singles) / len(singles),
        bicubic=psnr(shown, reference),
        images=len(images),
        samples_per_image=samples_per_image,
    )
