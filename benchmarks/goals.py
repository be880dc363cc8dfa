"""The speed goals as data, and whether a report reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from benchmarks import store
from benchmarks.suite import OURS

Record = dict[str, Any]

# a row that other processes kept waiting for a larger share of its time is no quiet measurement
DISTURBED = 0.05
# diffusers as fast as it goes: the fastest of these that was measured
DIFFUSERS_BEST = ("diffusers-best", "diffusers-reduce-overhead", "diffusers-default")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound for one figure of our row of some workloads.

    Attributes:
        device: "cuda" or "cpu".
        workloads: pattern (fnmatch) of keys without the contender.
        figure: "ratio": the fastest peer's time over ours; "times_floor": our time over the larger floor; or a figure.
        peers: contenders, for a ratio.
        at_least, at_most: the bound, one of the two.
        where: only workloads whose row of ours has this (figure, value).
        without: pattern of workloads that are left out.
    """

    device: str
    workloads: str
    figure: str
    peers: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    where: tuple[str, float] | None = None
    without: str = ""

    @property
    def text(self) -> str:
        """The goal in words."""
        if self.figure == "ratio":
            return f">= {self.at_least:g}x {' or '.join(self.peers[:1])}"
        bound = f">= {self.at_least:.0%}" if self.at_least is not None else f"<= {self.at_most:g}"
        words = {
            "ms": f"{bound} ms",
            "of_copy": f"{bound} of the copy rate",
            "times_floor": f"{bound}x the larger floor",
        }
        return words[self.figure]


def _cuda(workloads: str, figure: str, **rest: Any) -> Goal:
    return Goal(device="cuda", workloads=workloads, figure=figure, **rest)


