"""Train a U-Net: uint8 images -> q_sample -> U-Net -> mse (loss and gradient) -> AdamW -> moving average -> checkpoint.

Everything random is a function of (seed, sample index, epoch) and the batch of a step is a function of the step number,
so a resumed run continues bit for bit. The host never waits for the device inside a step: losses stay there until they
are logged.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff import checkpoint, superres
from fastdiff.compilation import CompiledOrEager
from fastdiff.data import BatchOrder, Dataset, EmptySplitError, load_dataset, random_flip
from fastdiff.device import resolve_device
from fastdiff.ema import EMA
from fastdiff.images import image_grid, save_png, to_uint8
from fastdiff.loss import DiffusionLoss
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.superres import SuperresScore
from fastdiff.train_config import TrainConfig
from fastdiff.train_log import TrainLog
from fastdiff.unet import UNet, UNetConfig
from fastdiff.unet_config import PRESETS

# The held-out loss is measured on at most this many images.
EVALUATION_IMAGES = 2048
# What may differ between a run and its continuation; every other option decides the weights.
FREE_ON_RESUME = {"steps", "data_root", "output", "device", "compile", "progress", "resume"}
FREE_ON_RESUME |= {"log_every", "checkpoint_every", "sample_every"}


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainResult:
    """model: the averaged weights, in eval mode; checkpoint: the last one; completed: False after an interruption.

    superres: how well a model of task superres restores held-out images.
    """

    model: UNet
    checkpoint: Path
    step: int
    held_out_loss: float | None
    completed: bool
    superres: SuperresScore | None = None


def train(
    config: TrainConfig,
    *,
    model_config: UNetConfig | None = None,
    on_step: Callable[[int, UNet], None] | None = None,
) -> TrainResult:
    """Run (or, with config.resume, continue) a training run and write its checkpoints to config.output.

    model_config: the network, if it is none of the presets. on_step(step, model): called after every optimizer step.
    On Ctrl-C or SIGTERM a checkpoint is written and the command that continues the run is printed.

    Raises ValueError for options that do not fit the data, the model or the run that is to continue, CheckpointError
    where checkpoints cannot be read or written, and TrainingDiverged as soon as a NaN is seen.
    """
    output = Path(config.output)
    resumed = _find_run(config)
    device, autocast_dtype = _device_and_dtype(config)
    dataset, held_out = _load_data(config, device)
    schedule = getattr(NoiseSchedule, config.schedule)(num_train_timesteps=config.num_train_timesteps)
    if resumed:
        loaded = checkpoint.load_train_state(resumed)
        model_config = _check_resume(resumed, loaded[2]["options"], config, model_config)
    model_config = model_config or _model_config(config, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UNet(model_config)  # on the CPU: the same initial weights for every device
    model.to(device)
    ema = EMA(model, config.ema_decay)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
    )
    objective = DiffusionLoss(
        schedule=schedule,
        prediction_type=config.prediction_type,
        weighting=config.weighting,
        gamma=config.min_snr_gamma,
        label_dropout=config.label_dropout if dataset.labels is not None else 0.0,
        null_class=model.null_class,
        seed=config.seed,
        dtype=autocast_dtype,
        device=device,
    )
    conditions = _conditions(config)
    order = BatchOrder(config.seed, len(dataset), config.batch_size, device=device)
    start = _restore(loaded, model, ema, optimizer) if resumed else 0
    step, saved, held_out_loss = start, resumed, None
    # Data, options and model fit: from here on the run leaves traces.
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = TrainLog(output / "log.jsonl", start)
    except OSError as error:
        raise checkpoint.CheckpointError(f"cannot write to output {output}: {error.strerror or error}") from error
    settings = {
        "format_version": 1,
        "model": model_config.to_dict(),
        "schedule": schedule.to_config(),
        "prediction_type": config.prediction_type,
        "task": config.task,
        "superres_factor": config.superres_factor if config.task == "superres" else None,
        "dataset": config.dataset,
        "image_shape": list(dataset.image_shape),
        "num_classes": model_config.num_classes,
        "class_names": list(dataset.class_names) if dataset.class_names and dataset.labels is not None else None,
        "label_dropout": objective.label_dropout,
        "seed": config.seed,
        "command": config.command(),
    }

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype != torch.float32)

    network = CompiledOrEager(model) if config.compile else model
    model.train()
    bar = tqdm(
        total=config.steps, initial=start, unit=" images", unit_scale=config.batch_size, disable=not config.progress
    )
    with _Interruption() as interruption, bar:
        while step < config.steps:
            learning_rate = _learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if model_config.dropout:
                # nn.Dropout draws from torch's generator: reseeding it by the step keeps a resumed run exact.
                torch.manual_seed(config.seed + step)
            indices, epochs = order.batch(step)
            pieces = config.gradient_accumulation_steps
            losses = []
            for part_indices, part_epochs in zip(indices.chunk(pieces), epochs.chunk(pieces)):
                images, labels = dataset.batch(part_indices)
                if config.horizontal_flip:
                    images = random_flip(images, seed=config.seed, sample_indices=part_indices, epochs=part_epochs)
                with autocast():
                    loss, prediction, gradient = objective(
                        network,
                        images,
                        labels,
                        part_indices,
                        part_epochs,
                        condition=conditions(images),
                        grad_scale=1 / config.batch_size,
                    )
                prediction.backward(gradient=gradient)
                losses.append(loss)
            gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model, step)
            log.add(torch.cat(losses).mean(), gradient_norm, learning_rate)
            step += 1
            bar.update()
            if on_step:
                on_step(step, model)

            stopping = step == config.steps or interruption.requested
            checkpointing = stopping or step % config.checkpoint_every == 0
            if checkpointing or step % config.log_every == 0:
                bar.set_postfix(loss=f"{log.flush(saved):.4f}")
            if checkpointing:
                with autocast():
                    held_out_loss = _held_out_loss(objective, ema.model, held_out, conditions)
                log.write({"step": step, "held_out_loss": held_out_loss})
                saved = checkpoint.save_checkpoint(
                    output / f"step-{step}",
                    weights=ema.model.state_dict(),
                    config={**settings, "step": step, "held_out_loss": held_out_loss},
                    train_state=_training_tensors(model, optimizer),
                    state={"step": step, "options": asdict(config)},
                )
                log.plot(output / "loss.png")
            if config.sample_every and (step % config.sample_every == 0 or step == config.steps):
                _draw_samples(ema.model, schedule, config, held_out or dataset, output / "samples" / f"step-{step}.png")
            if stopping:
                break
    completed = step >= config.steps
    if not completed:
        print(f"stopped after step {step}; continue with: {config.command()} --resume")
    assert saved is not None  # a run that does no step is a resumed one
    score = None
    if completed and config.task == "superres" and held_out is not None:
        images = held_out.images[:EVALUATION_IMAGES]
        score = superres.evaluate(ema.model, schedule, config.prediction_type, images, config.superres_factor)
        log.write({"step": step, "superres": asdict(score)})
    return TrainResult(
        model=ema.model,
        checkpoint=saved,
        step=step,
        held_out_loss=held_out_loss,
        completed=completed,
        superres=score,
    )


def _find_run(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from, None for a new run."""
    output = Path(config.output)
    latest = checkpoint.latest_checkpoint(output)
    if config.resume and latest is None:
        raise checkpoint.CheckpointError(f"output {output} has no undamaged checkpoint to resume from")
    if latest and not config.resume:
        raise ValueError(f"output {output} already holds a run: resume it or choose another folder")
    return latest


