"""The result file of a soak: a row for each trial, as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soak.trial import Outcome, Trial

Record = dict[str, Any]


def load(path: Path) -> Record:
    """What the file holds; an empty record where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def add(record: Record, trial: Trial, outcome: Outcome) -> None:
    """Take in the outcome of a trial, in place of an earlier one."""
    row = {
        "promise": trial.promise,
        "attempt": trial.tried,
        "of": trial.full,
        "tried": outcome.tried,
        "survived": outcome.survived,
        "seconds": round(outcome.seconds, 1),
        "failure": outcome.failure,
        "repeat": repeat(trial, outcome),
        "absent": outcome.absent,
    }
    record["rows"][trial.name] = row


def repeat(trial: Trial, outcome: Outcome) -> str | None:
    """The command that makes the first failed attempt once more."""
    if outcome.failure is None:
        return None
    number = "" if outcome.number is None else f" --attempt {outcome.number}"
    return f"python -m soak --only {trial.name}{number}"


def is_done(record: Record, trial: Trial) -> bool:
    """Whether the record has the full number of attempts, all survived, or says why there are none."""
    row = record["rows"].get(trial.name, {})
    return bool(row) and row["failure"] is None and (row["absent"] is not None or row["tried"] >= trial.full)


def save(record: Record, path: Path) -> None:
    """Write the record and, beside it, its page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, json.dumps(record, indent=2) + "\n"), (path.with_suffix(".md"), page(record))):
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(target)


def page(record: Record) -> str:
    """The table, what failed and what could not be tried."""
    lines = ["# Soak", "", f"{record['what']}.", "", "| promise | tried | survived | seconds |", "|---|---|---|---|"]
    before = None
    for name, row in record["rows"].items():
        promise = "" if row["promise"] == before else row["promise"]
        before = row["promise"]
        figures = "– | –" if row["absent"] else f"{row['survived']} | {row['seconds']:.0f}"
        count = "–" if row["absent"] else row["tried"]
        if row["tried"] < row["of"] and not row["absent"]:
            count = f"{count} of the full {row['of']}"
        lines.append(f"| {promise} | {count} × {row['attempt']} (`{name}`) | {figures} |")
    rows = record["rows"].items()
    failed = [f"- `{name}`: {row['failure']}. Again: `{row['repeat']}`" for name, row in rows if row["failure"]]
    absent = [f"- `{name}`: {row['absent']}" for name, row in rows if row["absent"]]
    limits = [f"- {limit}" for limit in record.get("limits", [])]
    for title, items in (("Failed", failed), ("Not applicable here", absent + limits)):
        if items:
            lines += ["", f"## {title}", "", *items]
    return "\n".join(lines) + "\n"
