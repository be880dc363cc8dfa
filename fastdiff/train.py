"""Train a U-Net: uint8 images -> q_sample -> U-Net -> mse (loss and gradient) -> AdamW -> moving average -> checkpoint.

Everything random is a function of (seed, sample index, epoch) and the batch of a step is a function of the step number,
so a resumed run continues bit for bit. The host never waits for the device inside a step: losses stay there until they
are logged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdiff import checkpoint, superres
from fastdiff.data import Dataset
from fastdiff.interruption import Interruption
from fastdiff.loss import DiffusionLoss
from fastdiff.schedule import NoiseSchedule
from fastdiff.superres import SuperresScore
from fastdiff.train_config import TrainConfig
from fastdiff.train_evaluation import EVALUATION_IMAGES, draw_samples, held_out_loss
from fastdiff.train_log import Throughput, TrainLog
from fastdiff.train_setup import (
    check_resume,
    conditions,
    device_and_dtype,
    find_run,
    load_data,
    new_model,
    objective_for,
    preset_for,
)
from fastdiff.train_step import TrainStep, learning_rate
from fastdiff.unet import UNet, UNetConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainResult:
    """model: the averaged weights, in eval mode; checkpoint: the last one; completed: False after an interruption.

    superres: how well a model of task superres restores held-out images. images_per_s: of the steps, without the first
    one, which compiles and allocates. activation_bytes: what a forward pass keeps for its backward pass.
    """

    model: UNet
    checkpoint: Path
    step: int
    held_out_loss: float | None
    completed: bool
    superres: SuperresScore | None = None
    images_per_s: float | None = None
    activation_bytes: int | None = None

    def describe(self) -> str:
        """One sentence on the run."""
        parts = [f"{self.step} steps"]
        if self.held_out_loss is not None:
            parts.append(f"held-out loss {self.held_out_loss:.4f}")
        if self.images_per_s is not None:
            parts.append(f"{self.images_per_s:.0f} images/s")
        if self.activation_bytes is not None:
            parts.append(f"activations {self.activation_bytes / 2**20:.1f} MiB")
        return f"{', '.join(parts)}: {self.checkpoint}"


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
    resumed = find_run(config)
    device, dtype = device_and_dtype(config)
    dataset, held_out = load_data(config, device)
    schedule = getattr(NoiseSchedule, config.schedule)(num_train_timesteps=config.num_train_timesteps)
    if resumed:
        averages, tensors, state = checkpoint.load_train_state(resumed)
        model_config = check_resume(resumed, state["options"], config, model_config)
    model_config = model_config or preset_for(config, dataset)
    model = new_model(config, model_config, device)
    objective = objective_for(config, schedule, model, dataset, dtype)
    train_step = TrainStep(model, objective, dataset, config)
    ema, step, saved, loss = train_step.ema, 0, resumed, None
    if resumed:
        train_step.load_state(averages, tensors)
        step = state["step"]
    # Data, options and model fit: from here on the run leaves traces.
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = TrainLog(output / "log.jsonl", step)
    except OSError as error:
        raise checkpoint.CheckpointError(f"cannot write to output {output}: {error.strerror or error}") from error
    settings = _settings(config, model_config, schedule, dataset, objective)
    bar = tqdm(
        total=config.steps, initial=step, unit=" images", unit_scale=config.batch_size, disable=not config.progress
    )
    throughput, first = Throughput(), step
    with Interruption() as interruption, bar:
        while step < config.steps:
            losses, gradient_norm = train_step(step)
            log.add(losses.mean(), gradient_norm, learning_rate(config, step))
            throughput.add(config.batch_size)
            step += 1
            bar.update()
            if on_step:
                on_step(step, model)

            stopping = step == config.steps or interruption.requested
            checkpointing = stopping or step % config.checkpoint_every == 0
            sampling = bool(config.sample_every) and (step % config.sample_every == 0 or step == config.steps)
            pausing = checkpointing or sampling or step % config.log_every == 0
            if pausing:
                bar.set_postfix(loss=f"{log.flush(saved):.4f}")
                throughput.stop()
            if stopping:
                speed = {"images_per_s": throughput.images_per_s, "activation_bytes": train_step.activation_bytes}
                log.write({"step": step, **speed})
            if checkpointing:
                with train_step.autocast():
                    loss = held_out_loss(objective, ema.model, held_out, conditions(config))
                log.write({"step": step, "held_out_loss": loss})
                saved = checkpoint.save_checkpoint(
                    output / f"step-{step}",
                    weights=ema.model.state_dict(),
                    config={**settings, "step": step, "held_out_loss": loss},
                    train_state=train_step.state(),
                    state={"step": step, "options": asdict(config)},
                )
                checkpoint.prune_checkpoints(output, keep_last=config.keep_last, keep_every=config.keep_every)
                log.plot(output / "loss.png")
            if sampling:
                draw_samples(ema.model, schedule, config, held_out or dataset, output / "samples" / f"step-{step}.png")
            if stopping:
                break
            if pausing or step == first + 1:
                throughput.start()
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
        held_out_loss=loss,
        completed=completed,
        superres=score,
        images_per_s=throughput.images_per_s,
        activation_bytes=train_step.activation_bytes,
    )


def _settings(
    config: TrainConfig,
    model_config: UNetConfig,
    schedule: NoiseSchedule,
    dataset: Dataset,
    objective: DiffusionLoss,
) -> dict[str, Any]:
    """What config.json of a checkpoint says of the run."""
    return {
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
