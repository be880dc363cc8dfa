"""What a training run in one process survives: a NaN, a memory that is too small, a full disk, being started again."""

import contextlib
import errno
import json
import os
import shutil
import signal
import weakref
from unittest import mock

import pytest
import torch

from fastdiff import checkpoint, durable_files, processes, train_setup, train_step
from fastdiff.interruption import Interruption
from fastdiff.loss import DiffusionLoss
from fastdiff.train import TrainConfig, train
from fastdiff.train_log import TrainingDiverged, TrainLog
from fastdiff.train_setup import pieces_each
from fastdiff.unet import UNetConfig

pytest.importorskip("sklearn")

TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    model_channels=16,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_num_groups=8,
    num_classes=10,
    dropout=0.1,
)


def options(output, **changes):
    defaults = {
        "output": str(output),
        "steps": 8,
        "batch_size": 12,
        "warmup_steps": 3,
        "log_every": 8,
        "checkpoint_every": 4,
        "sample_every": 0,
        "progress": False,
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **changes})


def losses(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "gradient_norm" in line]


def patch_loss(monkeypatch, change):
    """`change(call, images, gradient)` sees every piece of a batch; calls are counted from 1."""
    objective, calls = DiffusionLoss.__call__, 0

    def call(self, model, images, *arguments, **keywords):
        nonlocal calls
        calls += 1
        loss, output, gradient = objective(self, model, images, *arguments, **keywords)
        change(calls, images, gradient)
        return loss, output, gradient

    monkeypatch.setattr(DiffusionLoss, "__call__", call)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_after_a_gradient_that_is_not_finite_nothing_moves(tmp_path, monkeypatch, value):
    def poison(call, images, gradient):
        if call == 6:
            gradient[0, 0, 0, 0] = value

    seen = []

    def note(step, model):
        seen.append([parameter.detach().clone() for parameter in model.parameters()])

    patch_loss(monkeypatch, poison)
    with pytest.raises(TrainingDiverged, match=r"at step 6; the last checkpoint is .*step-4$"):
        train(options(tmp_path), model_config=TINY, on_step=note)
    assert len(seen) == 8  # the host learnt of it when it read the losses
    assert not all(torch.equal(one, other) for one, other in zip(seen[3], seen[4]))
    for later in seen[5:]:
        assert all(torch.equal(one, other) for one, other in zip(seen[4], later))
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-4"]
    checkpoint.verify(tmp_path / "step-4")


def test_optimizer_and_average_stay_too(monkeypatch, tmp_path):
    def poison(call, images, gradient):
        if call == 2:
            gradient.fill_(float("nan"))

    made = []
    create = train_step.TrainStep.__init__

    def remember(self, *arguments):
        create(self, *arguments)
        made.append(self)

    monkeypatch.setattr(train_step.TrainStep, "__init__", remember)
    patch_loss(monkeypatch, poison)
    states = []

    def note(step, model):
        everything = [*made[0].state().values(), *made[0].ema.model.state_dict().values()]
        states.append([value.clone() for value in everything])

    with pytest.raises(TrainingDiverged, match="no checkpoint was written yet"):
        train(options(tmp_path, steps=3), model_config=TINY, on_step=note)
    assert all(torch.equal(one, other) for one, other in zip(states[0], states[2]))


@pytest.mark.parametrize(("fits", "pieces"), [(6, 2), (3, 4), (1, 12)])
def test_a_batch_that_does_not_fit_is_cut_finer(tmp_path, monkeypatch, fits, pieces):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(options(whole), model_config=TINY)

    def run_out(call, images, gradient):
        if call > 2 and len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    patch_loss(monkeypatch, run_out)
    with pytest.warns(UserWarning, match="do not fit into memory: from step 3 on they are") as caught:
        train(options(cut), model_config=TINY)
    assert f"gradient_accumulation_steps {pieces}" in str(caught[-1].message)
    # sums of the same numbers in another order
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-6)


