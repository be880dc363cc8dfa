"""How long a call takes: repeated calls, all samples kept, medians with the 10th and 90th percentile.

Between the calls a fixed piece of work, the probe, is timed: two runs whose probes differ were made on a machine in two
states, which `benchmarks.compare` takes into account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MIN_REPEATS, MAX_REPEATS, MAX_TURNS = 5, 500, 100
# a call longer than the whole budget is repeated this often all the same
MIN_REPEATS_OF_LONG_CALLS = 3
WARM_UP_SHARE = 0.25
MAX_WARM_UPS = 10
PROBE_SHARE, PROBES_IN_ROW = 0.1, 10
PROBE_SIZE, PROBE_BYTES = {"cuda": 4096, "cpu": 256}, {"cuda": 64 * 2**20, "cpu": 2 * 2**20}
# more than the largest L2 cache (126 MB); filling it also keeps the device busy while the host enqueues the call
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of successive calls.

    Attributes:
        samples_ms: milliseconds of each, in their order.
        probe_ms: of the probe, in between.
        waited: seconds that threads of this process were kept from running by others, for each second of measuring;
            None where the system does not tell.
        images: made by a call, None where the word means nothing.
        peak_memory_mib: the most that PyTorch had reserved on a GPU during the calls, the pools of CUDA graphs
            included; None on a CPU.
    """

    samples_ms: Sequence[float]
    probe_ms: Sequence[float] = ()
    waited: float | None = None
    images: int | None = None
    peak_memory_mib: float | None = None

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    def figures(self) -> dict[str, Any]:
        """The entries of `benchmarks.suite.Figures` that follow from the samples."""
        low, high = np.percentile(self.samples_ms, [10, 90])
        figures: dict[str, Any] = {
            "ms": self.median_ms,
            "low_ms": float(low),
            "high_ms": float(high),
            "samples_ms": [float(f"{sample:.5g}") for sample in self.samples_ms],
        }
        if self.probe_ms:
            figures["probe_ms"] = [float(f"{sample:.5g}") for sample in self.probe_ms]
        if self.waited is not None:
            figures["waited"] = round(self.waited, 5)
        if self.images is not None:
            figures["images_per_s"] = 1e3 * self.images / self.median_ms
        if self.peak_memory_mib is not None:
            figures["peak_memory_mib"] = self.peak_memory_mib
        return figures


