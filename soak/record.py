"""The result file of a soak: a row for each trial, as JSON and as a table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soak.trial import Outcome, Trial

Record = dict[str, Any]


def load(path: Path) -> Record:
    """What the file holds; an empty record where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def commit() -> str | None:
    """The short name of the commit that is checked out, with a + where files differ from it; None without git."""
    root = Path(__file__).parents[1]
    # the results change while the trials run
    words = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results"]
    try:
        name, changed = (
            subprocess.run(["git", *one], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for one in (["rev-parse", "--short", "HEAD"], words)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}+" if changed else name


def add(record: Record, trial: Trial, outcome: Outcome, commit: str | None) -> None:
    """Take in the outcome of a trial, in place of an earlier one; commit: of the code that was tried."""
    row = {
        "promise": trial.promise,
        "attempt": trial.tried,
        "of": trial.full,
        "tried": outcome.tried,
        "survived": outcome.survived,
        "void": outcome.void,
        "seconds": round(outcome.seconds, 1),
        "failure": outcome.failure,
        "repeat": repeat(trial, outcome),
        "absent": outcome.absent,
        "commit": commit,
    }
    record["rows"][trial.name] = row


def repeat(trial: Trial, outcome: Outcome) -> str | None:
    """The command that makes the first failed attempt once more."""
    if outcome.failure is None:
        return None
    number = "" if outcome.number is None else f" --attempt {outcome.number}"
    return f"python -m soak --only {trial.name}{number}"


def is_done(record: Record, trial: Trial) -> bool:
    """Whether the record has the full number of such attempts, all survived, or says why there are none."""
    row = record["rows"].get(trial.name)
    if row is None or row["failure"] is not None or row["attempt"] != trial.tried:
        return False
    return row["absent"] is not None or row["tried"] >= trial.full


def save(record: Record, path: Path, trials: Sequence[Trial]) -> None:
    """Write the record and, beside it, its page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, json.dumps(record, indent=2) + "\n"), (path.with_suffix(".md"), page(record, trials))):
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(target)


def page(record: Record, trials: Sequence[Trial]) -> str:
    """The table, what failed, what was not tried of these trials and what could not be."""
    lines = ["# Soak", "", f"{record['what']}.", ""]
    lines += ["| promise | tried | survived | seconds | commit |", "|---|---|---|---|---|"]
    full = {trial.name: trial.full for trial in trials}
    before = None
    for name, row in record["rows"].items():
        promise = "" if row["promise"] == before else row["promise"]
        before = row["promise"]
        figures = "– | –" if row["absent"] else f"{row['survived']} | {row['seconds']:.0f}"
        count = "–" if row["absent"] else str(row["tried"])
        wanted = full.get(name, row["of"])
        if row["tried"] != wanted and not row["absent"]:
            count = f"{count} (in full {wanted})"
        # rows of older files have neither
        void = f", {row['void']} of which compared nothing" if row.get("void") else ""
        lines.append(
            f"| {promise} | {count} × {row['attempt']}{void} (`{name}`) | {figures} | {row.get('commit') or '–'} |"
        )
    rows = record["rows"].items()
    failed = [f"- `{name}`: {row['failure']}. Again: `{row['repeat']}`" for name, row in rows if row["failure"]]
    left = [trial for trial in trials if trial.name not in record["rows"]]
    untried = [f"- {trial.promise}: {trial.full} × {trial.tried} (`{trial.name}`)" for trial in left]
    absent = [f"- `{name}`: {row['absent']}" for name, row in rows if row["absent"]]
    limits = [f"- {limit}" for limit in record.get("limits", [])]
    for title, items in (("Failed", failed), ("Not tried", untried), ("Not applicable here", absent + limits)):
        if items:
            lines += ["", f"## {title}", "", *items]
    return "\n".join(lines) + "\n"