def test_a_single_image_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    def run_out(call, images, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch_loss(monkeypatch, run_out)
    message = "1 images at a time, a batch in 12 pieces, do not fit into memory"
    with pytest.warns(UserWarning, match="do not fit"), pytest.raises(torch.OutOfMemoryError, match=message):
        train(options(tmp_path), model_config=TINY)


def test_a_full_memory_while_a_graph_is_captured_cuts_finer_as_well(tmp_path, monkeypatch):
    failed = []

    def capture(step, reset, device, pool):
        reset()
        step()
        if not failed:
            failed.append(True)
            raise train_step._OutOfMemory
        return step, None

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(options(whole), model_config=TINY)
    monkeypatch.setattr(train_step, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    create = train_step.TrainStep.__init__

    def capturing(self, *arguments):
        create(self, *arguments)
        self._captures = True

    monkeypatch.setattr(train_step.TrainStep, "__init__", capturing)
    with pytest.warns(UserWarning, match="from step 1 on they are 6"):
        train(options(cut), model_config=TINY)
    assert losses(cut) == pytest.approx(losses(whole), abs=1e-6)


def test_a_full_disk_names_the_file(tmp_path):
    output = tmp_path / "run"
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def fill(step, model):
        if step == 1:
            (output / "log.jsonl").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"cannot write .*run/log\.jsonl: No space left on device$"):
        train(options(output), model_config=TINY, on_step=fill)


@pytest.mark.parametrize(("name", "value"), [("TORCHELASTIC_RUN_ID", "none"), ("SLURM_JOB_ID", "7")])
def test_a_program_that_is_started_again_goes_on_by_itself(tmp_path, monkeypatch, name, value):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(options(whole), model_config=TINY)
    monkeypatch.setenv(name, value)

    def stop(step, model):
        if step == 5:
            raise KeyboardInterrupt

    # nothing is there yet: anew
    with pytest.raises(KeyboardInterrupt):
        train(options(parts), model_config=TINY, on_step=stop)
    assert train(options(parts), model_config=TINY).completed
    left, right = (checkpoint.load_train_state(output / "step-8")[:2] for output in (whole, parts))
    for one, other in zip(left, right):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(parts) == losses(whole)


@pytest.fixture
def run_of_two_checkpoints(tmp_path):
    """Folder of a run that no launcher started."""
    output = tmp_path / "run"
    train(options(output), model_config=TINY)
    return output


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_again(monkeypatch, times):
    """As torchrun --max-restarts does it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(times))


def test_a_refused_run_stays_refused_when_it_is_started_again(run_of_two_checkpoints, monkeypatch):
    before = names(run_of_two_checkpoints)
    for times in (0, 1, 2):
        start_again(monkeypatch, times)
        with pytest.raises(ValueError, match="already holds a run: resume it or choose another folder"):
            train(options(run_of_two_checkpoints, steps=12, keep_last=1), model_config=TINY)
    assert names(run_of_two_checkpoints) == before


@pytest.mark.parametrize("resume", [True, False])
def test_damaged_checkpoints_are_never_written_over(run_of_two_checkpoints, monkeypatch, resume):
    output = run_of_two_checkpoints
    for path in output.glob("step-*/model.safetensors"):
        path.write_bytes(b"")
    log = (output / "log.jsonl").read_text()
    message = "has no undamaged checkpoint to resume from" if resume else "must be empty, or hold a run to resume"
    for times in (0, 1):
        start_again(monkeypatch, times)
        with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="skipped"):
            train(options(output, resume=resume), model_config=TINY)
    assert (output / "log.jsonl").read_text() == log


def test_a_resumed_run_belongs_to_the_launch_that_resumed_it(run_of_two_checkpoints, monkeypatch):
    output = run_of_two_checkpoints
    start_again(monkeypatch, 0)
    assert train(options(output, resume=True), model_config=TINY).completed
    start_again(monkeypatch, 1)
    assert train(options(output), model_config=TINY).completed
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "y")
    with pytest.raises(ValueError, match="already holds a run"):
        train(options(output), model_config=TINY)
    # resumed by hand it belongs to nobody
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    train(options(output, resume=True), model_config=TINY)
    start_again(monkeypatch, 2)
    with pytest.raises(ValueError, match="already holds a run"):
        train(options(output), model_config=TINY)


def test_only_one_run_writes_to_a_folder(run_of_two_checkpoints, tmp_path):
    refused = pytest.raises(ValueError, match=f"output {run_of_two_checkpoints} is being written by process")
    with durable_files.alone_in(run_of_two_checkpoints, "output"), refused:
        train(options(run_of_two_checkpoints, resume=True), model_config=TINY)
    # of a process that was killed
    (run_of_two_checkpoints / ".lock").write_text("process 1 on elsewhere")
    assert train(options(run_of_two_checkpoints, resume=True), model_config=TINY).completed

    def second(step, model):
        with pytest.raises(ValueError, match=r"output .* is being written by process"):
            train(options(tmp_path / "new"), model_config=TINY)

    assert train(options(tmp_path / "new", steps=1), model_config=TINY, on_step=second).completed
    assert ".lock" not in names(tmp_path / "new")


def test_a_run_that_is_faster_to_a_new_folder_keeps_it(run_of_two_checkpoints, tmp_path, monkeypatch):
    load = train_setup.load_data

    def slow(*arguments):
        shutil.copytree(run_of_two_checkpoints, tmp_path / "new")
        return load(*arguments)

    monkeypatch.setattr(train_setup, "load_data", slow)
    with pytest.raises(ValueError, match=r"must be empty, or hold a run to resume, and holds loss\.png"):
        train(options(tmp_path / "new"), model_config=TINY)


def test_a_folder_of_somebody_else_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("kept")
    with pytest.raises(ValueError, match=r"output .* must be empty, .* and holds thesis\.tex: choose another folder"):
        train(options(tmp_path), model_config=TINY)
    assert names(tmp_path) == ["thesis.tex"]


def test_what_a_killed_run_leaves_before_its_first_checkpoint_is_no_obstacle(tmp_path):
    (tmp_path / "step-4.tmp").mkdir()
    (tmp_path / "samples").mkdir()
    for name in ("log.jsonl", ".lock", ".launch", ".log.jsonl.9.tmp"):
        (tmp_path / name).write_text("{}\n")
    assert train(options(tmp_path), model_config=TINY).completed
    assert len(losses(tmp_path)) == 8


@pytest.mark.parametrize("dropped", [False, True])
def test_the_log_survives_a_full_disk_when_it_is_opened_again(tmp_path, monkeypatch, dropped):
    path = tmp_path / "log.jsonl"
    text = '{"step": 1}\n{"step": 2}\n' + ('{"step": 3}\n' if dropped else "")
    path.write_text(text)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=full))
    file = path.stat().st_ino
    with pytest.raises(OSError, match=r"log\.jsonl: No space left") if dropped else contextlib.nullcontext():
        TrainLog(path, start=2)
    assert (path.read_text(), path.stat().st_ino) == (text, file)


def test_another_dtype_by_auto_is_refused(run_of_two_checkpoints, monkeypatch):
    output = run_of_two_checkpoints
    decide = train_setup.device_and_dtype
    assert train(options(output, dtype="float32", resume=True), model_config=TINY).completed
    monkeypatch.setattr(train_setup, "device_and_dtype", lambda *given: (decide(*given)[0], torch.bfloat16))
    message = "dtype must be 'float32' as in the run that resumes from .*step-8, got 'auto', here bfloat16"
    with pytest.raises(ValueError, match=message):
        train(options(output, resume=True), model_config=TINY)
    # a checkpoint that does not say
    averages, tensors, state = checkpoint.load_train_state(output / "step-8")
    del state["dtype"]
    config = checkpoint.load_config(output / "step-8")
    checkpoint.save_checkpoint(output / "step-8", weights=averages, config=config, train_state=tensors, state=state)
    assert train(options(output, resume=True), model_config=TINY).completed


def test_what_was_read_of_a_checkpoint_is_not_kept(run_of_two_checkpoints, monkeypatch):
    shutil.rmtree(run_of_two_checkpoints / "step-8")
    load, read = checkpoint.load_train_state, []

    def remember(directory):
        averages, tensors, state = load(directory)
        read.extend(map(weakref.ref, [*averages.values(), *tensors.values()]))
        return averages, tensors, state

    monkeypatch.setattr(checkpoint, "load_train_state", remember)

    def look(step, model):
        assert [one for one in read if one() is not None] == []

    assert train(options(run_of_two_checkpoints, resume=True), model_config=TINY, on_step=look).completed
    assert read


def test_signals_are_wishes_and_only_ctrl_c_insists():
    with Interruption() as interruption:
        assert not interruption.requested
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert interruption.requested
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("pieces", "count", "each"), [(1, 1, 1), (4, 1, 4), (1, 2, 1), (2, 2, 1), (4, 2, 2), (6, 3, 2), (1, 12, 1)]
)
def test_pieces_are_shared_evenly(pieces, count, each):
    assert pieces_each(TrainConfig(batch_size=12, gradient_accumulation_steps=pieces), count) == each


def test_dropout_takes_the_place_of_the_presets(tmp_path):
    def dropout(output, **changes):
        return train(options(output, steps=1, batch_size=2, **changes)).model.config.dropout

    preset = dropout(tmp_path / "preset")
    assert dropout(tmp_path / "own", dropout=0.25) == 0.25
    assert preset != 0.25
    given = train(options(tmp_path / "given", steps=1, dropout=0.0), model_config=TINY)
    assert given.model.config.dropout == 0


def test_deterministic_is_for_the_run_alone(tmp_path):
    seen = []

    def look(step, model):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))

    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    train(options(tmp_path, steps=1, deterministic=True), model_config=TINY, on_step=look)
    assert seen == [(True, True)]
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before


def test_compile_and_fsdp_exclude_each_other():
    with pytest.raises(ValueError, match="compile must be False with fsdp, got True"):
        TrainConfig(compile=True, fsdp=True)


def test_the_command_that_goes_on_is_torchruns_own(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.launch_command("fastdiff train --seed 1") == "fastdiff train --seed 1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    rest = "--nproc-per-node 8 --max-restarts 3 -m fastdiff -- train --seed 1"
    assert processes.launch_command("fastdiff train --seed 1") == f"torchrun --standalone {rest}"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert processes.launch_command("fastdiff train --seed 1") == f"torchrun --nnodes 2 {rest}"


def test_an_image_that_cannot_be_read_stops_the_run_before_it_leaves_traces(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png is not a readable image"):
        train(options(tmp_path / "run", dataset=f"folder:{folder}"))
    assert not (tmp_path / "run").exists()
