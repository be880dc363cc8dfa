"""What a row of the benchmark suite is, and what it is given: the interface between the runner and the rows.

A module of rows offers `rows(device, *, quick) -> list[Row]`, which builds nothing. Rows whose keys differ only in
their last part ("sampling/cifar10-b1/fastdiff") are the contenders of one workload and share the context's cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from benchmarks.ceilings import Ceilings
from benchmarks.measurement import Measurement, Probe, measure

SECTIONS = ("kernels", "unet", "sampling", "training")
# the contender that every ratio has on one side
OURS = "fastdiff"
SECONDS, QUICK_SECONDS = 3.0, 0.3


class Figures(TypedDict, total=False):
    """What a row reports, as it is stored. A figure that was not measured is left out.

    section, workload, contender: what the tables are ordered by.
    ms, low_ms, high_ms, samples_ms: median, 10th and 90th percentile and all times of a call, in milliseconds.
    probe_ms: times of the probe in between (`benchmarks.measurement.Probe`). waited: share of the time that
        other processes kept this one from running.
    error, tolerance: largest absolute difference from the reference relative to its largest value; what was accepted.
    flops, bytes: of a call. of_copy, of_matmul: shares of the measured ceilings that it reached.
    flop_floor_ms, byte_floor_ms, issue_floor_ms: what a call takes at least at those ceilings.
    launches_per_step: kernels launched for a step of the sampler or the optimizer.
    classes: share of each kernel class (`fastdiff.kernel_classes`) in the device's time.
    tf32: whether float32 products may be rounded to it. skipped: why nothing was measured.
    """

    section: str
    workload: str
    contender: str
    ms: float
    low_ms: float
    high_ms: float
    samples_ms: list[float]
    probe_ms: list[float]
    waited: float
    images_per_s: float
    ms_per_step: float
    error: float
    tolerance: float
    compile_s: float
    peak_memory_mib: float
    activation_memory_mib: float
    launches_per_step: float
    flops: float
    bytes: float
    of_copy: float
    of_matmul: float
    flop_floor_ms: float
    byte_floor_ms: float
    issue_floor_ms: float
    bytes_per_element: float
    instructions_per_element: float
    classes: dict[str, float]
    tf32: bool
    note: str
    skipped: str


class Skip(Exception):
    """Raised by a row that cannot run here; the message is the reason. It is tried again by the next run."""


@dataclass
class Context:
    """What a row works with.

    Attributes:
        device: where it runs.
        quick: a look instead of a measurement.
        ceilings: of this device, measured by this process.
        remaining_s: seconds left of the budget.
        probe: what is timed between the calls, None for nothing.
        cache: whatever the rows of a workload share (models, reference outputs); emptied when the workload changes.
    """

    device: torch.device
    quick: bool
    ceilings: Ceilings
    remaining_s: Callable[[], float]
    probe: Probe | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """What measuring one contender may take, warm-up and calls longer than this aside."""
        return QUICK_SECONDS if self.quick else SECONDS

    def measure(
        self, call: Callable[[], object], *, before: Callable[[], object] | None = None, images: int | None = None
    ) -> Measurement:
        """Time a call (`benchmarks.measurement.measure`); `Measurement.figures()` are a row's figures."""
        return measure(call, self.device, seconds=self.seconds, before=before, images=images, probe=self.probe)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one workload.

    Attributes:
        key: unique and stable, "section/workload/contender" of [a-z0-9.-]; the last part is "fastdiff" in the row that
            the others of the workload are compared with.
        expected_s: seconds it takes, roughly, compiling included.
        run: measures it. May raise: that is recorded as a failure, `Skip` as skipped.
    """

    key: str
    expected_s: float
    run: Callable[[Context], Figures]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9.-]+(/[a-z0-9.-]+){2,}", self.key):
            raise ValueError(f"key must be section/workload/contender of [a-z0-9.-], got {self.key!r}")
        if self.section not in SECTIONS:
            raise ValueError(f"key must begin with one of {', '.join(SECTIONS)}, got {self.key!r}")

    @property
    def section(self) -> str:
        return self.key.split("/")[0]

    @property
    def workload(self) -> str:
        """Key without the contender."""
        return self.key.rsplit("/", 1)[0]

    @property
    def is_ours(self) -> bool:
        """True for the row that the other contenders of its workload are compared with."""
        return self.key.rsplit("/", 1)[1] == OURS
