"""Training on two real processes: the same result as on one, and what a lost process or a signal leaves behind.

A run with gradient_accumulation_steps=2 computes the same two pieces in one process or in two, to the same bits; so is
their sum. FSDP adds the gradients of a skip connection in another order, which is rounding.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import checkpoint
from fastdiff.train import train
from fastdiff.train_config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from distributed_worker import MODEL

pytest.importorskip("sklearn")

WORKER = Path(__file__).with_name("distributed_worker.py")
STEPS = 50


def options(output, **changes):
    defaults = {
        "output": str(output),
        "steps": STEPS,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "horizontal_flip": True,
        # DDPM's. The bias of attention's keys has no gradient but rounding, which AdamW scales up to its rate.
        "learning_rate": 2e-4,
        "lr_schedule": "constant",
        "warmup_steps": 3,
        "log_every": 10,
        "checkpoint_every": STEPS,
        "sample_every": 0,
        "progress": False,
        "device": "cpu",
    }
    return {**defaults, **changes}


def torchrun(*words, restarts=0):
    """The finished process: two workers under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )


def outcomes(finished):
    """What both workers said of each run, by its folder's name and rank."""
    lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"run"')]
    return {(Path(line["run"]).name, line["rank"]): line for line in lines}


def losses(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["gradient_norm"]) for line in lines if "gradient_norm" in line]


def tensors(output, step=STEPS):
    averages, state, _ = checkpoint.load_train_state(output / f"step-{step}")
    return {**averages, **state}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of the run of one process."""
    output = tmp_path_factory.mktemp("alone") / "alone"
    train(TrainConfig(**options(output, checkpoint_every=20)), model_config=MODEL)
    return output


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """Folder of all runs that two processes do one after the other, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    for name in ("resumed", "resumed_fsdp", "damaged"):
        shutil.copytree(alone, folder / name)
        shutil.rmtree(folder / name / f"step-{STEPS}")
    runs = [
        (options(folder / "ddp"), {}),
        (options(folder / "fsdp", fsdp=True), {}),
        (options(folder / "resumed", resume=True), {}),
        (options(folder / "resumed_fsdp", resume=True, fsdp=True), {}),
        (options(folder / "pieces", steps=2, gradient_accumulation_steps=4), {}),
        (options(folder / "pieces_fsdp", steps=2, gradient_accumulation_steps=4, fsdp=True), {}),
        (options(folder / "half", steps=2, dtype="bfloat16", fsdp=True), {}),
        (options(folder / "odd", batch_size=9, gradient_accumulation_steps=1), {}),
        (options(folder / "uneven", batch_size=9, gradient_accumulation_steps=3), {}),
        (options(folder / "damaged", resume=True), {"full": True}),
        (options(alone), {}),
        (options(folder / "nan", steps=4, checkpoint_every=2), {"nan": True, "at": 3}),
        (options(folder / "nan_fsdp", steps=4, checkpoint_every=2, fsdp=True), {"nan": True, "at": 3}),
    ]
    finished = torchrun(str(WORKER), json.dumps(runs))
    assert finished.returncode != 0, finished.stdout  # the last run
    return folder, outcomes(finished)


def test_two_replicas_train_the_same_weights_as_one(alone, together):
    assert losses(together[0] / "ddp") == losses(alone)
    assert_equal(tensors(together[0] / "ddp"), tensors(alone))


