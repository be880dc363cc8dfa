import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fastdiff import checkpoint
from fastdiff.checkpoint import CheckpointError
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet, UNetConfig

FILES = ["config.json", "manifest.json", "model.safetensors", "state.json", "train_state.safetensors"]


def tiny_model():
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_num_groups=4,
    )
    model = UNet(config)
    # The last convolution starts at zero; a model that was trained does not.
    torch.nn.init.normal_(model.conv_out.weight)
    return model


def config_of(model):
    schedule = NoiseSchedule.cosine(num_train_timesteps=50).to_config()
    return {"model": model.config.to_dict(), "schedule": schedule, "prediction_type": "v_prediction"}


@pytest.fixture
def saved(tmp_path):
    model = tiny_model()
    train_state = {"exp_avg": torch.randn(3, 5), "step": torch.tensor(4.0)}
    return checkpoint.save_checkpoint(
        tmp_path / "step-4",
        weights=model.state_dict(),
        config=config_of(model),
        train_state=train_state,
        state={"step": 4},
    )


def test_model_comes_back_bit_equal_with_its_schedule(saved):
    loaded, expected = checkpoint.load_model(saved), tiny_model()
    assert sorted(path.name for path in saved.iterdir()) == FILES
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert not loaded.model.training
    assert loaded.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.prediction_type == loaded.config["prediction_type"] == "v_prediction"
    assert (loaded.schedule.alpha == NoiseSchedule.cosine(num_train_timesteps=50).alpha).all()


def test_train_state_comes_back_bit_equal(saved):
    torch.manual_seed(1)
    weights, tensors, state = checkpoint.load_train_state(saved)
    assert weights.keys() == tiny_model().state_dict().keys()
    assert tensors["exp_avg"].shape == (3, 5)
    assert tensors["step"] == 4
    assert state == {"step": 4}


def test_export_halves_the_weights_and_leaves_training_behind(saved, tmp_path):
    target = checkpoint.export_model(saved, tmp_path / "packaged")
    assert sorted(path.name for path in target.iterdir()) == FILES[:3]
    assert (target / "model.safetensors").stat().st_size < 0.6 * (saved / "model.safetensors").stat().st_size
    loaded, expected = checkpoint.load_model(target).model.state_dict(), tiny_model().state_dict()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value.half().float()), name
    with pytest.raises(CheckpointError, match=r"packaged has no (state.json|train_state.safetensors) in its manifest"):
        checkpoint.load_train_state(target)


@pytest.mark.parametrize("name", FILES)
def test_deleted_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"step-4/{name} is missing"):
        checkpoint.verify(saved)


def test_loading_notices_damage(saved):
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    for load in (checkpoint.load_model, checkpoint.load_train_state):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            load(saved)


def test_newest_undamaged_checkpoint_is_found(saved):
    run = saved.parent
    for step in (10, 9, 11):
        shutil.copytree(saved, run / f"step-{step}")
    (run / "step-11").rename(run / "step-11.tmp")
    assert checkpoint.latest_checkpoint(run) == run / "step-10"
    (run / "step-10" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"skipped: .*step-10/model.safetensors is missing"):
        assert checkpoint.latest_checkpoint(run) == run / "step-9"
    assert checkpoint.latest_checkpoint(run / "absent") is None


@pytest.mark.parametrize(
    ("operation", "failing_call"),
    [
        ("pathlib.Path.mkdir", 0),
        ("os.fsync", 0),
        ("os.fsync", 2),
        ("pathlib.Path.rename", 0),
        ("pathlib.Path.rename", 1),
    ],
)
def test_failed_write_leaves_the_earlier_checkpoint(saved, operation, failing_call, monkeypatch):
    real = {"os.fsync": os.fsync, "pathlib.Path.mkdir": Path.mkdir, "pathlib.Path.rename": Path.rename}[operation]
    calls = itertools.count()

    def fail_once(*arguments, **options):
        if next(calls) == failing_call:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(operation, fail_once)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-4: No space left on device"):
        checkpoint.save_checkpoint(saved, weights={"other": torch.ones(2)}, config={})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["step-4"]


@pytest.mark.parametrize("write", range(8))
def test_process_killed_at_any_write_leaves_a_whole_checkpoint(saved, write, monkeypatch):
    class Killed(BaseException):
        """Not caught by the code under test, as SIGKILL would not be."""

    real, calls = os.fsync, itertools.count()

    def fsync(descriptor):
        if next(calls) == write:
            raise Killed
        real(descriptor)

    target = saved.parent / "step-5"
    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.suppress(Killed):
        checkpoint.save_checkpoint(target, weights={"w": torch.ones(2)}, config={}, train_state={}, state={})
    monkeypatch.setattr(os, "fsync", real)
    # Five files and their directory are flushed before the rename, the parent after it.
    latest = checkpoint.latest_checkpoint(saved.parent)
    assert latest == (saved if write < 6 else target)
    checkpoint.save_checkpoint(target, weights={"w": torch.zeros(2)}, config={})
    assert checkpoint.latest_checkpoint(saved.parent) == target


def test_a_checkpoint_whose_successor_was_killed_between_two_renames_is_read_and_replaced(saved):
    moved = saved.rename(saved.with_name("step-4.old"))
    assert checkpoint.checkpoints(saved.parent) == [(4, moved)]
    assert checkpoint.latest_checkpoint(saved.parent) == moved
    assert checkpoint.load_train_state(saved)[2] == {"step": 4}
    checkpoint.save_checkpoint(saved, weights=tiny_model().state_dict(), config=config_of(tiny_model()))
    assert [path.name for path in saved.parent.iterdir()] == ["step-4"]


def test_overwriting_replaces_the_whole_checkpoint(saved):
    model = tiny_model()
    checkpoint.save_checkpoint(saved, weights=model.state_dict(), config=config_of(model))
    assert sorted(path.name for path in saved.iterdir()) == FILES[:3]
    assert [path.name for path in saved.parent.iterdir()] == ["step-4"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="thesis: it exists and is not a checkpoint"):
        checkpoint.save_checkpoint(tmp_path / "thesis", weights={}, config={})
    assert (tmp_path / "thesis" / "thesis.tex").exists()


def test_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-1: (File exists|Not a directory)"):
        checkpoint.save_checkpoint(tmp_path / "file" / "step-1", weights={}, config={})


@pytest.mark.parametrize("missing", ["model", "schedule", "prediction_type"])
def test_checkpoint_that_describes_no_model(tmp_path, missing):
    model = tiny_model()
    config = {key: value for key, value in config_of(model).items() if key != missing}
    checkpoint.save_checkpoint(tmp_path / "x", weights=model.state_dict(), config=config)
    with pytest.raises(CheckpointError, match=f"x does not describe a model: '{missing}'"):
        checkpoint.load_model(tmp_path / "x")


def test_weights_of_another_model_are_refused(tmp_path):
    model = tiny_model()
    weights = {name: value for name, value in model.state_dict().items() if name != "conv_out.bias"}
    checkpoint.save_checkpoint(tmp_path / "x", weights=weights, config=config_of(model))
    with pytest.raises(CheckpointError, match=r"does not describe a model: .*conv_out\.bias"):
        checkpoint.load_model(tmp_path / "x")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        checkpoint.load_model(tmp_path / "nothing")


def test_config_is_json(saved):
    assert json.loads((saved / "config.json").read_text()) == checkpoint.load_config(saved)
