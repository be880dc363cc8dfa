"""The report as a Markdown page. A figure that was not measured is a dash, a row that failed says why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from benchmarks import store
from benchmarks.ablation import CHAIN, CPU_CHAIN
from benchmarks.goals import DISTURBED, evaluate, pair_of
from benchmarks.series import AXES, series_of
from benchmarks.suite import OURS, SECTIONS

MISSING = "–"
Record = dict[str, Any]


def page(report: store.Report, plots: Iterable[str] = ()) -> str:
    """Everything that is in a report; plots: names of the picture files beside it."""
    parts = [_head(report), _runs(report), _goals(report)]
    parts += [f"![{name}]({name})" for name in plots]
    for section in SECTIONS:
        workloads = workloads_of(report, section)
        if workloads:
            parts.append(f"## {section.capitalize()}")
            parts += [_kernels(report, workloads)] if section == "kernels" else _models(report, workloads)
    parts += [_scaling(report), _failures(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(titles: list[str], lines: Iterable[list[str]]) -> str:
    """Markdown; empty without lines."""
    lines = list(lines)
    if not lines:
        return ""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def show(value: float | None, form: str = ".4g", unit: str = "") -> str:
    """A figure, or a dash for none."""
    return MISSING if value is None else f"{value:{form}}{unit}"


def workloads_of(report: store.Report, section: str) -> list[str]:
    """Keys without their contenders, in the order of their rows."""
    names = (key.rsplit("/", 1)[0] for key in report["rows"] if key.startswith(f"{section}/"))
    return list(dict.fromkeys(names))


def done(report: store.Report, workload: str) -> dict[str, Record]:
    """The newest figures of each contender that was measured."""
    found = {
        key.rsplit("/", 1)[1]: store.newest(report, key, status="done")
        for key in report["rows"]
        if key.rsplit("/", 1)[0] == workload
    }
    return {name: record for name, record in found.items() if record is not None}


def times(report: store.Report, workload: str, contender: str) -> str:
    """How many times as long as ours it takes; only rows of one process are set against each other."""
    if contender == OURS:
        return "1"
    pair = pair_of(report, workload, contender)
    return MISSING if pair is None else f"{pair[0]['ms'] / pair[1]['ms']:.2f}"


def _head(report: store.Report) -> str:
    note = " A quick look: tiny workloads, no measurement." if report["quick"] else ""
    if report["device"] == "cpu":
        note += " All contenders ran in a process that keeps its freed memory (`fastdiff.host_memory`)."
    return (
        f"# Speed on {report['device']}, {report['date']}\n\n"
        "Medians, with the 10th and 90th percentile; compile time apart. Times are set against fastdiff's of the same "
        f"process only; {MISSING} stands for what was not measured, * for a row that other processes kept waiting for "
        f"more than {DISTURBED:.0%} of its time.{note}"
    )


def _runs(report: store.Report) -> str:
    lines = []
    for name, run in report["runs"].items():
        versions, ceilings = run["environment"], run["ceilings"]
        gpus = ", ".join(gpu["name"] for gpu in versions.get("gpus", []))
        hardware = (
            gpus if report["device"] != "cpu" else f"{versions.get('cpu')}, {versions.get('torch_threads')} threads"
        )
        products = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in ceilings["matmul_flops_per_s"].items())
        issued = ceilings.get("instructions_per_s")
        lines.append(
            [
                f"{name}: `{run['command']}`",
                f"{run['started']}, commit {run['commit'] or 'unknown'}",
                f"{hardware}; torch {versions.get('torch')}, triton {versions.get('triton')}, "
                f"CUDA {versions.get('cuda')}, diffusers {versions.get('packages', {}).get('diffusers')}",
                f"{ceilings['copy_bytes_per_s'] / 1e9:.4g}",
                products,
                show(issued and issued / 1e12),
            ]
        )
    titles = ["run", "when", "on", "copy, GB/s read and written", "matmul, TFLOP/s", "lane instructions issued, T/s"]
    return "## Runs and their ceilings\n\n" + table(titles, lines)


def _goals(report: store.Report) -> str:
    lines = []
    for verdict in evaluate(report):
        ratio = verdict.goal.figure in ("ratio", "times_floor")
        value = show(verdict.value, ".2f", "x") if ratio else show(verdict.value, ".3g")
        if verdict.goal.figure == "of_copy":
            value = show(verdict.value, ".0%")
        against = f" ({verdict.peer})" if verdict.peer else ""
        status = verdict.status + (f": {verdict.reason}" if verdict.reason else "")
        lines.append(
            [verdict.workload, verdict.goal.text, f"{value}{against}", show(verdict.bound, ".2f", "x"), status]
        )
    titles = ["work", "goal", "measured", "at most", ""]
    note = (
        "At most: the peer's time over what it spends in convolutions, products and attention, which are the same "
        "libraries' for everyone: no ratio goes far beyond it."
    )
    return f"## Goals\n\n{note}\n\n{table(titles, lines)}"


def _kernels(report: store.Report, workloads: list[str]) -> str:
    lines = []
    for workload in workloads:
        records = done(report, workload)
        ours = records.get(OURS, {})
        cells = [workload.split("/", 1)[1]]
        cells += [spread(records.get(name, {})) for name in (OURS, "eager", "compiled")]
        cells += [times(report, workload, name) for name in ("eager", "compiled")]
        floors = [ours.get(name) for name in ("byte_floor_ms", "issue_floor_ms")]
        cells += [show(ours.get("bytes_per_element")), show(floors[0])]
        cells += [show(ours.get("instructions_per_element"), ".1f"), show(floors[1])]
        known = [floor for floor in floors if floor is not None]
        cells += [show(ours["ms"] / max(known) if known else None, ".2f"), show(ours.get("of_copy"), ".0%")]
        cells += [error_of(ours)]
        lines.append(cells)
    titles = ["kernel", "fastdiff, ms", "eager, ms", "torch.compile, ms", "eager ÷ ours", "compiled ÷ ours"]
    titles += ["bytes per element", "byte floor, ms", "instructions per element", "issue floor, ms", "ours ÷ floor"]
    return table([*titles, "of the copy rate", "error of accepted"], lines)


def spread(record: Record) -> str:
    """Median and percentiles in milliseconds."""
    if "ms" not in record:
        return MISSING
    mark = " *" if disturbed(record) else ""
    return f"{record['ms']:.4g} ({record['low_ms']:.4g}–{record['high_ms']:.4g}){mark}"


def disturbed(record: Record) -> bool:
    """Whether other processes took a good part of the processor while the row was measured."""
    return (record.get("waited") or 0.0) > DISTURBED


def error_of(record: Record) -> str:
    """Difference from the reference and what was accepted."""
    return f"{record['error']:.1e} of {record['tolerance']:.1e}" if "error" in record else MISSING


def _models(report: store.Report, workloads: list[str]) -> Iterator[str]:
    for workload in workloads:
        records = done(report, workload)
        if not records:
            continue
        yield f"### {workload.split('/', 1)[1]}"
        yield _contenders(report, workload, records)
        yield _levers(records, CPU_CHAIN if report["device"] == "cpu" else CHAIN)
        yield _classes(records)


def _contenders(report: store.Report, workload: str, records: dict[str, Record]) -> str:
    lines = []
    for name, record in sorted(records.items(), key=lambda item: item[1]["ms"]):
        cells = [record["contender"], spread(record), times(report, workload, name)]
        cells += [show(record.get("images_per_s")), show(record.get("ms_per_step"))]
        cells += [show(record.get("of_matmul"), ".1%"), show(record.get("flop_floor_ms"))]
        cells += [show(record.get("of_copy"), ".1%"), show(record.get("launches_per_step"))]
        cells += [show(record.get("peak_memory_mib"), ".0f"), show(record.get("activation_memory_mib"), ".0f")]
        cells += [show(record.get("compile_s"), ".1f")]
        cells += [error_of(record)]
        cells += [record.get("note") or ""]
        lines.append(cells)
    titles = ["contender", "ms", "÷ fastdiff", "images/s", "ms per step", "of matmul rate", "FLOP floor, ms"]
    titles += ["of copy rate", "launches per step", "peak MiB", "activations MiB", "compiling, s", "error of accepted"]
    return table([*titles, "note"], lines)


def _levers(records: dict[str, Record], chain: dict[str, str]) -> str:
    """What each lever gives on top of those before it, between rows of one process."""
    present = [(lever, records[name]) for lever, name in chain.items() if name in records]
    lines = []
    for index, (lever, record) in enumerate(present):
        before, first = present[max(index - 1, 0)][1], present[0][1]
        gains = [
            MISSING if other["run"] != record["run"] else f"{other['ms'] / record['ms']:.2f}x"
            for other in (before, first)
        ]
        lines.append([f"+ {lever}" if index else lever, record["contender"], show(record["ms"]), *gains])
    return table(["lever", "row", "ms", "this lever", "all so far"], lines) if len(lines) > 2 else ""


def _classes(records: dict[str, Record]) -> str:
    shares = {record["contender"]: record["classes"] for record in records.values() if record.get("classes")}
    names = sorted(
        {name for one in shares.values() for name in one}, key=lambda n: -max(s.get(n, 0) for s in shares.values())
    )
    lines = ([contender, *(show(one.get(name), ".0%") for name in names)] for contender, one in shares.items())
    return table(["share of", *names], lines)


def _scaling(report: store.Report) -> str:
    parts = []
    for (title, axis), curves in groupby(series_of(report), key=lambda one: (one.title, one.axis)):
        found = list(curves)
        points = sorted({x for one in found for x, _ in one.points})
        lines = [[one.contender, *(show(dict(one.points).get(x), ".4g") for x in points)] for one in found]
        parts.append(f"### {title}\n\n{table([f'{AXES[axis].figure_title}, {axis}', *map(str, points)], lines)}")
    return "## Scaling\n\n" + "\n\n".join(parts) if parts else ""


def _failures(report: store.Report) -> str:
    lines = []
    for key in report["rows"]:
        record = store.newest(report, key)
        if record is not None and record["status"] != "done":
            lines.append([key, record["status"], record["reason"]])
    return "## Not measured\n\n" + table(["row", "", "reason"], lines) if lines else ""
