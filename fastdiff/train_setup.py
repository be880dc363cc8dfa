"""What a training run is made of before its first step: the run to continue, device, data, network and objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import checkpoint, superres
from fastdiff.data import Dataset, EmptySplitError, load_dataset
from fastdiff.device import resolve_device
from fastdiff.loss import DiffusionLoss
from fastdiff.schedule import NoiseSchedule
from fastdiff.train_config import TrainConfig
from fastdiff.unet import UNet, UNetConfig
from fastdiff.unet_config import PRESETS

# What may differ between a run and its continuation; every other option decides the weights.
FREE_ON_RESUME = {"steps", "data_root", "output", "device", "compile", "cuda_graph", "progress", "resume"}
FREE_ON_RESUME |= {"log_every", "checkpoint_every", "keep_last", "keep_every", "sample_every"}


def find_run(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from, None for a new run."""
    output = Path(config.output)
    latest = checkpoint.latest_checkpoint(output)
    if config.resume and latest is None:
        raise checkpoint.CheckpointError(f"output {output} has no undamaged checkpoint to resume from")
    if latest and not config.resume:
        raise ValueError(f"output {output} already holds a run: resume it or choose another folder")
    return latest


def check_resume(
    resumed: Path, options: dict[str, Any], config: TrainConfig, model_config: UNetConfig | None
) -> UNetConfig:
    """The network of the run that is to continue, once all options that decide its weights are the same."""
    for name, value in asdict(config).items():
        before = options.get(name, value)
        if name not in FREE_ON_RESUME and value != before:
            raise ValueError(f"{name} must be {before!r} as in the run that resumes from {resumed}, got {value!r}")
    stored = UNetConfig.from_dict(checkpoint.load_config(resumed)["model"])
    if model_config not in (None, stored):
        raise ValueError(f"model_config must be that of {resumed}, {stored}, got {model_config}")
    return stored


def device_and_dtype(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Where the run computes, and what the model is autocast to (float32: not at all)."""
    device = resolve_device(config.device)
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    return device, torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load_data(config: TrainConfig, device: torch.device) -> tuple[Dataset, Dataset | None]:
    """The images to train on and those held out, if there are any, on the device."""

    def load(split: str) -> Dataset:
        dataset = load_dataset(config.dataset, split=split, image_size=config.image_size, root=config.data_root)
        labelled = config.class_conditional and config.task == "generate"
        return dataset.to(device) if labelled else replace(dataset, labels=None).to(device)

    dataset = load("train")
    try:
        return dataset, load("held_out")
    except EmptySplitError:
        return dataset, None


def preset_for(config: TrainConfig, dataset: Dataset) -> UNetConfig:
    """The preset, adapted to the images and classes of the data; its levels keep or lack their attention."""
    channels, height, width = dataset.image_shape
    if height != width:
        raise ValueError(
            f"image_size must be given, because the images of {config.dataset} are {width}x{height}, not square"
        )
    if config.task == "superres":
        superres.low_resolution(dataset.images[:1], config.superres_factor)  # raises where it does not divide the size
    preset = PRESETS[config.model]
    if height % preset.downsampling_factor:
        raise ValueError(
            f"image_size must be a multiple of {preset.downsampling_factor} for model {config.model}, got {height}"
        )
    attended = [preset.sample_size // resolution for resolution in preset.attention_resolutions]
    return replace(
        preset,
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        condition_channels=channels if config.task == "superres" else 0,
        num_classes=dataset.num_classes if dataset.labels is not None else None,
        attention_resolutions=tuple(height // factor for factor in attended),
    )


def new_model(config: TrainConfig, model_config: UNetConfig, device: torch.device) -> UNet:
    """A network with the initial weights of the seed, which are the same for every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UNet(model_config)
    return model.to(device)


def objective_for(
    config: TrainConfig, schedule: NoiseSchedule, model: UNet, dataset: Dataset, dtype: torch.dtype
) -> DiffusionLoss:
    """The objective that the options name, for this network and data; dtype is that of the network's input."""
    return DiffusionLoss(
        schedule=schedule,
        prediction_type=config.prediction_type,
        weighting=config.weighting,
        gamma=config.min_snr_gamma,
        label_dropout=config.label_dropout if dataset.labels is not None else 0.0,
        null_class=model.null_class,
        seed=config.seed,
        dtype=dtype,
        device=dataset.images.device,
    )


def conditions(config: TrainConfig) -> Callable[[Tensor], Tensor | None]:
    """What the model is shown of a batch of images, besides their noisy selves and labels."""
    if config.task == "generate":
        return lambda images: None
    return lambda images: superres.condition(images, config.superres_factor)