def _check_resume(
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


def _device_and_dtype(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Where the run computes, and what the model is autocast to (float32: not at all)."""
    device = resolve_device(config.device)
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    return device, torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _load_data(config: TrainConfig, device: torch.device) -> tuple[Dataset, Dataset | None]:
    def load(split: str) -> Dataset:
        dataset = load_dataset(config.dataset, split=split, image_size=config.image_size, root=config.data_root)
        labelled = config.class_conditional and config.task == "generate"
        return dataset.to(device) if labelled else replace(dataset, labels=None).to(device)

    dataset = load("train")
    try:
        return dataset, load("held_out")
    except EmptySplitError:
        return dataset, None


def _model_config(config: TrainConfig, dataset: Dataset) -> UNetConfig:
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


def _conditions(config: TrainConfig) -> Callable[[Tensor], Tensor | None]:
    """What the model is shown of a batch of images, besides their noisy selves and labels."""
    if config.task == "generate":
        return lambda images: None
    return lambda images: superres.condition(images, config.superres_factor)


def _learning_rate(config: TrainConfig, step: int) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _restore(loaded: checkpoint.TrainState, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Take over weights, averages and optimizer state; returns the number of steps done."""
    averages, tensors, state = loaded
    ema.model.load_state_dict(averages)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"optimizer.{key}.{name}"]
            # The fused step walks all its arguments by the strides of the parameter.
            like = parameter.detach() if key != "step" else value.to(parameter.device)
            optimizer.state[parameter][key] = torch.empty_like(like).copy_(value)
    return state["step"]


def _held_out_loss(
    objective: DiffusionLoss,
    model: UNet,
    held_out: Dataset | None,
    conditions: Callable[[Tensor], Tensor | None],
) -> float | None:
    if held_out is None:
        return None
    labels = None if held_out.labels is None else held_out.labels[:EVALUATION_IMAGES]
    images = held_out.images[:EVALUATION_IMAGES]
    return objective.evaluate(model, images, labels, condition=conditions(images)).item()


class _Interruption:
    """While entered, the first SIGINT or SIGTERM asks the loop to stop after its step; a second one acts as usual."""

    def __enter__(self) -> _Interruption:
        self.requested = False
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()


def _draw_samples(model: UNet, schedule: NoiseSchedule, config: TrainConfig, dataset: Dataset, path: Path) -> None:
    """Four rows of samples with the averaged weights, the classes side by side; the same noise every time.

    For super-resolution: rows of what the model is shown, of what it makes of it, and of the images themselves.
    """
    num_classes = model.config.num_classes
    columns = min(num_classes or 8, 10)
    kwargs = {}
    if config.task == "superres":
        originals = dataset.images[:columns]
        kwargs["condition"] = superres.condition(originals, config.superres_factor)
    if num_classes is not None:
        kwargs["class_labels"] = torch.arange(4 * columns, device=dataset.images.device) % columns
    sampler = Sampler(
        model,
        schedule,
        solver="dpmpp_2m",
        num_inference_steps=min(25, config.num_train_timesteps),
        prediction_type=config.prediction_type,
        cuda_graph=False,
    )
    rows = 1 if config.task == "superres" else 4
    count = rows * columns if rows > 1 else len(kwargs["condition"])
    images = to_uint8(sampler.sample((count, *dataset.image_shape), seed=config.seed, model_kwargs=kwargs))
    if config.task == "superres":
        images = torch.cat([to_uint8(kwargs["condition"]), images, originals])
        columns = count
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image_grid(images, columns), path, scale=max(1, 64 // dataset.image_shape[-1]))
