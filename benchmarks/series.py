"""Curves of a report: one figure over the batch, the resolution or the number of steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks import store
from benchmarks.suite import OURS


class Axis(NamedTuple):
    """A suffix of workload names ("-b16") and what is shown over it."""

    mark: str
    figure: str
    figure_title: str


AXES = {
    "batch": Axis("b", "images_per_s", "images/s"),
    "steps": Axis("s", "ms", "ms"),
    "resolution": Axis("r", "ms_per_step", "ms per step"),
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """A contender's points (x, figure) along an axis; title: section and what stays fixed."""

    title: str
    axis: str
    contender: str
    points: list[tuple[int, float]]


def series_of(report: store.Report) -> list[Series]:
    """Every curve of at least two points, ours first. The point without the suffix, the model's own size, has none."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for key in report["rows"]:
        record = store.newest(report, key, status="done")
        if record is None or key.startswith("kernels/"):
            continue
        workload, contender = key.rsplit("/", 1)
        for name, axis in AXES.items():
            match = re.fullmatch(rf"(.+?)-{axis.mark}(\d+)(-.+)?", workload)
            if match and axis.figure in record:
                fixed = f"{match[1]}{match[3] or ''}"
                found.setdefault((fixed, name, contender), []).append((int(match[2]), record[axis.figure]))
    curves = [
        Series(title=fixed, axis=axis, contender=contender, points=sorted(points))
        for (fixed, axis, contender), points in found.items()
        if len(points) > 1
    ]
    return sorted(curves, key=lambda one: (one.title, one.axis, one.contender != OURS, one.contender))
