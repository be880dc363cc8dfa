"""Rows of latent diffusion in the section "sampling"."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.contenders import require
from benchmarks.equivalence import Oracle
from benchmarks.latent_contenders import LatentContender, latent_contenders
from benchmarks.model_row import (
    BASE_S,
    as_told,
    ends,
    first_call,
    graph_skips,
    measured_figures,
    once,
    profile_figures,
)
from benchmarks.numerics import Numerics
from benchmarks.suite import Context, Figures, Row
from fastdiff.flops import count_flops

if TYPE_CHECKING:
    # imports diffusers, which may be missing where the rows are only listed
    from benchmarks.latent_pipeline import LatentTask

COMPILE_S = {"sd15": 120.0, "sd-tiny": 40.0}
# of a walk, all steps being alike
PROFILED_STEPS = 2
# a walk in float32, several times over
FLOAT32_S = {"sd15": 60.0, "sd-tiny": 0.0}


def latent_rows(model: str, batch: int, device: torch.device) -> list[Row]:
    """The contenders at a batch of a model of `benchmarks.latent_pipeline.LATENT_MODELS`, in the order of priority.

    Those in float32 at batch 1 only: a larger one takes minutes and tells nothing new.
    """
    compared = [one for one in latent_contenders(device) if batch == 1 or one.numerics.dtype != torch.float32]
    return [latent_row(model, batch, contender, device) for contender in compared]


def latent_row(model: str, batch: int, contender: LatentContender, device: torch.device) -> Row:
    """A contender at a batch."""

    def run(context: Context) -> Figures:
        return measure_latent(context, model, batch, contender)

    expected = BASE_S[device.type] + contender.compiling * COMPILE_S[model]
    if contender.numerics.dtype == torch.float32:
        expected += FLOAT32_S[model]
    return Row(key=f"sampling/{model}-b{batch}/{contender.name}", expected_s=expected, run=run)


def measure_latent(context: Context, model: str, batch: int, contender: LatentContender) -> Figures:
    """Check, time and profile, as `benchmarks.model_row.measure_contender` does.

    On a GPU what is expected is diffusers' own pipeline in float32: in float64 a walk of the large model would take
    minutes. So that pipeline's row has no error of its own.
    """
    require("diffusers")
    from benchmarks.latent_pipeline import LatentTask

    task = LatentTask(model=model, batch=batch, device=context.device)
    exact = torch.float32 if context.device.type == "cuda" else torch.float64
    oracle = once(context, "oracle", lambda: oracle_of(task, exact=exact))
    flops, weights = once(context, "flops", lambda: flops_and_weights(task))
    steps, numerics = task.spec.steps, contender.numerics
    with numerics.installed(), torch.no_grad(), as_told():
        walk = contender.walk(task)

        def call() -> Tensor:
            return walk(steps)

        result, first_s = first_call(call, context.device)
        checked = None if numerics.dtype == exact else oracle.check(ends(result), numerics)
        measured = context.measure(call, images=batch)
        moved = steps * numerics.dtype.itemsize * (weights + 4 * result.numel())
        figures = measured_figures(context, numerics, measured, steps * flops, moved)
        figures |= {"ms_per_step": measured.median_ms / steps, "note": contender.title + graph_skips()}
        if checked is not None:
            figures |= {"error": checked[0], "tolerance": checked[1]}
        if contender.compiling:
            figures["compile_s"] = max(0.0, first_s - measured.median_ms / 1e3)
        part = measured.median_ms * PROFILED_STEPS / steps
        figures |= profile_figures(lambda: walk(PROFILED_STEPS), context, part, PROFILED_STEPS)
    return figures


def oracle_of(task: LatentTask, *, exact: torch.dtype) -> Oracle:
    """Diffusers' pipeline as it comes, on the first and the last sample."""
    few = replace(task, only_ends=True)

    def textbook(numerics: Numerics) -> Tensor:
        return LatentContender(name="textbook", title="textbook", numerics=numerics).walk(few)(task.spec.steps)

    return Oracle(textbook, exact=exact)


def flops_and_weights(task: LatentTask) -> tuple[int, int]:
    """Of one evaluation with guidance: floating-point operations, counted on tensors without data, and weights."""
    with torch.no_grad():
        empty = replace(task, device=torch.device("meta"))
        unet = empty.unet(torch.float32)
        latents, embeddings = empty.inputs(torch.float32)
        t = torch.zeros((), device="meta")
        flops = count_flops(lambda: unet(torch.cat([latents, latents]), t, encoder_hidden_states=embeddings))
    return flops, sum(weight.numel() for weight in unet.parameters())
