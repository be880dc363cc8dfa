"""The digits model in the package: readable, new, small, and quick to reach."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.digits_quality import Quality, measure
from fastdiff import Sampler, load_model
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


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_a_batch_of_8_is_8_batches_of_1(solver):
    """The noise is bit-equal; convolutions of another batch size may sum in another order: 1e-5 is promised."""
    loaded = load_model(packaged_model())
    sampler = Sampler(
        loaded.model,
        loaded.schedule,
        solver=solver,
        num_inference_steps=10,
        prediction_type=loaded.prediction_type,
        guidance_scale=1.5,
        clip_sample=1.0,
    )
    labels, shape = torch.arange(8), (1, 8, 8)
    together = sampler.sample((8, *shape), seed=3, model_kwargs={"class_labels": labels})
    alone = [
        sampler.sample((1, *shape), seed=3, sample_indices=index, model_kwargs={"class_labels": index})
        for index in labels.split(1)
    ]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5
    assert together.std() > 0.5
