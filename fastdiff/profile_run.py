"""`fastdiff profile`: the sampling loop and the training step as they run elsewhere, profiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoint import Checkpoint, load_model
from fastdiff.device import resolve_device
from fastdiff.environment import device_name
from fastdiff.flops import count_flops, matmul_rate
from fastdiff.generate import Draw, find_checkpoint, prepare
from fastdiff.profile import named_cpu_kernels, profile_calls
from fastdiff.profile_config import ProfileSampleConfig, ProfileTrainConfig
from fastdiff.profile_report import Report
from fastdiff.schedule import NoiseSchedule
from fastdiff.train_config import TrainConfig
from fastdiff.train_setup import device_and_dtype, load_data, new_model, objective_for, preset_for
from fastdiff.train_step import TrainStep
from fastdiff.unet import UNet

TRACE = "trace.json"


def profile_sampling(config: ProfileSampleConfig) -> Report:
    """Profile whole walks of one batch; writes the trace, profile.json and profile.md to config.out.

    Raises ValueError naming the option that does not fit, CheckpointError for a checkpoint that is missing or damaged,
    and OSError where the folder cannot be written to.
    """
    device = resolve_device(config.device)
    if config.model:
        loaded = _untrained(config.model, device)
    else:
        loaded = load_model(_directory(config), device=device, weights=config.weights)
    draw = prepare(config, loaded, device, num=config.batch_size, input=config.input)
    folder = _folder(config.out)
    images = config.batch_size if draw.condition is None else len(draw.condition)
    indices = torch.arange(images)
    on_device, model_kwargs = indices.to(device), draw.model_kwargs(indices, device)

    def walk(draw: Draw) -> None:
        draw.sampler.sample((images, *draw.shape), sample_indices=on_device, model_kwargs=model_kwargs)

    eager = prepare(
        replace(config, compile=False), loaded, device, num=config.batch_size, input=config.input, cuda_graph=False
    )
    flops = _flops(lambda: walk(eager))
    with _kernels_by_name(config.compile):
        profile = profile_calls(
            lambda: walk(draw), device=device, repeats=config.repeats, warmup=1, trace=folder / TRACE
        )
    source = config.model or _directory(config).name
    guided = "" if draw.guidance_scale is None else f", guidance {draw.guidance_scale}"
    report = Report(
        title=f"Sampling {images} images {_shape(draw.shape)} with {source}: {config.solver},"
        f" {len(draw.sampler.table)} steps{guided}, {config.dtype}{', compiled' if config.compile else ''}",
        device=device_name(device),
        images=images,
        steps=len(draw.sampler.table),
        parameters=_parameters(loaded.model),
        profile=profile,
        flops=flops,
        **_ceiling(device, getattr(torch, config.dtype)),
    )
    report.write(folder)
    return report


def profile_training(config: ProfileTrainConfig) -> Report:
    """Profile training steps; writes the trace, profile.json and profile.md to config.out, and no checkpoint.

    Raises ValueError for options that do not fit the data or the model, and OSError where the folder cannot be written
    to.
    """
    training = config.training()
    device, dtype = device_and_dtype(training)
    dataset, _ = load_data(training, device)
    schedule = getattr(NoiseSchedule, config.schedule)(num_train_timesteps=config.num_train_timesteps)
    model_config = preset_for(training, dataset)
    folder = _folder(config.out)

    def new_step(options: TrainConfig) -> TrainStep:
        model = new_model(options, model_config, device)
        return TrainStep(model, objective_for(options, schedule, model, dataset, dtype), dataset, options)

    def one_eager_step() -> None:
        new_step(replace(training, compile=False, cuda_graph=False))(0)

    flops = _flops(one_eager_step)
    step, numbers = new_step(training), itertools.count()
    with _kernels_by_name(config.compile):
        profile = profile_calls(
            lambda: step(next(numbers)), device=device, repeats=config.steps, warmup=2, trace=folder / TRACE
        )
    report = Report(
        title=f"Training {config.model} on {config.dataset} {_shape(dataset.image_shape)}: batch {config.batch_size},"
        f" {str(dtype).removeprefix('torch.')}{', compiled' if config.compile else ''}",
        device=device_name(device),
        images=config.batch_size,
        steps=1,
        parameters=_parameters(step.model),
        profile=profile,
        flops=flops,
        activation_bytes=step.activation_bytes,
        **_ceiling(device, dtype),
    )
    report.write(folder)
    return report


def _flops(call: Callable[[], None]) -> int:
    flops = count_flops(call)
    if torch.cuda.is_available():
        # what the eager call had reserved would count as memory of the profiled one
        torch.cuda.empty_cache()
    return flops


def _folder(path: Path) -> Path:
    """The folder, made; a place that cannot be written to is found out before the work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # of an earlier profile, which may have been larger
        for old in (path / TRACE, path / f"{TRACE}.gz"):
            old.unlink(missing_ok=True)
        (path / TRACE).touch()
    except OSError as error:
        raise OSError(f"cannot write to out {path}: {error.strerror or error}") from error
    return path


def _directory(config: ProfileSampleConfig) -> Path:
    return find_checkpoint(config.checkpoint)


def _untrained(preset: str, device: torch.device) -> Checkpoint:
    """Random weights. Those that start at zero too: a GPU multiplies zeros faster."""
    torch.manual_seed(0)
    model = UNet.preset(preset)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    schedule = NoiseSchedule.cosine()
    return Checkpoint(model=model.to(device).eval(), schedule=schedule, prediction_type="v_prediction", config={})


def _kernels_by_name(compiles: bool) -> contextlib.AbstractContextManager[None]:
    return named_cpu_kernels() if compiles else contextlib.nullcontext()


def _ceiling(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    name = "TF32" if tf32 else str(dtype).removeprefix("torch.")
    return {"matmul_flops_per_s": matmul_rate(device, dtype), "matmul_dtype": name}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