ELEMENTWISE, NORM = "kernels/*", "kernels/group-norm-*"
NORM_FORWARD = "kernels/group-norm-silu-forward-*-b256-bf16"
ONE_PASS, TWO_PASSES = ("bytes_per_element", 4.0), ("bytes_per_element", 6.0)
GOALS = (
    _cuda(ELEMENTWISE, "times_floor", at_most=1.15, without=NORM),
    _cuda("kernels/q-sample-fp32", "of_copy", at_least=0.75),
    _cuda("kernels/q-sample-bf16", "of_copy", at_least=0.40),
    _cuda("kernels/q-sample-????", "ratio", peers=("eager",), at_least=3.0),
    _cuda("kernels/q-sample-????", "ratio", peers=("compiled",), at_least=1.5),
    _cuda("kernels/q-sample-????-noise-given", "of_copy", at_least=0.90),
    _cuda("kernels/p-sample-????-model", "of_copy", at_least=0.85),
    _cuda("kernels/p-sample-????-model", "ratio", peers=("eager",), at_least=5.0),
    _cuda("kernels/p-sample-????-model", "ratio", peers=("compiled",), at_least=1.2),
    _cuda(NORM_FORWARD, "of_copy", at_least=0.85, where=ONE_PASS),
    _cuda(NORM_FORWARD, "of_copy", at_least=0.90, where=TWO_PASSES),
    _cuda(NORM_FORWARD, "ratio", peers=("compiled",), at_least=1.5),
    _cuda("sampling/cifar10-b1", "ratio", peers=("textbook-fp32",), at_least=15.0),
    _cuda("sampling/cifar10-b1", "ratio", peers=DIFFUSERS_BEST, at_least=1.4),
    _cuda("sampling/cifar10-b1", "ms", at_most=20.0),
    _cuda("sampling/cifar10-b256", "ratio", peers=("textbook-fp32",), at_least=8.0),
    _cuda("sampling/cifar10-b256", "ratio", peers=DIFFUSERS_BEST, at_least=1.25),
    _cuda("sampling/sd15-b1", "ratio", peers=DIFFUSERS_BEST, at_least=1.3),
    _cuda("sampling/sd15-b8", "ratio", peers=DIFFUSERS_BEST, at_least=1.15),
    _cuda("training/cifar10-*", "ratio", peers=("textbook-fp32",), at_least=6.0),
    _cuda("training/cifar10-*", "ratio", peers=DIFFUSERS_BEST, at_least=1.2),
    _cuda("training/unet64-*", "ratio", peers=("textbook-fp32",), at_least=6.0),
    _cuda("training/unet64-*", "ratio", peers=DIFFUSERS_BEST, at_least=1.2),
    Goal(device="cpu", workloads="sampling/small-b8", figure="ratio", peers=("diffusers",), at_least=1.3),
    Goal(device="cpu", workloads="sampling/small-b8", figure="ratio", peers=DIFFUSERS_BEST, at_least=1.0),
    Goal(device="cpu", workloads="training/small-*", figure="ratio", peers=("diffusers",), at_least=1.1),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a goal at one workload.

    Attributes:
        status: "met" | "missed" | "not measured".
        peer: whom a ratio was taken with.
        bound: the ratio if nothing but the peer's convolutions, products and attention took time; None if not known.
        reason: why it was not measured, or what speaks against the figure.
    """

    workload: str
    goal: Goal
    status: str
    value: float | None = None
    peer: str | None = None
    bound: float | None = None
    reason: str = ""


def evaluate(report: store.Report, goals: tuple[Goal, ...] = GOALS) -> list[Verdict]:
    """Every goal of the report's device at every workload that it speaks of."""
    device = "cpu" if report["device"] == "cpu" else "cuda"
    verdicts: list[Verdict] = []
    for goal in goals:
        if goal.device == device:
            verdicts += _verdicts(report, goal)
    return verdicts


def _verdicts(report: store.Report, goal: Goal) -> Iterator[Verdict]:
    names = list(dict.fromkeys(key.rsplit("/", 1)[0] for key in report["rows"]))
    names = [name for name in names if fnmatch(name, goal.workloads) and not fnmatch(name, goal.without)]
    names = [name for name in names if _applies(report, goal, name)]
    if not names:
        yield Verdict(workload=goal.workloads, goal=goal, status="not measured", reason="no such row")
    for name in names:
        yield _verdict(report, goal, name)


def _applies(report: store.Report, goal: Goal, workload: str) -> bool:
    ours = store.newest(report, f"{workload}/{OURS}", status="done")
    return goal.where is None or ours is None or ours.get(goal.where[0]) == goal.where[1]


def _bound(theirs: Record) -> float | None:
    classes = theirs.get("classes")
    if not classes:
        return None
    shared = sum(classes.get(name, 0.0) for name in ("convolution", "matmul", "attention"))
    return 1 / shared if shared else None


def _verdict(report: store.Report, goal: Goal, workload: str) -> Verdict:
    if report["quick"]:
        return Verdict(workload=workload, goal=goal, status="not measured", reason="a quick look")
    ours = store.newest(report, f"{workload}/{OURS}", status="done")
    if ours is None:
        return _not_measured(report, goal, workload, OURS)
    peer = bound = theirs = None
    if goal.figure == "ratio":
        pair = fastest_pair(report, workload, goal.peers)
        if pair is None:
            return _not_measured(report, goal, workload, goal.peers[0])
        peer, theirs, ours = pair
        value = theirs["ms"] / ours["ms"]
        bound = _bound(theirs) if peer in DIFFUSERS_BEST else None
    elif goal.figure == "times_floor":
        floor = larger_floor(ours)
        if floor is None:
            return Verdict(workload=workload, goal=goal, status="not measured", reason="no floor by instructions")
        value = ours["ms"] / floor
    else:
        value = ours[goal.figure]
    met = value >= goal.at_least if goal.at_least is not None else value <= (goal.at_most or 0.0)
    waited = max(record.get("waited") or 0.0 for record in (ours, theirs or {}))
    return Verdict(
        workload=workload,
        goal=goal,
        status="met" if met else "missed",
        value=value,
        peer=peer,
        bound=bound,
        reason=f"others had the processor for {waited:.0%} of the time" if waited > DISTURBED else "",
    )


def _not_measured(report: store.Report, goal: Goal, workload: str, contender: str) -> Verdict:
    record = store.newest(report, f"{workload}/{contender}")
    if record is None:
        reason = f"no row of {contender}"
    elif record["status"] == "done":
        reason = f"{contender} was not measured in one run with {OURS}"
    else:
        reason = f"{contender} {record['status']}: {record['reason']}"
    return Verdict(workload=workload, goal=goal, status="not measured", reason=reason)


def larger_floor(record: Record) -> float | None:
    """Milliseconds by bytes or by instructions, whichever is more; None unless both are known."""
    floors = [record.get(name) for name in ("byte_floor_ms", "issue_floor_ms")]
    return None if None in floors else max(floors)  # type: ignore[type-var]


def pair_of(report: store.Report, workload: str, contender: str) -> tuple[Record, Record] | None:
    """The newest records of a contender and of ours that one process made: (theirs, ours)."""
    for theirs in reversed(report["rows"].get(f"{workload}/{contender}", [])):
        ours = store.newest(report, f"{workload}/{OURS}", status="done", run=theirs["run"])
        if theirs["status"] == "done" and ours is not None:
            return theirs, ours
    return None


def fastest_pair(report: store.Report, workload: str, contenders: tuple[str, ...]) -> tuple[str, Record, Record] | None:
    """(contender, its record, ours) of the one that comes nearest to ours, or passes it."""
    found = [(name, pair_of(report, workload, name)) for name in contenders]
    pairs = [(name, *pair) for name, pair in found if pair is not None]
    return min(pairs, key=lambda pair: pair[1]["ms"] / pair[2]["ms"], default=None)
