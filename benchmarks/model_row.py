"""How a contender at a workload becomes the figures of a row: checked, timed, profiled, set beside its floors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.contenders import Contender, Task
from benchmarks.equivalence import Oracle
from benchmarks.measurement import Measurement, synchronize
from benchmarks.numerics import Numerics
from benchmarks.suite import Context, Figures, Row
from benchmarks.workloads import MODELS, Workload, initial_noise, random_weights, reference_walk
from fastdiff.flops import count_flops
from fastdiff.profile import profile_calls
from fastdiff.reference_unet import ReferenceUNet

# seconds to compile a model once, roughly: more on a GPU's machine for the larger ones
COMPILE_S = {"tiny": 20.0, "small": 40.0, "cifar10": 60.0, "unet64": 100.0}
# building, checking and profiling a small model
BASE_S = {"cuda": 20.0, "cpu": 10.0}
# operations a second in a U-Net, low guesses by which no row is begun that would not end in time
RATES = {"cuda": {4: 3e13, 2: 1e14}, "cpu": {4: 3e10, 2: 1e10}}
# warm-up, at least three timed ones, and the textbook's few samples
CALLS = 6
# a profile runs a call about eight times over
PROFILE_BELOW_MS = 1500.0


def model_row(section: str, workload: Workload, contender: Contender, device: torch.device) -> Row:
    """A row of the section "unet" (one evaluation) or "sampling" (a whole walk)."""

    def run(context: Context) -> Figures:
        return measure_contender(context, workload, contender, walk=section == "sampling")

    calls = CALLS * (workload.num_steps if section == "sampling" else 1)
    expected = expected_s(workload, device, contender.numerics, compiling=contender.compiling, evaluations=calls)
    return Row(key=f"{section}/{workload.name}/{contender.name}", expected_s=expected, run=run)


def expected_s(
    workload: Workload, device: torch.device, numerics: Numerics, *, compiling: float, evaluations: int
) -> float:
    """Seconds of a row that evaluates the model on the whole batch that often."""
    pixels = (workload.shape[2] / workload.config.sample_size) ** 2
    work = 1e9 * MODELS[workload.model].gflops * workload.batch * pixels * evaluations
    rate = RATES[device.type][numerics.dtype.itemsize]
    return BASE_S[device.type] + compiling * COMPILE_S[workload.model] + work / rate


def measure_contender(context: Context, workload: Workload, contender: Contender, *, walk: bool) -> Figures:
    """Check, time and profile. Raises NotEquivalentError before any time is taken of a contender that is wrong."""
    task = once(context, "task", lambda: make_task(workload, context.device))
    oracle = once(context, "oracle", lambda: oracle_of(task, walk=walk))
    steps = workload.num_steps if walk else 1
    flops = steps * once(context, "flops", lambda: flops_of(workload))
    with contender.numerics.installed(), torch.no_grad(), as_told():
        call = contender.walk(task) if walk else contender.forward(task)
        result, first_s = first_call(call, context.device)
        error, tolerance = oracle.check(ends(result), contender.numerics)
        measured = context.measure(call, images=workload.batch)
        figures = measured_figures(context, contender.numerics, measured, flops, steps * bytes_of(task, contender))
        figures |= {"ms_per_step": measured.median_ms / steps, "error": error, "tolerance": tolerance}
        figures["note"] = contender.title + graph_skips()
        if contender.compiling:
            figures["compile_s"] = max(0.0, first_s - measured.median_ms / 1e3)
        figures |= profile_figures(call, context, measured.median_ms, steps)
    return figures


def make_task(workload: Workload, device: torch.device) -> Task:
    """The workload's weights and noise."""
    weights = random_weights(workload.config)
    return Task(workload=workload, device=device, weights=weights, noise=initial_noise(workload, device))


def ends(samples: Tensor) -> Tensor:
    """The first and the last sample: the textbook draws these two alone, as no sample depends on another."""
    return samples[:: max(1, len(samples) - 1)].float().cpu()


def oracle_of(task: Task, *, walk: bool) -> Oracle:
    """The textbook's first and last sample of a walk, or of one evaluation."""

    @torch.no_grad()
    def textbook(numerics: Numerics) -> Tensor:
        model = ReferenceUNet(task.workload.config)
        model.load_state_dict(task.weights)
        model.to(task.device, numerics.dtype).eval()
        noise, t = (value[:: max(1, len(value) - 1)] for value in (task.noise, task.timesteps))
        if not walk:
            return model(noise.to(numerics.dtype), t)

        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            return model(x.to(numerics.dtype), t).to(x.dtype)

        return reference_walk(evaluate, noise.to(numerics.state_dtype), task.workload.num_steps)

    return Oracle(textbook)


def flops_of(workload: Workload) -> int:
    """Of one evaluation of the whole batch, counted on tensors without data."""
    with torch.device("meta"), torch.no_grad():
        model, x = ReferenceUNet(workload.config).eval(), torch.empty(workload.shape)
        return count_flops(lambda: model(x, torch.empty(workload.batch)))


def bytes_of(task: Task, contender: Contender) -> int:
    """The fewest that one evaluation moves: the weights and the input read, the output written, each once."""
    weights = sum(weight.numel() for weight in task.weights.values())
    return contender.numerics.dtype.itemsize * (weights + 2 * task.noise.numel())


def measured_figures(
    context: Context, numerics: Numerics, measured: Measurement, flops: float, moved: float
) -> Figures:
    """Times, and the share of the ceilings that they reach: of a matrix product's rate and of a copy's."""
    figures: Figures = {**measured.figures(), "flops": flops, "bytes": moved, "tf32": numerics.tf32}  # type: ignore[typeddict-item]
    floors = {"copy": context.ceilings.copy_ms(moved), "matmul": context.ceilings.matmul_ms(flops, numerics.matmul)}
    if floors["copy"] is not None:
        figures |= {"byte_floor_ms": floors["copy"], "of_copy": floors["copy"] / measured.median_ms}
    if floors["matmul"] is not None:
        figures |= {"flop_floor_ms": floors["matmul"], "of_matmul": floors["matmul"] / measured.median_ms}
    return figures


def profile_figures(call: Callable[[], object], context: Context, median_ms: float, steps: int) -> Figures:
    """Kernel classes and launches of a call that is short enough to be profiled; else nothing."""
    if median_ms > PROFILE_BELOW_MS:
        return {}
    profile = profile_calls(call, device=context.device, repeats=1)
    return {
        "classes": {name: round(share.share, 4) for name, share in profile.classes.items()},
        "launches_per_step": profile.launches / steps,
    }


def graph_skips() -> str:
    """What Inductor has not captured in a CUDA graph though its mode says so, as a remark; as_told() counts anew."""
    skips = counters["inductor"]["cudagraph_skips"]
    return f"; {skips} graphs not captured" if skips else ""


def first_call(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What a call gives the first time, and the seconds it takes."""
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - started


@contextmanager
def as_told() -> Iterator[None]:
    """A contender that says it compiles or captures does so or fails; what it compiled is forgotten afterwards."""
    with warnings.catch_warnings():
        for fallback in ("torch.compile failed", "the (training )?step cannot be captured"):
            warnings.filterwarnings("error", message=fallback)
        counters.clear()
        try:
            yield
        finally:
            torch.compiler.reset()


def once(context: Context, key: str, make: Callable[[], Any]) -> Any:
    """From the cache that the rows of a workload share."""
    if key not in context.cache:
        context.cache[key] = make()
    return context.cache[key]
