"""What a training run shows of its progress: the loss on held-out images, and a picture of samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdiff import superres
from fastdiff.data import Dataset
from fastdiff.images import image_grid, save_png, to_uint8
from fastdiff.loss import DiffusionLoss
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.train_config import TrainConfig
from fastdiff.unet import UNet

# The held-out loss is measured on at most this many images.
EVALUATION_IMAGES = 2048


def held_out_loss(
    objective: DiffusionLoss,
    model: UNet,
    held_out: Dataset | None,
    conditions: Callable[[Tensor], Tensor | None],
) -> float | None:
    """The mean squared error of the model's output on held-out images, None without any; autocast as in training."""
    if held_out is None:
        return None
    labels = None if held_out.labels is None else held_out.labels[:EVALUATION_IMAGES]
    images = held_out.images[:EVALUATION_IMAGES]
    dtype = objective.dtype
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return objective.evaluate(model, images, labels, condition=conditions(images)).item()


def draw_samples(model: UNet, schedule: NoiseSchedule, config: TrainConfig, dataset: Dataset, path: Path) -> None:
    """A PNG of samples, with the same noise every time.

    Four rows, the classes side by side; for super-resolution a row of what the model is shown, one of what it makes of
    it, and one of the images themselves.
    """
    sampler = Sampler(
        model,
        schedule,
        solver="dpmpp_2m",
        num_inference_steps=min(25, config.num_train_timesteps),
        prediction_type=config.prediction_type,
        cuda_graph=False,
    )
    if config.task == "superres":
        originals = dataset.images[:8]
        shown = superres.condition(originals, config.superres_factor)
        restored = sampler.sample(tuple(shown.shape), seed=config.seed, model_kwargs={"condition": shown})
        columns, images = len(originals), torch.cat([to_uint8(shown), to_uint8(restored), originals])
    else:
        num_classes = model.config.num_classes
        columns = min(num_classes or 8, 10)
        labels = torch.arange(4 * columns, device=dataset.images.device) % columns
        kwargs = {} if num_classes is None else {"class_labels": labels}
        images = to_uint8(sampler.sample((len(labels), *dataset.image_shape), seed=config.seed, model_kwargs=kwargs))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image_grid(images, columns), path, scale=max(1, 64 // dataset.image_shape[-1]))
