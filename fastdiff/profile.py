"""Where the time of a call goes: by class of kernel, with launches, waits of the host and memory.

`fastdiff profile` and the benchmarks use it. A call is warmed up (compilation, graph capture, first allocations), then
timed without the profiler, and only then profiled.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastdiff.profile_events import CALL, Event, Summary, summarise

# A larger trace is compressed; Perfetto opens both.
COMPRESS_ABOVE_BYTES = 2**22


@dataclass(frozen=True)
class ClassShare:
    """Per call: ms of work, its share of all work, and launches."""

    ms: float
    share: float
    launches: float


@dataclass(frozen=True)
class KernelShare(ClassShare):
    """The same of one kernel or operator, and its class."""

    name: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a call costs. All figures are per call.

    ms: wall time without the profiler, median. busy_ms: sum over the classes: on a GPU the time of all kernels, on a
        CPU the wall time under the profiler, which is longer than `ms`.
    classes: by `fastdiff.kernel_classes.CLASSES`, largest first; kernels: the same by name.
    launches: on a GPU kernels, copies and fills that ran on the device, also out of replayed CUDA graphs; on a CPU
        operators that do work.
    host_launches: what the host launched, a graph being one; 0 on a CPU.
    synchronisations: how often the host waited for the device, blocking copies included; 0 on a CPU.
    peak_memory_bytes: most that torch had allocated on the GPU, weights included; None on a CPU.
    reserved_memory_bytes: most that it had taken from the driver, where CUDA graphs' memory shows; None on a CPU.
    working_memory_bytes: most that was allocated beyond what there was before the call.
    """

    ms: float
    busy_ms: float
    classes: dict[str, ClassShare]
    kernels: tuple[KernelShare, ...]
    launches: float
    host_launches: float
    synchronisations: float
    peak_memory_bytes: int | None
    reserved_memory_bytes: int | None
    working_memory_bytes: int
    repeats: int


def profile_calls(
    call: Callable[[], object],
    *,
    device: torch.device | str,
    repeats: int = 3,
    warmup: int = 2,
    trace: Path | None = None,
) -> Profile:
    """Run `call` `warmup` times unseen, time it `repeats` times, then profile it as often; two more runs in between.

    device: where it computes. trace: a file for Perfetto or chrome://tracing; ".gz" is added to a large one.
    Raises ValueError for repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    device = torch.device(device)
    if not torch.cuda.is_available():
        # torch's collector reports that as an error whenever it starts
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for _ in range(warmup):
        call()
    samples = [_seconds(call, device) for _ in range(repeats)]
    allocated, reserved, working = _memory(call, device)
    with _profiler(device, repeats) as profiler:
        for _ in range(1 + repeats):
            with record_function(CALL):
                call()
            _synchronise(device)
            profiler.step()
    if trace is not None:
        _write_trace(profiler, trace)
    summary = summarise(_events(profiler), on_device=device.type == "cuda")
    classes, kernels = _shares(summary)
    return Profile(
        ms=1000 * statistics.median(samples),
        busy_ms=sum(share.ms for share in classes.values()),
        classes=classes,
        kernels=kernels,
        launches=sum(share.launches for share in classes.values()),
        host_launches=summary.host_launches / summary.calls,
        synchronisations=summary.synchronisations / summary.calls,
        peak_memory_bytes=allocated,
        reserved_memory_bytes=reserved,
        working_memory_bytes=working,
        repeats=repeats,
    )


@contextlib.contextmanager
def named_cpu_kernels() -> Iterator[None]:
    """What Inductor compiles for a CPU meanwhile shows in a profile by name; otherwise it is one lump, "compiled"."""
    import torch._inductor.config as inductor

    with inductor.patch("cpp.enable_kernel_profile", True):
        yield


def _profiler(device: torch.device, calls: int) -> profile:
    """Watches `calls` calls after a first one, in which the profiler itself warms up."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    steps = schedule(wait=0, warmup=1, active=calls, repeat=1)
    return profile(activities=activities, schedule=steps, acc_events=True)


def _events(profiler: profile) -> list[Event]:
    return [
        Event(
            name=event.name(),
            start_ns=event.start_ns(),
            end_ns=event.end_ns(),
            thread=event.start_thread_id(),
            on_device=event.device_type() == DeviceType.CUDA,
            annotation=event.is_user_annotation() or event.name() == CALL,
        )
        for event in _raw_events(profiler)
        if not event.is_hidden_event()
    ]


def _raw_events(profiler: profile) -> list[Any]:
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.events()


def _shares(summary: Summary) -> tuple[dict[str, ClassShare], tuple[KernelShare, ...]]:
    whole = sum(total.ns for total in summary.totals.values()) or 1
    scale = 1e-6 / summary.calls
    kernels = [
        KernelShare(scale * total.ns, total.ns / whole, total.launches / summary.calls, name, kind)
        for (name, kind), total in summary.totals.items()
    ]
    by_class: dict[str, list[KernelShare]] = defaultdict(list)
    for kernel in kernels:
        by_class[kernel.kind].append(kernel)
    classes = {
        kind: ClassShare(sum(k.ms for k in of), sum(k.share for k in of), sum(k.launches for k in of))
        for kind, of in by_class.items()
    }
    return (
        dict(sorted(classes.items(), key=lambda item: -item[1].ms)),
        tuple(sorted(kernels, key=lambda kernel: -kernel.ms)),
    )


def _memory(call: Callable[[], object], device: torch.device) -> tuple[int | None, int | None, int]:
    """Peak allocated, peak reserved (None on a CPU), and peak beyond what there was before."""
    if device.type == "cuda":
        _synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _synchronise(device)
        peak = torch.cuda.max_memory_allocated(device)
        return peak, torch.cuda.max_memory_reserved(device), peak - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    changes = [(e.start_ns(), e.nbytes()) for e in _raw_events(profiler) if e.name() == "[memory]"]
    allocated = peak = 0
    for _, size in sorted(changes):
        allocated += size
        peak = max(peak, allocated)
    return None, None, peak


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write_trace(profiler: profile, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if path.stat().st_size <= COMPRESS_ABOVE_BYTES:
        return path
    compressed = path.with_name(path.name + ".gz")
    with path.open("rb") as plain, gzip.open(compressed, "wb", compresslevel=6) as packed:
        shutil.copyfileobj(plain, packed)
    path.unlink()
    return compressed
