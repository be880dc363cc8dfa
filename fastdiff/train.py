"""Train a U-Net: uint8 images -> q_sample -> U-Net -> mse (loss and gradient) -> AdamW -> moving average -> checkpoint.

Everything random is a function of (seed, sample index, epoch) and the batch of a step is a function of the step number,
so a resumed run continues bit for bit. The host never waits for the device inside a step: losses stay there until they
are logged.

Under torchrun the processes share each batch; the first one prints and writes, and what goes wrong there is raised in
all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fastdiff.determinism import deterministic
from fastdiff.interruption import Interruption
from fastdiff.processes import Processes, StopTogether, launch_command
from fastdiff.superres import SuperresScore
from fastdiff.train_config import TrainConfig
from fastdiff.train_folder import RunFolder
from fastdiff.train_log import PendingLosses, Throughput
from fastdiff.train_output import RunOutput
from fastdiff.train_setup import Setup, set_up
from fastdiff.train_step import TrainStep
from fastdiff.train_update import learning_rate
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

    model_config: the network, if it is none of the presets. on_step(step, model): called after every optimizer step;
    the model is in shards with fsdp. On Ctrl-C, SIGTERM or SIGUSR1 a checkpoint is written and the command that
    continues the run is printed. Under torchrun every process calls it, with the same arguments.

    Raises ValueError for options that do not fit the data, the model, the processes or the run that is to continue, and
    for an output folder that holds something else or that another run writes to; CheckpointError where checkpoints
    cannot be read or written, OSError where the log cannot, torch.OutOfMemoryError where the batch has to be cut finer,
    and TrainingDiverged, at the next line of the log, after a NaN.
    """
    on_step = on_step or (lambda step, model: None)
    with (
        Processes.of_environment(training=True) as processes,
        deterministic(config.deterministic),
        RunFolder(config) as folder,
    ):
        return _train(config, model_config, on_step, processes, folder)


def _before_first_step(
    config: TrainConfig, model_config: UNetConfig | None, resumed: Path | None, processes: Processes
) -> tuple[Setup, TrainStep, int]:
    """Also how many steps are done. What was read of a checkpoint is freed on return."""
    setup, train_state = set_up(config, model_config, resumed, processes)
    train_step = TrainStep(setup.model, setup.objective, setup.dataset, config, processes)
    if train_state is None:
        return setup, train_step, 0
    averages, tensors, state = train_state
    train_step.load_state(averages, tensors)
    return setup, train_step, state["step"]


def _train(
    config: TrainConfig,
    model_config: UNetConfig | None,
    on_step: Callable[[int, UNet], None],
    processes: Processes,
    folder: RunFolder,
) -> TrainResult:
    saved = processes.first_does(folder.find_run)
    setup, train_step, step = _before_first_step(config, model_config, saved, processes)
    loss: float | None = None
    # Data, options and model fit: from here on the run leaves traces.
    output = RunOutput(config, setup, folder)
    processes.first_does(output.open, step)
    bar = tqdm(
        total=config.steps,
        initial=step,
        unit=" images",
        unit_scale=config.batch_size,
        disable=not (config.progress and processes.first),
    )
    pending, throughput, first = PendingLosses(step, config.batch_size, processes), Throughput(), step
    stop_together = StopTogether(processes)
    with Interruption() as interruption, bar:
        while step < config.steps:
            losses, gradient_norm = train_step(step)
            pending.add(losses, gradient_norm, learning_rate(config, step))
            throughput.add(config.batch_size)
            step += 1
            bar.update()
            on_step(step, setup.model)

            stopping = stop_together(interruption.requested) or step == config.steps
            checkpointing = stopping or step % config.checkpoint_every == 0
            sampling = bool(config.sample_every) and (step % config.sample_every == 0 or step == config.steps)
            pausing = checkpointing or sampling or step % config.log_every == 0
            if pausing:
                mean = processes.first_does(output.write_losses, pending.read(), saved)
                bar.set_postfix(loss=f"{mean:.4f}")
                throughput.stop()
            if stopping:
                speed = {"images_per_s": throughput.images_per_s, "activation_bytes": train_step.activation_bytes}
                processes.first_does(output.write, {"step": step, **speed})
            if checkpointing:
                model, state = train_step.averages(keep=processes.first), train_step.whole_state(keep=processes.first)
                saved, loss = processes.first_does(output.save, step, model, state)
            if sampling:
                processes.first_does(output.draw, step, train_step.averages(keep=processes.first))
            if stopping:
                break
            if pausing or step == first + 1:
                throughput.start()
        stop_together.settle()
    completed = step >= config.steps
    if not completed and processes.first:
        print(f"stopped after step {step}; continue with: {launch_command(config.command())} --resume")
    assert saved is not None  # a run that does no step is a resumed one
    model = train_step.averages()
    assert model is not None
    return TrainResult(
        model=model,
        checkpoint=saved,
        step=step,
        held_out_loss=loss,
        completed=completed,
        superres=processes.first_does(output.score, step, model) if completed else None,
        images_per_s=throughput.images_per_s,
        activation_bytes=train_step.activation_bytes,
    )
