"""The digits model in the package: readable, new, small, and quick to reach."""

import json
from pathlib import Path

import pytest

from benchmarks.digits_quality import Quality, measure
from fastdiff.generate import packaged_model


@pytest.fixture(scope="module")
def quality() -> Quality:
    return measure(num=200, guidance_scale=1.5, seed=7)


def test_a_classifier_of_real_digits_recognises_the_samples(quality):
    """97 % is promised. If that were the true rate, fewer than 186 of 200 would be seen once in 400 runs (binomial)."""
    assert quality.recognised_held_out > 0.97
    assert quality.recognised >= 186 / 200


def test_samples_are_no_copies_of_training_images(quality):
    """Copies would be at distance 0; held-out digits are as far as new digits are."""
    assert quality.distance_ratio >= 0.75


def test_the_model_is_small_and_says_how_it_was_made():
    folder = packaged_model()
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 4e6
    config = json.loads((folder / "config.json").read_text())
    assert config["command"].startswith("fastdiff train")
    assert isinstance(config["seed"], int)