def test_two_shards_train_the_same_weights_to_rounding(alone, together):
    """Promised are 1e-6: some ten roundings of 2^-24 of weights and losses around 1."""
    for one, other in zip(losses(alone), losses(together[0] / "fsdp"), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    left, right = tensors(alone), tensors(together[0] / "fsdp")
    assert left.keys() == right.keys()
    weights = [name for name in left if not name.startswith("optimizer.")]
    assert max(float((left[name] - right[name]).abs().max()) for name in weights) < 1e-6


def test_a_run_goes_on_with_more_processes_and_in_shards(alone, together):
    assert_equal(tensors(together[0] / "resumed"), tensors(alone))
    left, right = tensors(alone), tensors(together[0] / "resumed_fsdp")
    assert max(float((left[name] - right[name]).abs().max()) for name in left if "optimizer." not in name) < 1e-6


def test_all_processes_return_the_whole_model(together):
    _, said = together
    for name in ("ddp", "fsdp"):
        ends = [said[name, rank] for rank in (0, 1)]
        assert ends[0]["averages"] == ends[1]["averages"]
        assert [(end["step"], end["completed"]) for end in ends] == [(STEPS, True)] * 2


@pytest.mark.parametrize(("name", "dtype"), [("pieces", "float32"), ("pieces_fsdp", "float32"), ("half", "bfloat16")])
def test_a_process_computes_its_share_in_pieces_and_any_dtype(tmp_path, together, name, dtype):
    pieces = 4 if "pieces" in name else 2
    config = options(tmp_path / "one", steps=2, gradient_accumulation_steps=pieces, dtype=dtype)
    train(TrainConfig(**config), model_config=MODEL)
    # sums of four in another order; of bfloat16, with its eps of 2^-8, shards keep the norms' weights too
    tolerance = 1e-6 if dtype == "float32" else 2**-8
    for one, other in zip(losses(tmp_path / "one"), losses(together[0] / name), strict=True):
        assert one == pytest.approx(other, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd", "ValueError: batch_size must be a multiple of the 2 processes, got 9"),
        ("uneven", "ValueError: gradient_accumulation_steps must be a multiple of the 2 processes, or less, got 3"),
        ("damaged", "CheckpointError: cannot write checkpoint {folder}/damaged/step-50: No space left on device"),
        ("alone", "ValueError: output {output} already holds a run: resume it or choose another folder"),
    ],
)
def test_what_goes_wrong_is_told_by_all_processes(alone, together, name, message):
    folder, said = together
    for rank in (0, 1):
        assert said[name, rank]["error"] == message.format(folder=folder, output=alone)


def test_a_full_disk_leaves_the_last_checkpoint(together):
    damaged = together[0] / "damaged"
    assert sorted(path.name for path in damaged.glob("step-*")) == ["step-20", "step-40"]
    checkpoint.verify(damaged / "step-40")


@pytest.mark.parametrize("name", ["nan", "nan_fsdp"])
def test_a_nan_in_one_process_stops_all_and_harms_nothing(together, name):
    folder, said = together
    for rank in (0, 1):
        assert said[name, rank]["error"].startswith("TrainingDiverged: loss ")
        assert said[name, rank]["error"].endswith(f"at step 3; the last checkpoint is {folder / name / 'step-2'}")
        # the losses were read after step 4
        first, second, third, fourth = said[name, rank]["weights"]
        assert first != second
        assert second == third == fourth
    assert [path.name for path in (folder / name).glob("step-*")] == ["step-2"]
    checkpoint.verify(folder / name / "step-2")


def test_a_killed_process_is_survived(alone, tmp_path):
    output = tmp_path / "run"
    run = (options(output, steps=20, checkpoint_every=10), {"kill": True, "at": 13})
    finished = torchrun(str(WORKER), json.dumps([run]), restarts=1)
    assert finished.returncode == 0, finished.stdout
    assert outcomes(finished)["run", 0]["step"] == 20
    assert losses(output) == losses(alone)[:20]
    assert_equal(tensors(output, 20), tensors(alone, 20))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves_and_prints_the_command_that_goes_on(tmp_path, name):
    output = tmp_path / "my run"
    finished = torchrun(str(WORKER), json.dumps([(options(output, steps=1000), {"signal": name, "at": 7})]))
    assert finished.returncode != 0
    said = outcomes(finished)
    step = said["my run", 0]["step"]
    assert 7 < step < 1000
    assert [said["my run", rank]["completed"] for rank in (0, 1)] == [False, False]
    checkpoint.verify(output / f"step-{step}")
    told = [line for line in finished.stdout.splitlines() if line.startswith("stopped after")]
    start = f"stopped after step {step}; continue with: torchrun --standalone --nproc-per-node 2 -m fastdiff -- train "
    assert len(told) == 1
    assert told[0].startswith(start)
    words = shlex.split(told[0].split("continue with: ")[1])
    assert words[-1] == "--resume"
    assert str(output) in words
