"""Retention of a run's checkpoints, and the commands that look at them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoint import checkpoints, latest_checkpoint, prune_checkpoints, save_checkpoint
from fastdiff.checkpoint_report import inspect, verify_all
from fastdiff.cli import main


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of the steps 10, 20, ..., 90, and files of others."""
    for step in range(10, 100, 10):
        save_checkpoint(
            tmp_path / f"step-{step}",
            weights={"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(4, dtype=torch.float16)},
            config={"step": step, "dataset": "digits", "schedule": {"type": "cosine"}},
            train_state={"model.weight": torch.zeros(2)} if step == 90 else None,
            state={"step": step, "options": {"seed": 3}} if step == 90 else None,
        )
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / "step-mine").mkdir()
    return tmp_path


def steps(run: Path) -> list[int]:
    return [step for step, _ in checkpoints(run)]


def damage(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (None, None, range(10, 100, 10)),
        (None, 30, range(10, 100, 10)),
        (1, None, [90]),
        (3, None, [70, 80, 90]),
        (2, 30, [30, 60, 80, 90]),
        (100, None, range(10, 100, 10)),
    ],
)
def test_the_newest_and_every_so_many_steps_stay(run, keep_last, keep_every, left):
    before = steps(run)
    removed = prune_checkpoints(run, keep_last=keep_last, keep_every=keep_every)
    assert steps(run) == list(left)
    assert [int(path.name[5:]) for path in removed] == [step for step in before if step not in left]
    assert (run / "log.jsonl").exists()
    assert (run / "step-mine").is_dir()
    assert not list(run.glob("*.pruned"))


def test_a_damaged_newest_one_is_no_reason_to_remove_the_one_that_is_whole(run):
    damage(run / "step-90")
    damage(run / "step-20")
    prune_checkpoints(run, keep_last=1)
    assert steps(run) == [20, 80, 90]
    with pytest.warns(UserWarning, match="step-90"):
        assert latest_checkpoint(run) == run / "step-80"


def test_a_prune_that_was_killed_leaves_no_half_checkpoint_and_the_next_one_cleans_up(run, monkeypatch):
    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(run, keep_last=2)
    monkeypatch.undo()
    assert steps(run) == [10, 20, 30, 40, 50, 60, 80, 90]
    assert all(report.damage is None for report in verify_all(run))
    prune_checkpoints(run, keep_last=2)
    assert steps(run) == [80, 90]
    assert not list(run.glob("*.pruned"))


@pytest.mark.parametrize("option", [{"keep_last": 0}, {"keep_every": 0, "keep_last": 1}, {"keep_last": True}])
def test_numbers_out_of_range(run, option):
    with pytest.raises(ValueError, match="must be None or an integer of at least 1"):
        prune_checkpoints(run, **option)
    assert len(steps(run)) == 9


def test_verify_names_the_damaged_file_and_fails(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("whole") == 9
    damage(run / "step-40")
    (run / "step-50" / "config.json").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines].count("DAMAGED") == 2
    assert f"{run}/step-40/model.safetensors is damaged" in lines[3]
    assert f"{run}/step-50/config.json is missing" in lines[4]
    assert main(["checkpoint", "verify", str(run / "step-30"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoints": {str(run / "step-30"): None}}


def test_inspect_tells_what_is_there_without_loading_weights(run, capsys):
    content = inspect(run / "step-90")
    assert content["parameters"] == 2 * 3 + 4
    assert content["dtypes"] == ["F16", "F32"]
    assert content["step"] == 90
    assert content["continues"]
    assert content["options"] == {"seed": 3}
    assert content["files"]["model.safetensors"] == (run / "step-90" / "model.safetensors").stat().st_size
    assert not inspect(run / "step-80")["continues"]
    assert main(["checkpoint", "inspect", str(run)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].split() == ["path", f"{run}/step-90"]
    assert "schedule" in output


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_is_no_checkpoint_is_one_sentence(command, tmp_path, capsys):
    for place in (tmp_path, tmp_path / "absent"):
        assert main(["checkpoint", command, str(place)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"fastdiff checkpoint {command}: error: ")
        assert error.count("\n") == 1
        assert str(place) in error


def test_verify_tells_folders_and_files_of_others_from_damaged_checkpoints(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    # a model of diffusers
    (other / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert main(["checkpoint", "verify", str(other)]) == 1
    assert f"{other} is no checkpoint and holds none" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(other / "config.json")]) == 1
    assert "config.json is no folder" in capsys.readouterr().err
    (run / "step-40" / "config.json").unlink()
    (run / "step-40" / "model.safetensors").unlink()
    assert "config.json is missing" in str(verify_all(run / "step-40")[0].damage)


def test_inspect_of_a_damaged_checkpoint_is_refused(run, capsys):
    damage(run / "step-40")
    assert main(["checkpoint", "inspect", str(run / "step-40")]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err
