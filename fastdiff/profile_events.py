"""From the events of torch's profiler to time and launches by class of kernel.

On a GPU the kernels that ran on the device are counted, those of replayed CUDA graphs one by one. On a CPU an operator
counts as a launch if it does the work itself: `aten::conv2d`, `aten::convolution` and `aten::mkldnn_convolution` call
one another, and only the last one is a launch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastdiff.kernel_classes import classify

# The name of the range around a call.
CALL = "fastdiff.profile: one call"

_RUNTIME = ("cuda", "cu", "hip")
_LAUNCH = re.compile(r"^(cuda|cu|hip)(\w*Launch|Memcpy|Memset)")
# A copy that is not asynchronous makes the host wait.
_SYNCHRONISATION = re.compile(r"^(cuda|cu|hip)(\w*Synchronize|Memcpy(2D|3D)?(DtoH|HtoD|DtoD)?(WithStream)?(_v\d+)?$)")
# What a device reports beside kernels, copies and fills.
_NO_WORK = re.compile(r"^(ProfilerStep|(Context|Device|Stream|Event) (Sync|Wait))")
# What runs below one of these is its work.
_OWNERS = ("attention", "optimizer")


@dataclass(frozen=True)
class Event:
    """What the profiler saw: an operator or runtime call on a thread, or with on_device something the GPU ran.

    start_ns, end_ns: nanoseconds of one clock. annotation: a range that somebody named; it is no work.
    """

    name: str
    start_ns: int
    end_ns: int
    thread: int = 0
    on_device: bool = False
    annotation: bool = False

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from start to end."""
        return self.end_ns - self.start_ns


@dataclass
class Total:
    """Nanoseconds and launches, over all calls."""

    ns: int = 0
    launches: int = 0

    def add(self, ns: int, launches: int) -> None:
        """Count something in."""
        self.ns += ns
        self.launches += launches


# By kernel or operator and its class: one operator may work for two classes, as a lerp for the network and the average.
Totals = dict[tuple[str, str], Total]


@dataclass(frozen=True)
class Summary:
    """What ran in the calls, and how often the host launched something and waited for the device."""

    calls: int
    totals: Totals
    host_launches: int
    synchronisations: int


def summarise(events: Iterable[Event], *, on_device: bool) -> Summary:
    """The totals inside the ranges named `CALL`: of device kernels with on_device, otherwise of operators.

    Raises ValueError where no such range is among the events.
    """
    events = list(events)
    calls = [(e.start_ns, e.end_ns) for e in events if e.annotation and e.name == CALL and not e.on_device]
    if not calls:
        raise ValueError(f"events must hold a range named {CALL!r}, got {len(events)} without it")
    work = [event for event in events if not event.annotation]
    # Kernels run later than they are launched: all that the device ran belongs to the calls.
    kernels = [event for event in work if event.on_device and not _NO_WORK.match(event.name)]
    host = [e for e in work if not e.on_device and any(start <= e.start_ns < end for start, end in calls)]
    runtime = [event.name for event in host if event.name.startswith(_RUNTIME)]
    return Summary(
        calls=len(calls),
        totals=_kernel_totals(kernels)
        if on_device
        else _operator_totals(host, sum(end - start for start, end in calls)),
        host_launches=sum(bool(_LAUNCH.match(name)) for name in runtime),
        synchronisations=sum(bool(_SYNCHRONISATION.match(name)) for name in runtime),
    )


def _kernel_totals(kernels: Iterable[Event]) -> Totals:
    totals: Totals = defaultdict(Total)
    for event in kernels:
        totals[event.name, classify(event.name)].add(event.duration_ns, 1)
    return dict(totals)


@dataclass
class _Open:
    """An operator that has begun: its class, or for dispatch the class it works for, and what ran below it so far."""

    event: Event
    kind: str
    works_for: str
    below_ns: int = 0
    launched: set[str] = field(default_factory=set)


def _operator_totals(operators: Iterable[Event], wall_ns: int) -> Totals:
    """Own time of every operator that is a launch; what remains of the wall time is dispatch."""
    totals: Totals = defaultdict(Total)
    stack: list[_Open] = []

    def close() -> None:
        node = stack.pop()
        launch = node.kind not in ("dispatch", "compiled") and node.kind not in node.launched
        if launch or node.kind == "compiled":
            totals[node.event.name, node.kind].add(node.event.duration_ns - node.below_ns, int(launch))
        if stack:
            stack[-1].below_ns += node.event.duration_ns
            stack[-1].launched |= node.launched | ({node.kind} if launch else set())

    for event in sorted(operators, key=lambda e: (e.thread, e.start_ns, -e.end_ns)):
        while stack and (stack[-1].event.thread != event.thread or stack[-1].event.end_ns <= event.start_ns):
            close()
        above = stack[-1].works_for if stack else ""
        kind = _kind_below(classify(event.name), above)
        stack.append(_Open(event, kind, above if kind == "dispatch" else kind))
    while stack:
        close()
    totals["dispatch", "dispatch"].add(max(0, wall_ns - sum(total.ns for total in totals.values())), 0)
    return dict(totals)


def _kind_below(kind: str, above: str) -> str:
    if kind != "dispatch" and above in _OWNERS:
        return above
    # a Python number that an operator makes a tensor of, the zeros or the bias that it starts from
    return "dispatch" if kind == "copy" and above in ("elementwise", "reduction", "matmul") else kind
