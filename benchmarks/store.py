"""The suite's result file: rows as they are measured, by which process, and whether a later run may add to it.

    {"format": 1, "device": "h200", "quick": false, "identity": {...}, "date": "2026-11-21",
     "runs": {id: {"command", "started", "commit", "environment", "ceilings"}},
     "rows": {key: [record, ...]}}

A record is a row's figures with "run" (id of the process), "status" ("done", "failed" or "skipped"), "seconds", the
machine's "load" and, for the latter two, "reason". A key holds one record of each run that tried it, the newest last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastdiff.environment import environment

FORMAT = 1
ROOT = Path(__file__).parents[1]
# what only reads result files: changing it does not change what is measured
READERS = ("report.py", "page.py", "plots.py", "series.py", "compare.py", "goals.py", "__main__.py", "results")

Report = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The last word of a card's name, in lower case; "cpu"."""
    return torch.cuda.get_device_name(device).split()[-1].lower() if device.type == "cuda" else device.type


def source_digest(root: Path = ROOT) -> str:
    """Of every source file whose change may change a figure, with or without a git repository."""
    digest = hashlib.sha256()
    for folder in ("fastdiff", "kernels", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            within = path.relative_to(root)
            if folder == "benchmarks" and within.parts[1] in READERS:
                continue
            digest.update(f"{within}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit(root: Path = ROOT) -> str | None:
    """The git commit, "+" behind it where tracked files differ from it; None without a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def identity(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """What must be equal for two runs to share a file."""
    versions = environment()
    names: tuple[str, ...] = ("python", "torch", "triton", "cuda", "cudnn")
    names += () if device.type == "cuda" else ("cpu", "torch_threads")
    return {
        "device": device_name(device),
        "quick": quick,
        "source": source_digest(),
        **{name: versions[name] for name in names},
    }


def new_report(identity: dict[str, Any], date: str) -> Report:
    return {
        "format": FORMAT,
        "device": identity["device"],
        "quick": identity["quick"],
        "identity": identity,
        "date": date,
        "runs": {},
        "rows": {},
    }


def load(path: Path) -> Report:
    """Raises ValueError where the file is no report of the suite."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT or "rows" not in report:
        raise ValueError(f"{path} is not a report of the benchmark suite (format {FORMAT})")
    return report


def save(report: Report, path: Path) -> None:
    """Replaces the file in one move, so that a run that is stopped leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = json.dumps(report, indent=1)
    # the samples of a row on one line
    text = re.sub(r"\[\s+([-+.\deE,\s]+?)\s+\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    temporary.write_text(text + "\n")
    temporary.replace(path)


def open_report(folder: Path, identity: dict[str, Any], date: str) -> tuple[Report, Path]:
    """The newest report in the folder that a run of this identity may add to, else a new one under a free name."""
    stem = f"speed_{identity['device']}_"
    for path in sorted(folder.glob(f"{stem}*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        report = load(path)
        if report["identity"] == identity:
            return report, path
    names = [f"{stem}{date}", *(f"{stem}{date}-{number}" for number in range(2, 1000))]
    return new_report(identity, date), next(
        path for path in (folder / f"{name}.json" for name in names) if not path.exists()
    )


def newest(report: Report, key: str, *, status: str | None = None, run: str | None = None) -> dict[str, Any] | None:
    """The newest record of a row, of one status or one run where these are given."""
    for record in reversed(report["rows"].get(key, [])):
        if (status is None or record["status"] == status) and (run is None or record["run"] == run):
            return record
    return None


def add(report: Report, key: str, record: dict[str, Any]) -> None:
    """Append a record; an earlier one that gave no figures, or is of the same run, makes way for it."""
    kept = [old for old in report["rows"].get(key, []) if old["status"] == "done" and old["run"] != record["run"]]
    report["rows"][key] = [*kept, record]


def is_done(report: Report, key: str) -> bool:
    """Whether the last run that tried the row measured it."""
    record = newest(report, key)
    return record is not None and record["status"] == "done"


def merge(reports: list[Report]) -> Report:
    """One report with the rows of several files of one device, the records of later files last.

    Raises ValueError where the devices differ, or quick looks are mixed with measurements.
    """
    first = reports[0]
    for report in reports[1:]:
        for name in ("device", "quick"):
            if report[name] != first[name]:
                raise ValueError(f"reports of different {name} cannot be merged: {first[name]!r} and {report[name]!r}")
    merged = new_report(first["identity"], max(report["date"] for report in reports))
    merged["identities"] = [report["identity"] for report in reports]
    for report in reports:
        merged["runs"].update(report["runs"])
        for key, records in report["rows"].items():
            for record in records:
                add(merged, key, record)
    return merged
