"""What a training run is made of before its first step: the run to continue, device, data, network and objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import checkpoint, superres
from fastdiff.data import Dataset, EmptySplitError, downloads, load_dataset
from fastdiff.device import resolve_device
from fastdiff.loss import DiffusionLoss
from fastdiff.processes import Processes
from fastdiff.schedule import NoiseSchedule
from fastdiff.train_config import TrainConfig
from fastdiff.unet import UNet, UNetConfig
from fastdiff.unet_config import PRESETS

# What may differ between a run and its continuation; every other option decides the weights by more than roundings.
FREE_ON_RESUME = {"steps", "data_root", "output", "device", "compile", "cuda_graph", "progress", "resume"}
FREE_ON_RESUME |= {"log_every", "checkpoint_every", "keep_last", "keep_every", "sample_every"}
FREE_ON_RESUME |= {"gradient_accumulation_steps", "fsdp", "deterministic"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Setup:
    """Device, data, network and objective of a run."""

    device: torch.device
    dataset: Dataset
    held_out: Dataset | None
    schedule: NoiseSchedule
    model_config: UNetConfig
    model: UNet
    objective: DiffusionLoss


def set_up(
    config: TrainConfig, model_config: UNetConfig | None, resumed: Path | None, processes: Processes
) -> tuple[Setup, checkpoint.TrainState | None]:
    """All that a run needs before its first step, in each of its processes, and what it continues from, on the CPU.

    Nothing is written.

    Raises ValueError for options that do not fit the data, the model, the processes or the run that is to continue, and
    CheckpointError where its checkpoint cannot be read; in all processes where one of them does.
    """
    pieces_each(config, processes.size)
    device, dtype = processes.all_do(lambda: device_and_dtype(config, processes))
    share_data = processes.first_of_machine_first if downloads(config.dataset) else processes.all_do
    dataset, held_out = share_data(lambda: load_data(config, device))
    if model_config is not None and config.dropout is not None:
        model_config = replace(model_config, dropout=config.dropout)
    train_state = None
    if resumed:
        # every process reads the whole: it takes its part itself, if there are shards
        train_state = processes.all_do(lambda: checkpoint.load_train_state(resumed))
        model_config = check_resume(resumed, train_state[2], config, model_config, dtype)
    model_config = model_config or preset_for(config, dataset)
    schedule = getattr(NoiseSchedule, config.schedule)(num_train_timesteps=config.num_train_timesteps)
    model = new_model(config, model_config, device)
    setup = Setup(
        device=device,
        dataset=dataset,
        held_out=held_out,
        schedule=schedule,
        model_config=model_config,
        model=model,
        objective=objective_for(config, schedule, model, dataset, dtype),
    )
    return setup, train_state


def pieces_each(config: TrainConfig, processes: int) -> int:
    """Into how many pieces each of so many processes cuts its share of a batch; ValueError where that is not even."""
    pieces = max(config.gradient_accumulation_steps, processes)
    if pieces % processes:
        accepted = f"a multiple of the {processes} processes, or less"
        raise ValueError(f"gradient_accumulation_steps must be {accepted}, got {config.gradient_accumulation_steps}")
    if config.batch_size % pieces:
        accepted = f"a multiple of the {processes} processes"
        raise ValueError(f"batch_size must be {accepted}, got {config.batch_size}")
    return pieces // processes


def check_resume(
    resumed: Path, state: dict[str, Any], config: TrainConfig, model_config: UNetConfig | None, dtype: torch.dtype
) -> UNetConfig:
    """The network of the run that is to continue, once all options that decide its weights are the same.

    state: its state.json. dtype: what this run computes in; older checkpoints do not say what "auto" was to theirs.
    """
    free = FREE_ON_RESUME
    if "dtype" in state:
        free = free | {"dtype"}
        before, now = state["dtype"], dtype_name(dtype)
        if now != before:
            got = repr(config.dtype) + (f", here {now}" if config.dtype != now else "")
            raise ValueError(f"dtype must be {before!r} as in the run that resumes from {resumed}, got {got}")
    for name, value in asdict(config).items():
        before = state["options"].get(name, value)
        if name not in free and value != before:
            raise ValueError(f"{name} must be {before!r} as in the run that resumes from {resumed}, got {value!r}")
    stored = UNetConfig.from_dict(checkpoint.load_config(resumed)["model"])
    if model_config not in (None, stored):
        raise ValueError(f"model_config must be that of {resumed}, {stored}, got {model_config}")
    return stored


def dtype_name(dtype: torch.dtype) -> str:
    """As the option spells it."""
    return str(dtype).removeprefix("torch.")


def device_and_dtype(config: TrainConfig, processes: Processes | None = None) -> tuple[torch.device, torch.dtype]:
    """Where the run computes, and what the model is autocast to (float32: not at all).

    Of several processes each gets the GPU of its number on the machine, which becomes its current one.
    """
    device = _own_device(config, processes) if processes and processes.size > 1 else resolve_device(config.device)
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    return device, torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _own_device(config: TrainConfig, processes: Processes) -> torch.device:
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda with several processes, got {config.device!r}")
    device = resolve_device(processes.device_name(config.device))
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if processes.local_rank >= gpus:
            raise ValueError(f"there must be a GPU for each process of a machine, it has {gpus}")
        torch.cuda.set_device(device)
    return device


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
        dropout=preset.dropout if config.dropout is None else config.dropout,
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
