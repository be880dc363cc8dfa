"""Every promise in its short form; `make soak` makes the full number of attempts."""

import pytest

from soak.trial import run
from soak.trials import TRIALS


# tests/test_distributed.py starts two processes in seconds, of a smaller model
@pytest.mark.parametrize("trial", [trial for trial in TRIALS if trial.short], ids=lambda trial: trial.name)
def test_survives(trial, tmp_path):
    outcome = run(trial, range(trial.short), tmp_path)
    if outcome.absent:
        pytest.skip(outcome.absent)
    assert outcome.ok, f"attempt {outcome.number}: {outcome.failure}"
    assert outcome.survived == outcome.tried == trial.short


def test_names_are_unique():
    names = [trial.name for trial in TRIALS]
    assert len(set(names)) == len(names)
