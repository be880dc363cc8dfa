"""Runs rows until all are measured or the budget is spent, and writes the result file after every one."""

from __future__ import annotations

import datetime
import gc
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import store
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.measurement import Probe, synchronize
from benchmarks.suite import Context, Row, Skip
from fastdiff.environment import environment


@dataclass
class Outcome:
    """What a run did: keys of the rows by what became of them."""

    path: Path
    run: str
    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    # no budget was left for them
    open: list[str] = field(default_factory=list)


class DeviceLost(RuntimeError):
    """The device answers no more: what is open needs a new process."""


@dataclass
class Runner:
    """One process's run.

    A workload's rows are measured together, the one that the others are compared with first; where an earlier run has
    measured some of them, this one is measured again, so that every ratio has both its sides from one process.
    """

    device: torch.device
    folder: Path
    quick: bool = False
    budget_s: float = 480.0
    command: str = ""
    say: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic
    ceilings_of: Callable[..., Ceilings] = measure_ceilings

    def __post_init__(self) -> None:
        self._started = self.clock()
        self.run_id = uuid.uuid4().hex[:8]
        self.report, self.path = store.open_report(
            self.folder, store.identity(self.device, quick=self.quick), datetime.date.today().isoformat()
        )

    def remaining_s(self) -> float:
        return self.budget_s - (self.clock() - self._started)

    def run(self, rows: Iterable[Row]) -> Outcome:
        """Measure what is not measured yet, as far as the budget goes.

        Raises ValueError where two rows have one key, DeviceLost where a failure has left the device unusable.
        """
        rows = list(rows)
        keys = [row.key for row in rows]
        if len(set(keys)) != len(keys):
            raise ValueError(f"row keys must be unique, got {max(keys, key=keys.count)!r} twice")
        outcome = Outcome(self.path, self.run_id)
        groups = [(name, list(group)) for name, group in groupby(rows, key=lambda row: row.workload)]
        todo = [name for name, group in groups if any(not store.is_done(self.report, row.key) for row in group)]
        if not todo:
            return outcome
        context = self._begin()
        for name, group in groups:
            if name in todo:
                context.cache.clear()
                _release(self.device)
                self._run_workload(group, context, outcome)
        context.cache.clear()
        _release(self.device)
        return outcome

    def _begin(self) -> Context:
        """Measure the ceilings and record this run."""
        ceilings = self.ceilings_of(self.device, quick=self.quick)
        self.report["runs"][self.run_id] = {
            "command": self.command,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": store.commit(),
            "environment": environment(),
            "ceilings": ceilings.as_json(),
        }
        store.save(self.report, self.path)
        self.say(f"run {self.run_id}, {self.path}: copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s")
        return Context(
            device=self.device,
            quick=self.quick,
            ceilings=ceilings,
            remaining_s=self.remaining_s,
            probe=Probe(self.device),
        )

    def _run_workload(self, group: list[Row], context: Context, outcome: Outcome) -> None:
        waiting = [row for row in group if not row.is_ours and not store.is_done(self.report, row.key)]
        for row in group:
            if not row.is_ours:
                continue
            already = store.is_done(self.report, row.key)
            if already and not waiting:
                continue
            # measured once more only for the sake of a row that fits behind it
            cost = self._expected_s(row) + (min(map(self._expected_s, waiting)) if already else 0.0)
            if cost > self.remaining_s():
                for left in ([] if already else [row]) + waiting:
                    self._leave_open(left, cost, outcome)
                return
            self._run_row(row, context, outcome)
        for row in waiting:
            cost = self._expected_s(row)
            if cost > self.remaining_s():
                self._leave_open(row, cost, outcome)
            else:
                self._run_row(row, context, outcome)

    def _leave_open(self, row: Row, cost: float, outcome: Outcome) -> None:
        outcome.open.append(row.key)
        self.say(f"{row.key}: open, would take about {cost:.0f} s of the {max(self.remaining_s(), 0.0):.0f} s left")

    def _expected_s(self, row: Row) -> float:
        """What the row took when it was last measured, else what it says."""
        record = store.newest(self.report, row.key, status="done")
        return row.expected_s if record is None else record["seconds"]

    def _run_row(self, row: Row, context: Context, outcome: Outcome) -> None:
        started = self.clock()
        lost = False
        try:
            figures: dict[str, Any] = dict(row.run(context))
            status = "skipped" if "skipped" in figures else "done"
            reason = figures.get("skipped")
        except Skip as skip:
            figures, status, reason = {"skipped": str(skip)}, "skipped", str(skip)
        except Exception as error:  # whatever a contender raises is a result, and the other rows go on
            figures, status, reason = {}, "failed", one_line(error)
            lost = not _answers(self.device)
        record = {
            "section": row.section,
            "workload": row.workload.split("/", 1)[1],
            "contender": row.key.rsplit("/", 1)[1],
            **figures,
            "run": self.run_id,
            "status": status,
            "seconds": round(self.clock() - started, 2),
            "load": _load(),
        }
        if reason is not None:
            record["reason"] = reason
        store.add(self.report, row.key, record)
        store.save(self.report, self.path)
        getattr(outcome, status).append(row.key)
        self.say(line(row.key, record))
        if lost:
            raise DeviceLost(f"{row.key} left {self.device} unusable ({reason}): run the command again to go on")
        _release(self.device)


def one_line(error: BaseException) -> str:
    """Type and first line of a message, at most 300 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


def line(key: str, record: dict[str, Any]) -> str:
    """What is printed of a row."""
    if record["status"] != "done":
        return f"{key}: {record['status']}, {record['reason']}"
    text = f"{key}: "
    text += f"{record['ms']:.4g} ms ({record['low_ms']:.4g} to {record['high_ms']:.4g})" if "ms" in record else "done"
    if "images_per_s" in record:
        text += f", {record['images_per_s']:.4g} images/s"
    if "compile_s" in record:
        text += f", compiled in {record['compile_s']:.1f} s"
    return f"{text} [{record['seconds']:.1f} s]"


def _answers(device: torch.device) -> bool:
    """False where an earlier error, an illegal access say, has left the process without its device."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def _release(device: torch.device) -> None:
    """Give back what the last row's tensors held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _load() -> float | None:
    """Mean number of processes that wanted a core during the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
