"""The report as pictures: bars against the peers, the roofline, and the curves of series."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.page import done, workloads_of
from benchmarks.series import AXES, series_of
from benchmarks.suite import OURS, SECTIONS

DPI, COLUMNS = 100, 3
# of one colour family each: ours, then everybody else
OUR_COLOUR, THEIR_COLOUR = "#1f6fb4", "#b8bec6"


def draw(report: store.Report, path: Path) -> list[Path]:
    """Write the pictures that the report has data for: `path` (a .png) and others named after it. Needs matplotlib."""
    pictures = {"": _bars, "_roofline": _roofline, "_scaling": _scaling}
    written = []
    for suffix, picture in pictures.items():
        target = path.with_name(f"{path.stem}{suffix}.png")
        if picture(report, target):
            written.append(target)
    return written


@contextmanager
def _figure(path: Path, panels: int, height: float) -> Iterator[list[Any]]:
    """As many panels, in rows of up to COLUMNS, saved at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[panels:]:
        unused.set_visible(False)
    yield list(axes[:panels])
    figure.savefig(path, dpi=DPI)


def _bars(report: store.Report, path: Path) -> bool:
    """Milliseconds of every contender, a panel for each workload that has any to compare."""
    panels = [
        (name, records)
        for section in SECTIONS
        for name in workloads_of(report, section)
        if len(records := done(report, name)) > 1 and OURS in records
    ]
    # kernels have a table; pictures of forty of them show nothing
    models = [panel for panel in panels if not panel[0].startswith("kernels/")] or panels[:6]
    if not models:
        return False
    with _figure(path, len(models), 3.0) as axes:
        for axis, (name, records) in zip(axes, models):
            # the levers of the ablation have a table of their own
            peers = {contender: record for contender, record in records.items() if not contender.startswith("ablation")}
            order = sorted(peers.items(), key=lambda item: -item[1]["ms"])
            colours = [OUR_COLOUR if contender == OURS else THEIR_COLOUR for contender, _ in order]
            medians = [record["ms"] for _, record in order]
            errors = [
                [record["ms"] - record["low_ms"] for _, record in order],
                [record["high_ms"] - record["ms"] for _, record in order],
            ]
            bars = axis.barh([contender for contender, _ in order], medians, xerr=errors, color=colours, ecolor="#666")
            axis.bar_label(
                bars,
                labels=[f"{value:.3g}" if value < 1e3 else f"{value:,.0f}" for value in medians],
                padding=4,
                fontsize=8,
            )
            axis.margins(x=0.25)
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("ms (median, 10th to 90th percentile)", fontsize=8)
            axis.tick_params(labelsize=8)
    return True


def _roofline(report: store.Report, path: Path) -> bool:
    """Operations per second over operations per byte, below the ceilings that were measured with them."""
    points = [
        (record["flops"] / record["bytes"], record["flops"] / record["ms"] / 1e9, key)
        for key in report["rows"]
        if (record := store.newest(report, key, status="done")) and record.get("flops") and record.get("bytes")
    ]
    if not points:
        return False
    ceilings = report["runs"][list(report["runs"])[-1]]["ceilings"]
    intensities = [point[0] for point in points]
    with _figure(path, 1, 4.5) as (axis,):
        copied = ceilings["copy_bytes_per_s"]
        bends = {dtype: rate / copied for dtype, rate in ceilings["matmul_flops_per_s"].items()}
        low, high = min([*intensities, *bends.values()]) / 4, max([*intensities, *bends.values()]) * 4
        for dtype, bend in bends.items():
            heights = [min(bend, x) * copied / 1e12 for x in (low, bend, high)]
            axis.plot([low, bend, high], heights, linewidth=1, label=f"copy and {dtype} products")
        for ours, colour, label in ((True, OUR_COLOUR, "fastdiff"), (False, THEIR_COLOUR, "peers")):
            chosen = [point for point in points if point[2].endswith(f"/{OURS}") == ours]
            axis.scatter([x for x, _, _ in chosen], [y for _, y, _ in chosen], s=18, color=colour, label=label)
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("operations per byte that must be moved", fontsize=9)
        axis.set_ylabel("TFLOP/s", fontsize=9)
        axis.legend(fontsize=7)
    return True


def _scaling(report: store.Report, path: Path) -> bool:
    """A panel for each set of curves."""
    groups = [(key, list(curves)) for key, curves in groupby(series_of(report), key=lambda one: (one.title, one.axis))]
    if not groups:
        return False
    with _figure(path, len(groups), 3.4) as axes:
        for axis, ((title, along), curves) in zip(axes, groups):
            for curve in curves:
                x, y = zip(*curve.points)
                width = 2 if curve.contender == OURS else 1
                axis.plot(x, y, marker="o", markersize=3, linewidth=width, label=curve.contender)
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(sorted({x for curve in curves for x, _ in curve.points}), minor=False)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(along, fontsize=8)
            axis.set_ylabel(AXES[along].figure_title, fontsize=8)
            axis.legend(fontsize=7)
    return True
