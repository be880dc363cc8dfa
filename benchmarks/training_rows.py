"""Rows of the section "training": one optimizer step, moving average included."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.equivalence import Oracle, relative_distance
from benchmarks.model_row import (
    CALLS,
    as_told,
    expected_s,
    first_call,
    flops_of,
    graph_skips,
    measured_figures,
    once,
    profile_figures,
)
from benchmarks.numerics import Numerics
from benchmarks.sampling_rows import GOAL_SIDES
from benchmarks.suite import Context, Figures, Row
from benchmarks.training_contenders import CHECKED_STEPS, TextbookTrainer, Trainer, Training, trainers
from benchmarks.training_task import TrainingTask
from benchmarks.workloads import Workload

# the gradient of a product is two products of its size
PASSES = 3
# of float32 tensors as large as the weights: gradient written and read, weight and two moments read and written, weight
# read for the average, average read and written
OPTIMIZER_PASSES = 11


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """In the order of priority."""
    if quick:
        return [Workload(model="tiny", batch=4)]
    if device.type != "cuda":
        return [Workload(model="small", batch=8)]
    sizes = (("cifar10", 128), ("unet64", 32), ("cifar10", 16))
    return [Workload(model=model, batch=batch) for model, batch in sizes]


def rows(device: torch.device, *, quick: bool) -> list[Row]:
    """In the order of priority: all trainers at the first workload, both sides of the goals at the others."""
    first, *others = workloads(device, quick=quick)
    sides = [trainer for trainer in trainers(device) if trainer.name in GOAL_SIDES]
    return [
        *(training_row(first, trainer, device) for trainer in trainers(device)),
        *(training_row(workload, trainer, device) for workload in others for trainer in sides),
    ]


def training_row(workload: Workload, trainer: Trainer, device: torch.device) -> Row:
    """A trainer at a workload."""

    def run(context: Context) -> Figures:
        return measure_trainer(context, workload, trainer)

    evaluations = PASSES * (CALLS + 2 * CHECKED_STEPS)
    expected = expected_s(workload, device, trainer.numerics, compiling=trainer.compiling, evaluations=evaluations)
    return Row(key=f"training/{workload.name}/{trainer.name}", expected_s=expected, run=run)


def measure_trainer(context: Context, workload: Workload, trainer: Trainer) -> Figures:
    """Check, time and profile. Raises NotEquivalentError before any time is taken of a trainer that is wrong."""
    task = once(context, "task", lambda: TrainingTask.of(workload, context.device))
    oracle = once(context, "oracle", lambda: oracle_of(task))
    flops = PASSES * once(context, "flops", lambda: flops_of(workload))
    moved = OPTIMIZER_PASSES * 4 * sum(weight.numel() for weight in task.weights.values())
    with trainer.numerics.installed(), as_told():
        training = trainer.begin(task)
        update, first_s = first_call(lambda: update_of(training, task), context.device)
        error, tolerance = oracle.check(update, trainer.numerics)
        step = steps_of(training)
        measured = context.measure(step, images=workload.batch)
        figures = measured_figures(context, trainer.numerics, measured, flops, moved)
        figures |= {"ms_per_step": measured.median_ms, "error": error, "tolerance": tolerance}
        figures["note"] = trainer.title + graph_skips()
        if trainer.compiling:
            figures["compile_s"] = max(0.0, first_s - CHECKED_STEPS * measured.median_ms / 1e3)
        if training.activation_bytes is not None:
            figures["activation_memory_mib"] = training.activation_bytes / 2**20
        figures |= profile_figures(step, context, measured.median_ms, 1)
    return figures


def steps_of(training: Training) -> Callable[[], None]:
    """Advances by a step a call, from where the check has left it."""
    numbers = itertools.count(CHECKED_STEPS)
    return lambda: training.advance(next(numbers))


def update_of(training: Training, task: TrainingTask) -> Tensor:
    """What the checked steps change, in float64 on the CPU: the weights' differences, then those of their average."""
    for step in range(CHECKED_STEPS):
        training.advance(step)
    return torch.cat(
        [
            (weights[name].detach().cpu().double() - before).flatten()
            for weights in training.weights()
            for name, before in sorted(task.weights.items())
        ]
    )


def oracle_of(task: TrainingTask) -> Oracle:
    """The textbook's update, by |difference| / |update|.

    AdamW divides each gradient by its own size, so that rounding turns those around that are nearly zero: the share of
    the update that they make is what bf16 loses here, and the textbook's in bf16 tells how much that is.
    """

    def textbook(numerics: Numerics) -> Tensor:
        trainer = TextbookTrainer(name="textbook", title="textbook", numerics=numerics)
        return update_of(trainer.begin(task), task)

    return Oracle(textbook, distance=relative_distance)
