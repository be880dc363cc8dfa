"""Bulk sampling: every index exactly once and the same bytes, whatever is killed and however many processes draw."""

import errno
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import bulk
from fastdiff.bulk import generate_many
from fastdiff.bulk_config import BulkConfig
from fastdiff.checkpoint import load_model, save_checkpoint
from fastdiff.cli import main
from fastdiff.generate import generate, packaged_model
from fastdiff.sample_config import SampleConfig

# 5 blocks, the last one of 2 samples
OPTIONS = {"num": 18, "batch_size": 4, "num_inference_steps": 2, "device": "cpu"}
WORDS = ["--num", "18", "--batch-size", "4", "--num-inference-steps", "2", "--device", "cpu"]


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file, but for the date of none is in them."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """What an uninterrupted run of one process writes."""
    out = tmp_path_factory.mktemp("bulk") / "whole"
    result = generate_many(BulkConfig(out=out, **OPTIONS))
    assert (result.drawn, result.completed, result.out) == (18, True, out)
    return contents(out)


def launch(out: Path, *words: str, processes: int | None = None) -> subprocess.Popen:
    """`fastdiff generate`, under torchrun where there are processes, with as many threads as this one."""
    command = [sys.executable, "-m"]
    if processes:
        # without the dashes torchrun would take --num for an abbreviation of its own options
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "fastdiff", "--"]
    else:
        command += ["fastdiff"]
    command += ["generate", "--out", str(out), *WORDS, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TRITON_INTERPRET": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_files_are_the_samples_of_their_indices(whole, tmp_path):
    out = tmp_path / "samples.npy"
    generate(SampleConfig(out=None, save_npy=out, num=18, batch_size=4, num_inference_steps=2, device="cpu"))
    assert sorted(whole) == [*(f"{i:06}.png" for i in range(18)), "generation.json"]
    generate_many(BulkConfig(out=tmp_path / "again", **OPTIONS))
    for i, sample in enumerate(np.load(out)):
        pixels = np.asarray(Image.open(tmp_path / "again" / f"{i:06}.png"), dtype=int)
        # the last block is padded here and is not there: one level of 8 bits
        assert abs(pixels - np.round((sample[0] + 1) * 127.5)).max() <= 1


def test_killed_run_goes_on_with_two_processes_to_the_same_bytes(whole, tmp_path, monkeypatch):
    out, renamed = tmp_path / "out", 0
    replace = os.replace

    def dies(source, target):
        nonlocal renamed
        renamed += 1
        if renamed == 8:  # after the settings, within the second block
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        generate_many(BulkConfig(out=out, **OPTIONS))
    monkeypatch.undo()
    (out / ".000007.png.1.tmp").write_bytes(b"half a picture")
    before = contents(out)
    assert 0 < len(before) < len(whole)
    second = launch(out, "--resume", "--json", processes=2)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert contents(out) == whole
    drawn = [json.loads(part + "}")["drawn"] for part in output.split("}") if '"drawn"' in part]
    # the first block was whole; four blocks of 4, 4, 4 and 2 were left, two for each process
    assert sorted(drawn) == [6, 8]


def test_sigterm_ends_after_a_block_and_names_the_command_that_goes_on(whole, tmp_path):
    out = tmp_path / "out"
    running = launch(out, "--num", "2000")
    deadline = time.monotonic() + 120
    while not (out / "000000.png").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 130
    pictures = list(out.glob("*.png"))
    assert 0 < len(pictures) < 2000
    assert len(pictures) % 4 == 0
    assert not list(out.glob(".*"))
    options = f"--num-inference-steps 2 --batch-size 4 --device cpu --out {out} --num 2000"
    assert output.strip().endswith(f"continue with: fastdiff generate {options} --resume")


def test_npz_is_one_array_as_fid_tools_read_it_and_the_same_bytes_after_an_interruption(tmp_path, monkeypatch):
    config = BulkConfig(out=tmp_path / "out", format="npz", class_labels=(3, 1), **OPTIONS)
    result = generate_many(config)
    assert result.out == tmp_path / "out" / "samples_18x8x8x1.npz"
    array = np.load(result.out)["arr_0"]
    assert (array.shape, array.dtype) == ((18, 8, 8, 1), np.uint8)
    assert sorted(path.name for path in config.out.iterdir()) == ["generation.json", result.out.name]
    again = tmp_path / "again"
    monkeypatch.setattr(bulk._Blocks, "join", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate_many(BulkConfig(out=again, format="npz", class_labels=(3, 1), **OPTIONS))
    monkeypatch.undo()
    resumed = generate_many(BulkConfig(out=again, format="npz", class_labels=(3, 1), resume=True, **OPTIONS))
    assert resumed.drawn == 0
    assert resumed.out.read_bytes() == result.out.read_bytes()
    # resumed once more there is nothing left to do
    assert generate_many(BulkConfig(out=again, format="npz", class_labels=(3, 1), resume=True, **OPTIONS)).drawn == 0


def test_folders_that_hold_something_else_are_left_as_they_are(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"out .* must be an empty folder"):
        generate_many(BulkConfig(out=tmp_path, **OPTIONS))
    with pytest.raises(ValueError, match=r"out .* must be an empty folder"):
        generate_many(BulkConfig(out=tmp_path, resume=True, **OPTIONS))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_other_options_do_not_mix_with_the_samples_that_are_there(tmp_path):
    generate_many(BulkConfig(out=tmp_path / "out", **OPTIONS))
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out .* holds samples already"):
        generate_many(BulkConfig(out=tmp_path / "out", **OPTIONS))
    for name, value in {"seed": 1, "batch_size": 5, "num_inference_steps": 3, "format": "npz"}.items():
        with pytest.raises(ValueError, match=f"{name} must be .* as in the samples that .* holds, got {value!r}"):
            generate_many(BulkConfig(out=tmp_path / "out", resume=True, **{**OPTIONS, name: value}))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("failing", ["write", "flush"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(whole, failing, tmp_path, monkeypatch, capsys):
    """A disk says that it is full when a file is written, or only when it is flushed."""
    # the settings, the first block, two pictures of the second; of flushes the folder's too
    calls, allowed = itertools.count(), {"write": 6, "flush": 9}[failing]
    module, name = {"write": (bulk, "save_png"), "flush": (os, "fsync")}[failing]
    real = getattr(module, name)

    def full(*arguments, **options):
        if next(calls) >= allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(module, name, full)
    out = tmp_path / "out"
    assert main(["generate", *WORDS, "--out", str(out)]) == 1
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"cannot write {out}/000006.png: No space left on device" in error
    # of the second block nothing counts
    assert sorted(path.name for path in out.iterdir()) == [*(f"{i:06}.png" for i in range(4)), "generation.json"]
    assert generate_many(BulkConfig(out=out, resume=True, **OPTIONS)).drawn == 14
    assert contents(out) == whole


def test_a_limit_on_the_size_of_files_stops_the_joined_array_and_it_is_joined_later(tmp_path):
    """For real, by the operating system: a block has 384 bytes, all samples together have more than 1,200."""
    out = tmp_path / "out"
    script = "import resource, sys; from fastdiff.cli import main\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
    script += "sys.exit(main(sys.argv[1:]))"
    words = ["generate", *WORDS, "--format", "npz", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    joined = out / "samples_18x8x8x1.npz"
    assert (done.returncode, done.stderr) == (1, f"fastdiff generate: error: cannot write {joined}: File too large\n")
    assert sorted(path.suffix for path in out.iterdir()) == [".json", *[".npy"] * 5]
    assert generate_many(BulkConfig(out=out, format="npz", resume=True, **OPTIONS)).drawn == 0
    assert len(np.load(joined)["arr_0"]) == 18


def test_a_second_run_is_refused_while_the_first_one_lives_and_no_longer(tmp_path):
    out = tmp_path / "out"
    running = launch(out, "--num", "2000")
    deadline = time.monotonic() + 120
    while not (out / "000000.png").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    options = {**OPTIONS, "num": 2000}
    with pytest.raises(ValueError, match=rf"out .* is being written by process {running.pid} on "):
        generate_many(BulkConfig(out=out, resume=True, **options))
    running.kill()
    running.communicate()
    assert (out / ".lock").exists()
    # it gets as far as the settings
    with pytest.raises(ValueError, match="seed must be 0 as in the samples"):
        generate_many(BulkConfig(out=out, resume=True, **{**options, "seed": 1}))
    assert not (out / ".lock").exists()


def test_a_launch_that_starts_its_program_again_goes_on_by_itself(whole, tmp_path, monkeypatch):
    out, write = tmp_path / "out", bulk._Blocks.write
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    def dies(blocks, block, images):
        if block == 2:
            raise KeyboardInterrupt
        write(blocks, block, images)

    with monkeypatch.context() as patch:
        patch.setattr(bulk._Blocks, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            generate_many(BulkConfig(out=out, **OPTIONS))
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "y")
        for times in ("0", "1"):
            patch.setenv("TORCHELASTIC_RESTART_COUNT", times)
            with pytest.raises(ValueError, match=r"out .* holds samples already"):
                generate_many(BulkConfig(out=out, **OPTIONS))
    assert generate_many(BulkConfig(out=out, **OPTIONS)).drawn == 10
    assert contents(out) == whole
    # what is done is nobody's to go on with
    with pytest.raises(ValueError, match=r"out .* holds samples already"):
        generate_many(BulkConfig(out=out, **OPTIONS))


def test_progress_tells_how_long_it_will_take(tmp_path, capsys):
    generate_many(BulkConfig(out=tmp_path / "out", **OPTIONS), progress=True)
    # done, of all, since when, for how long still
    assert re.search(r"18/18 \[\d\d:\d\d<\d\d:\d\d, .* images/s\]", capsys.readouterr().err)


def test_leftovers_of_a_kill_and_empty_files_are_drawn_anew(whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".generation.json.7.tmp").write_text("{")
    generate_many(BulkConfig(out=out, resume=True, **OPTIONS))
    (out / "000005.png").write_bytes(b"")
    assert generate_many(BulkConfig(out=out, resume=True, **OPTIONS)).drawn == 4
    assert contents(out) == whole


def test_another_checkpoint_does_not_go_on_with_the_samples(tmp_path):
    copy = tmp_path / "model"
    loaded = load_model(packaged_model())
    save_checkpoint(copy, weights=loaded.model.state_dict(), config=loaded.config)
    generate_many(BulkConfig(out=tmp_path / "out", checkpoint=copy, **OPTIONS))
    save_checkpoint(copy, weights=loaded.model.state_dict(), config={**loaded.config, "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="checkpoint_sha256 must be"):
        generate_many(BulkConfig(out=tmp_path / "out", checkpoint=copy, resume=True, **OPTIONS))


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_damaged_settings_are_named(content, tmp_path):
    generate_many(BulkConfig(out=tmp_path, **OPTIONS))
    (tmp_path / "generation.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation.json is damaged"):
        generate_many(BulkConfig(out=tmp_path, resume=True, **OPTIONS))


@pytest.mark.parametrize(("name", "value"), [("num", 0), ("batch_size", 0), ("format", "gif"), ("dtype", "int8")])
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        BulkConfig(**{name: value})


def test_command_names_what_differs_from_the_defaults(tmp_path):
    config = BulkConfig(out=tmp_path, num=7, class_labels=(1, 2), compile=True, resume=True)
    assert config.command() == f"fastdiff generate --class-labels 1 2 --compile --out {tmp_path} --num 7"
