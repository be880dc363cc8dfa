"""The harness: a broken promise is counted, described and repeatable, and a trial notices what it is there for."""

import json
import re

import pytest

from fastdiff import checkpoint
from soak import __main__ as command
from soak import record
from soak.checkpoint_damage import bit_flips, truncations
from soak.trial import ENOUGH, NotHere, require, run, trial


@trial(promise="Odd numbers are even", tried="number", short=2, full=6)
def odd_numbers(folder):
    def attempt(number):
        require(number % 2 == 0, f"{number} is odd")

    yield attempt


@trial(promise="Setups work", tried="setup", short=1, full=1)
def broken_setup(folder):
    raise OSError("no room")
    yield


@trial(promise="GPUs are there", tried="call", short=1, full=1)
def without_gpu(folder):
    raise NotHere("needs a GPU")
    yield


def test_failures_are_counted_and_the_first_is_described(tmp_path):
    outcome = run(odd_numbers, range(6), tmp_path)
    assert (outcome.tried, outcome.survived, outcome.number, outcome.failure) == (6, 3, 1, "1 is odd")
    assert not outcome.ok
    outcome = run(broken_setup, range(6), tmp_path)
    assert (outcome.tried, outcome.survived, outcome.number) == (0, 0, None)
    assert outcome.failure.startswith("setup: OSError: no room (test_soak.py line ")


@pytest.mark.parametrize(
    ("tried", "void", "failure"),
    [(40, 8, None), (40, 9, "9 of 40 attempts compared nothing"), (ENOUGH - 1, ENOUGH - 1, None)],
)
def test_attempts_that_compare_nothing_are_counted(tried, void, failure, tmp_path):
    @trial(promise="Arrays are sorted", tried="array", short=1, full=40)
    def arrays(folder):
        yield lambda number: "empty" if number < void else None

    outcome = run(arrays, range(tried), tmp_path)
    assert (outcome.tried, outcome.survived, outcome.void, outcome.failure) == (tried, tried, void, failure)
    results = {"what": "soak", "rows": {}}
    record.add(results, arrays, outcome, None)
    assert f"× array, {void} of which compared nothing (`arrays`)" in record.page(results, [arrays])


@pytest.fixture
def three_trials(monkeypatch):
    monkeypatch.setattr(command, "TRIALS", (odd_numbers, broken_setup, without_gpu))


def test_command_writes_a_row_a_trial_and_fails_with_any(three_trials, tmp_path, capsys):
    path = tmp_path / "soak.json"
    assert command.main(["--out", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "odd-numbers: 3 of 6 survived" in printed
    assert "1 is odd\n  again: python -m soak --only odd-numbers --attempt 1" in printed
    rows = json.loads(path.read_text())["rows"]
    assert [(row["tried"], row["survived"], row["absent"]) for row in rows.values()] == [
        (6, 3, None),
        (0, 0, None),
        (0, 0, "needs a GPU"),
    ]
    page = path.with_suffix(".md").read_text()
    assert f"| Odd numbers are even | 6 × number (`odd-numbers`) | 3 | 0 | {record.commit() or '–'} |" in page
    assert "- `odd-numbers`: 1 is odd. Again: `python -m soak --only odd-numbers --attempt 1`" in page
    assert "## Not applicable here\n\n- `without-gpu`: needs a GPU" in page


def test_command_repeats_an_attempt_and_makes_what_is_missing(three_trials, tmp_path, capsys):
    path = tmp_path / "soak.json"
    assert command.main(["--out", str(path), "--only", "odd", "--attempt", "3"]) == 1
    assert "0 of 1 survived" in capsys.readouterr().out
    assert not path.exists()
    assert command.main(["--out", str(path), "--only", "odd", "--count", "1"]) == 0
    assert command.main(["--out", str(path), "--only", "GPU"]) == 0
    capsys.readouterr()
    # one attempt is not the full number
    assert command.main(["--out", str(path), "--missing"]) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[::3]] == ["odd-numbers", "broken-setup"]
    assert command.main(["--only", "nothing of the kind"]) == 2
    assert record.load(path)["rows"]["odd-numbers"]["tried"] == 6


def test_page_names_what_was_not_tried_and_counts_of_another_size(three_trials, tmp_path):
    path = tmp_path / "soak.json"
    assert command.main(["--out", str(path), "--only", "odd", "--count", "1"]) == 0
    page = path.with_suffix(".md").read_text()
    assert "1 (in full 6) × number (`odd-numbers`)" in page
    assert "## Not tried\n\n- Setups work: 1 × setup (`broken-setup`)\n- GPUs are there: 1 × call" in page
    # of a file from before the commit was noted, and before six attempts were asked for
    results = record.load(path)
    row = results["rows"]["odd-numbers"]
    del row["commit"]
    row |= {"of": 4, "tried": 4, "survived": 4}
    assert "4 (in full 6) × number (`odd-numbers`) | 4 | 0 | – |" in record.page(results, [odd_numbers])
    row |= {"tried": 6, "survived": 6}
    assert record.is_done(results, odd_numbers)
    row["attempt"] = "other number"
    assert not record.is_done(results, odd_numbers)


def test_commit_tells_changed_files():
    name = record.commit()
    assert name is None or re.fullmatch(r"[0-9a-f]{7,40}\+?", name)


def test_a_loader_that_believes_the_files_is_found_out(tmp_path, monkeypatch):
    def trusting(directory, wanted):
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    monkeypatch.setattr(checkpoint, "_read_verified", trusting)
    for damage in (truncations, bit_flips):
        outcome = run(damage, range(4), tmp_path / damage.name)
        assert outcome.survived == 0
        assert "the newest checkpoint is" in outcome.failure
