"""Tells a real change between two result files from noise, row by row.

Successive samples of a run are no independent draws: clocks drift, neighbours come and go, and two runs differ by more
than either varies within itself. So the unit is a block of successive samples:

1. A run is cut into at most `BLOCKS` blocks. A block's time is the logarithm of its lower decile: what disturbs a call
   only ever makes it slower, and where a neighbour comes and goes the quiet calls alone say the same in every run.
2. A run's time is the median of its blocks' times. Its standard error comes from their spread (median absolute
   deviation) and grows with the correlation of neighbouring blocks, which is what drift looks like from within.
3. Two runs differ by something that neither shows within itself. It is the larger the more a run's calls differ among
   themselves, and `LEVEL` of the distance from their decile to their median stands for it, `DRIFT` for what is left.
   The probe, always the same work, tells what the machine has become in between. What other processes took from the
   run (`waited`) may be in its times or not.
4. A change is real if it is larger than all of these: `LEAST`, `ERRORS` standard errors, `MARGIN` times the change of
   the probe, and what waiting may have added to both. If a change of `WANTED` would not be, if the probe itself has
   changed by that, or a run waited for more than `MOST_WAITED` of its time, the row is too noisy to tell.

A median absolute deviation of few blocks is itself uncertain; `_widening` makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import store

BLOCKS, LEAST_IN_BLOCK, DECILE = 20, 4, 10
LEAST, WANTED = 0.03, 0.05
ERRORS, DRIFT, LEVEL, MARGIN = 3.5, 0.004, 0.25, 1.0
MOST_CORRELATION, MOST_WAITED = 0.9, 0.1
# of a normal distribution: standard deviation over median absolute deviation, and error of a median over a mean's
MAD_TO_DEVIATION, MEDIAN_LOSS = 1.4826, 1.2533


@dataclass(frozen=True)
class Located:
    """The logarithm of a run's time and its standard error."""

    log_ms: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """A row in two files.

    Attributes:
        ratio: time after over time before.
        least: smallest change, relative, that could be told from noise.
        verdict: "slower" | "faster" | "same" | "too noisy".
    """

    key: str
    before_ms: float
    after_ms: float
    ratio: float
    least: float
    verdict: str


def blocks(samples_ms: Sequence[float]) -> np.ndarray:
    """Logarithms of the lower deciles of successive blocks."""
    count = max(1, min(BLOCKS, len(samples_ms) // LEAST_IN_BLOCK))
    if count < 3:  # few, long calls: each is its own block
        return np.log(np.asarray(samples_ms, float))
    return np.array([np.log(np.percentile(block, DECILE)) for block in np.array_split(np.asarray(samples_ms), count)])


def locate(samples_ms: Sequence[float]) -> Located:
    """Raises ValueError for fewer than three samples: they have no spread."""
    if len(samples_ms) < 3:
        raise ValueError(f"a comparison needs at least 3 samples a row, got {len(samples_ms)}")
    times = blocks(samples_ms)
    centre = float(np.median(times))
    spread = MAD_TO_DEVIATION * float(np.median(np.abs(times - centre)))
    correlation = _correlation(times)
    effective = len(times) * (1 - correlation) / (1 + correlation)
    error = _widening(len(times)) * MEDIAN_LOSS * spread / math.sqrt(max(effective, 1.0))
    decile, median = np.percentile(samples_ms, [DECILE, 50])
    return Located(centre, math.hypot(error, LEVEL * math.log(median / decile), DRIFT))


def _correlation(times: np.ndarray) -> float:
    """Of neighbouring blocks by their ranks, within [0, MOST_CORRELATION]; its bias for few blocks is made up for."""
    if len(times) < 6:
        return 0.0
    ranks = times.argsort().argsort() - (len(times) - 1) / 2
    raw = float((ranks[1:] * ranks[:-1]).sum() / (ranks**2).sum())
    return min(max(raw + 1 / len(times), 0.0), MOST_CORRELATION)


def _widening(count: int) -> float:
    """How much wider an interval by a spread of `count` values must be than by the true spread."""
    return 1 + 4 / count


def judge(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    """Compare two records of one row: their samples_ms in the order they were taken, probe_ms and waited if known."""
    runs = [locate(record["samples_ms"]) for record in (before, after)]
    difference = runs[1].log_ms - runs[0].log_ms
    machine = _machine_change(before, after)
    least = max(
        math.log1p(LEAST),
        ERRORS * math.hypot(runs[0].error, runs[1].error),
        MARGIN * machine,
        _waiting(before) + _waiting(after),
    )
    waited = max(record.get("waited") or 0.0 for record in (before, after))
    disturbed = waited > MOST_WAITED or machine > math.log1p(WANTED)
    if abs(difference) > least and not disturbed:
        verdict = "slower" if difference > 0 else "faster"
    else:
        verdict = "too noisy" if disturbed or least > math.log1p(WANTED) else "same"
    return Change(
        key=key,
        before_ms=math.exp(runs[0].log_ms),
        after_ms=math.exp(runs[1].log_ms),
        ratio=math.exp(difference),
        least=math.expm1(least),
        verdict=verdict,
    )


def _machine_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """How much faster or slower the probe was, as the absolute logarithm; 0 where it was not timed."""
    probes = [record.get("probe_ms") or () for record in (before, after)]
    if min(map(len, probes)) < 3:
        return 0.0
    return abs(math.log(np.median(probes[1]) / np.median(probes[0])))


def _waiting(record: Mapping[str, Any]) -> float:
    """By how much waiting may have lengthened a run, as a logarithm: a share of 0.5 is twice the time."""
    return -math.log1p(-min(record.get("waited") or 0.0, 0.99))


def compare(before: store.Report, after: store.Report) -> list[Change]:
    """The rows that both reports have measured, in the order of the first. Raises ValueError where there are none."""
    changes = []
    for key in before["rows"]:
        records = [store.newest(report, key, status="done") for report in (before, after)]
        timed = [record for record in records if record is not None and "samples_ms" in record]
        if len(timed) == 2:
            changes.append(judge(key, *timed))
    if not changes:
        raise ValueError("the two files have no measured row in common")
    return changes


def describe(changes: Sequence[Change]) -> str:
    """A line a row, and how many of each verdict."""
    width = max(len(change.key) for change in changes)
    lines = [
        f"{change.key:<{width}}  {change.before_ms:10.4g} -> {change.after_ms:10.4g} ms  {change.ratio - 1:+7.1%}  "
        f"{change.verdict} (least change that shows: {change.least:.1%})"
        for change in changes
    ]
    verdicts = [change.verdict for change in changes]
    counts = (f"{verdicts.count(name)} {name}" for name in ("slower", "faster", "same", "too noisy"))
    return "\n".join([*lines, ", ".join(counts)])