class Probe:
    """A matrix product and a copy: always the same work, for what a device can do at the moment.

    Attributes:
        memory_mib: what its tensors take.
    """

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        dtype = torch.bfloat16 if kind == "cuda" else torch.float32
        self._a, self._b = (torch.randn(PROBE_SIZE[kind], PROBE_SIZE[kind], device=device).to(dtype) for _ in range(2))
        self._product = torch.empty_like(self._a)
        self._source = torch.randn(PROBE_BYTES[kind] // 4, device=device)
        self._copy = torch.empty_like(self._source)
        tensors = self._a, self._b, self._product, self._source, self._copy
        self.memory_mib = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20

    def __call__(self) -> None:
        torch.mm(self._a, self._b, out=self._product)
        self._copy.copy_(self._source)


class _Waited:
    """What the scheduler kept this process's threads waiting for a processor, since it was made."""

    def __init__(self) -> None:
        self._waited, self._started = self._seconds(), time.perf_counter()

    @staticmethod
    def _seconds() -> float | None:
        # Linux: nanoseconds run, nanoseconds waited, slices
        files = list(Path("/proc/self/task").glob("*/schedstat"))
        if not files:
            return None
        try:
            return sum(int(file.read_text().split()[1]) for file in files) / 1e9
        except (OSError, IndexError, ValueError):
            return None

    def share(self) -> float | None:
        """For each second since it was made."""
        now = self._seconds()
        if now is None or self._waited is None:
            return None
        # a thread that has ended took its count with it
        return max(0.0, now - self._waited) / (time.perf_counter() - self._started)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> float:
    """Milliseconds of one call, host work included: the device is idle when it begins and again when it ends."""
    if before is not None:
        before()
    synchronize(device)
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    return _between_events(call)


def _warm_up(once: Callable[[], float], seconds: float) -> None:
    started = time.perf_counter()
    for _ in range(MAX_WARM_UPS):
        once()
        if time.perf_counter() - started > WARM_UP_SHARE * seconds:
            break


def _enough(repeats: int, most: int, started: float, seconds: float) -> bool:
    spent = time.perf_counter() - started
    least = MIN_REPEATS_OF_LONG_CALLS if spent > 2 * seconds else MIN_REPEATS
    return repeats >= most or (repeats >= least and spent >= seconds)


def measure(
    call: Callable[[], object],
    device: torch.device,
    *,
    seconds: float,
    before: Callable[[], object] | None = None,
    images: int | None = None,
    probe: Probe | None = None,
) -> Measurement:
    """Time a call again and again for about `seconds`, after a warm-up.

    `before` runs ahead of each call and outside its time. On CUDA events around the call measure it, with
    synchronisation before and after, so the host's part of it counts. The probe takes a tenth of the time.
    """

    def once() -> float:
        return time_once(call, device, before)

    _warm_up(once, seconds)
    if probe is not None:
        time_once(probe, device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        # what compiling and autotuning left behind is not the call's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        once()
    samples: list[float] = []
    probes: list[float] = []
    total = probed = 0.0
    waited = _Waited()
    started = time.perf_counter()
    while not _enough(len(samples), MAX_REPEATS, started, seconds):
        samples.append(once())
        total += samples[-1]
        for _ in range(PROBES_IN_ROW if probe is not None else 0):
            if probed > PROBE_SHARE * total:
                break
            probes.append(time_once(probe, device))  # type: ignore[arg-type]
            probed += probes[-1]
    share = waited.share()
    peak = None
    if on_gpu:
        peak = torch.cuda.max_memory_reserved(device) / 2**20 - (probe.memory_mib if probe is not None else 0.0)
    return Measurement(samples_ms=samples, probe_ms=probes, waited=share, images=images, peak_memory_mib=peak)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    divide: int = 1,
    probe: Probe | None = None,
) -> dict[str, Measurement]:
    """Time several short calls in turns, so that what drifts meets all alike; `seconds` for each of them.

    Before each call of a GPU its L2 cache is flushed. The flush is still running while the host enqueues the call, so
    the host's part of a short call does not count. The order of the turns alternates, the probe has one of them.
    Samples are divided by `divide`, the number of equal pieces of work in a call.
    """
    flush = _flusher(device)
    everything: dict[str, Callable[[], object]] = dict(calls) if probe is None else {**calls, "probe": probe}
    for call in everything.values():
        _warm_up(lambda call=call: time_once(call, device, flush), seconds)  # type: ignore[misc]
    samples: dict[str, list[float]] = {name: [] for name in everything}
    waited = _Waited()
    started, turns = time.perf_counter(), 0
    while not _enough(turns, MAX_TURNS, started, seconds * len(calls)):
        for name in list(everything) if turns % 2 else reversed(everything):
            samples[name].append(_time_behind(flush, everything[name], device))
        turns += 1
    share = waited.share()
    probes = samples["probe"] if probe is not None else []
    return {
        name: Measurement(samples_ms=[sample / divide for sample in samples[name]], probe_ms=probes, waited=share)
        for name in calls
    }


def _flusher(device: torch.device) -> Callable[[], object] | None:
    if device.type != "cuda":
        return None
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_


def _time_behind(flush: Callable[[], object] | None, call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call that is enqueued behind the flush, without a pause of the device between the two."""
    if flush is None:
        return time_once(call, device)
    synchronize(device)
    flush()
    return _between_events(call)


def _between_events(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
