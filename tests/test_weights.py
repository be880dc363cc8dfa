"""The choice between averaged and trained weights, wherever samples are drawn or a model is judged."""

import json

import numpy as np
import pytest
import torch

from fastdiff.bulk import generate_many
from fastdiff.bulk_config import BulkConfig
from fastdiff.checkpoint import CheckpointError, export_model, load_model, load_train_state
from fastdiff.cli import main
from fastdiff.eval_config import EvalLikelihoodConfig
from fastdiff.likelihood import evaluate_likelihood
from fastdiff.sample_config import SampleConfig
from fastdiff.train import train
from fastdiff.train_config import TrainConfig
from fastdiff.unet_config import UNetConfig

TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    model_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    num_classes=10,
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint whose average lags far behind."""
    config = TrainConfig(
        steps=3,
        batch_size=8,
        learning_rate=0.05,
        warmup_steps=0,
        ema_decay=0.99,
        num_train_timesteps=20,
        sample_every=0,
        progress=False,
        device="cpu",
        output=str(tmp_path_factory.mktemp("run")),
    )
    return train(config, model_config=TINY).checkpoint


def test_each_is_bit_for_bit_what_training_wrote(trained):
    averages, tensors, _ = load_train_state(trained)
    average, last = (load_model(trained, weights=choice).model.state_dict() for choice in ("average", "trained"))
    assert average.keys() == last.keys() == averages.keys()
    for name in averages:
        assert torch.equal(average[name], averages[name]), name
        assert torch.equal(last[name], tensors[f"model.{name}"]), name
    assert not all(torch.equal(average[name], last[name]) for name in averages)


def test_an_exported_model_has_no_trained_weights(trained, tmp_path, capsys):
    exported = export_model(trained, tmp_path / "exported")
    assert load_model(exported).model.training is False
    with pytest.raises(CheckpointError, match=r"exported has no train_state.* exported for sampling, with averaged"):
        load_model(exported, weights="trained")
    assert (
        main(["sample", "--checkpoint", str(exported), "--weights", "trained", "--out", str(tmp_path / "x.png")]) == 1
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was exported for sampling" in error


def test_sample_and_likelihood_use_the_choice(trained, tmp_path):
    samples, losses = {}, {}
    for choice in ("average", "trained"):
        path = tmp_path / f"{choice}.npy"
        words = ["--checkpoint", trained, "--num", 3, "--num-inference-steps", 2, "--device", "cpu", "--out", "None"]
        assert main(["sample", *map(str, words), "--save-npy", str(path), "--weights", choice]) == 0
        samples[choice] = np.load(path)
        config = EvalLikelihoodConfig(checkpoint=trained, weights=choice, num=8, bits_per_dim=False, device="cpu")
        losses[choice] = evaluate_likelihood(config).losses
    assert np.abs(samples["average"] - samples["trained"]).max() > 0.01
    assert losses["average"] != losses["trained"]


def test_bulk_samples_of_one_choice_are_not_continued_with_the_other(trained, tmp_path):
    options = {"checkpoint": trained, "num": 4, "batch_size": 2, "num_inference_steps": 2, "device": "cpu"}
    out = tmp_path / "out"
    generate_many(BulkConfig(out=out, weights="trained", **options))
    assert json.loads((out / "generation.json").read_text())["weights"] == "trained"
    with pytest.raises(ValueError, match=r"weights must be 'trained' as in the samples that .* holds, got 'average'"):
        generate_many(BulkConfig(out=out, resume=True, **options))
    assert generate_many(BulkConfig(out=out, weights="trained", resume=True, **options)).drawn == 0


@pytest.mark.parametrize("kind", [SampleConfig, BulkConfig, EvalLikelihoodConfig])
def test_other_weights_are_unknown(kind):
    with pytest.raises(ValueError, match="weights must be one of average, trained, got 'best'"):
        kind(weights="best")


def test_load_model_knows_no_other_weights(trained):
    with pytest.raises(ValueError, match="weights must be average or trained, got 'best'"):
        load_model(trained, weights="best")
