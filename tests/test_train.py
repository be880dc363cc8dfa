import dataclasses
import json
import math
import os
import signal
import sys

import pytest
import torch

from fastdiff import checkpoint
from fastdiff.data import load_dataset
from fastdiff.loss import DiffusionLoss
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import TrainConfig, train
from fastdiff.train_log import Throughput, TrainingDiverged, TrainLog
from fastdiff.unet import UNetConfig

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
)


def options(output, **changes):
    defaults = {
        "output": str(output),
        "steps": 20,
        "batch_size": 6,
        "warmup_steps": 3,
        "log_every": 4,
        "checkpoint_every": 10,
        "sample_every": 0,
        "progress": False,
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **changes})


def log_of(output):
    """What the run logged, apart from how fast it was."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "images_per_s" not in line]


def assert_same_checkpoint(left, right):
    (averages, tensors, state), (other_averages, other_tensors, other_state) = map(
        checkpoint.load_train_state, (left, right)
    )
    assert state["step"] == other_state["step"]
    assert averages.keys() == other_averages.keys()
    assert tensors.keys() == other_tensors.keys()
    different = [name for name in averages if not torch.equal(averages[name], other_averages[name])]
    different += [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
    assert not different


def test_300_steps_learn_the_digits(tmp_path):
    config = options(
        tmp_path,
        steps=300,
        batch_size=16,
        warmup_steps=20,
        learning_rate=4e-3,
        ema_decay=0.98,
        prediction_type="epsilon",
        schedule="linear",
        checkpoint_every=300,
    )
    result = train(config, model_config=TINY)
    held_out = load_dataset("digits", split="held_out")
    objective = DiffusionLoss(schedule=NoiseSchedule.linear(), prediction_type="epsilon")
    # The best constant guess at unit noise is 0.
    constant = objective.evaluate(lambda x, t, class_labels: torch.zeros_like(x), held_out.images, held_out.labels)
    assert abs(float(constant) - 1) < 0.05
    assert result.held_out_loss < float(constant) / 3
    assert result.held_out_loss < 0.16  # 0.12 when it was written
    loaded = checkpoint.load_model(result.checkpoint)
    again = objective.evaluate(loaded.model, held_out.images, held_out.labels)
    assert float(again) == result.held_out_loss == log_of(tmp_path)[-1]["held_out_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prediction_type": "epsilon", "schedule": "linear", "horizontal_flip": True, "gradient_accumulation_steps": 3},
        {"weighting": "min_snr", "lr_schedule": "constant", "max_grad_norm": None, "weight_decay": 0.1},
    ],
    ids=["recipe", "accumulated", "min_snr"],
)
def test_resumed_run_is_bit_equal(tmp_path, changes):
    # Dropout draws from torch's generator, and 300 images of 6 make a resumed batch straddle two epochs.
    model_config = dataclasses.replace(TINY, dropout=0.2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(options(whole, **changes), model_config=model_config)

    def interrupt(step, model):
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    first = train(options(parts, **changes), model_config=model_config, on_step=interrupt)
    assert not first.completed
    torch.manual_seed(99)  # the generator's state is not what a new process would have either
    second = train(options(parts, resume=True, **changes))
    assert second.completed
    for step in (10, 20):
        assert_same_checkpoint(whole / f"step-{step}", parts / f"step-{step}")
    assert log_of(whole) == log_of(parts)


def test_interruption_saves_and_prints_the_command_to_continue(tmp_path, capsys):
    def interrupt(step, model):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = train(options(tmp_path, seed=5), model_config=TINY, on_step=interrupt)
    assert (result.step, result.completed) == (3, False)
    assert result.checkpoint == tmp_path / "step-3"
    checkpoint.verify(result.checkpoint)
    printed = capsys.readouterr().out
    assert printed.startswith("stopped after step 3; continue with: fastdiff train ")
    assert "--seed 5" in printed
    assert printed.rstrip().endswith("--resume")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_nan_stops_the_run_at_its_step_and_keeps_the_checkpoint(tmp_path):
    def poison(step, model):
        if step == 13:
            with torch.no_grad():
                model.conv_in.weight[0, 0, 0, 0] = math.nan

    with pytest.raises(TrainingDiverged, match=r"loss nan .* at step 14; the last checkpoint is .*step-10"):
        train(options(tmp_path), model_config=TINY, on_step=poison)
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "step-10"
    weights, tensors, _ = checkpoint.load_train_state(tmp_path / "step-10")
    assert all(value.isfinite().all() for value in [*weights.values(), *tensors.values()])
    assert [line["step"] for line in log_of(tmp_path)][-1] == 13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, for which the host could wait")
def test_steps_do_not_wait_for_the_device(tmp_path):
    def forbid_waiting(step, model):
        # The first steps allocate and tune; the log reads the loss at step 8.
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 7 else "default")

    try:
        config = options(tmp_path, steps=8, log_every=8, device="cuda", horizontal_flip=True)
        assert train(config, model_config=TINY, on_step=forbid_waiting).completed
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    once, pieces = tmp_path / "once", tmp_path / "pieces"
    train(options(once, steps=2), model_config=TINY)
    train(options(pieces, steps=2, gradient_accumulation_steps=3), model_config=TINY)
    for one, other in zip(log_of(once)[:2], log_of(pieces)[:2]):
        # Sums of up to a few thousand float32 terms in another order: sqrt(5000) * 6e-8 = 4e-6; the norm sums squares.
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
        assert math.isclose(one["gradient_norm"], other["gradient_norm"], rel_tol=1e-4)


def test_learning_rate_warms_up_and_decays(tmp_path):
    train(options(tmp_path, learning_rate=0.01, warmup_steps=4, steps=8), model_config=TINY)
    rates = [line["learning_rate"] for line in log_of(tmp_path) if "loss" in line]
    cosine = [0.01 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, *cosine])


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction", "edm"])
def test_every_target_learns(tmp_path, prediction_type):
    schedule = {"flow_prediction": "flow", "edm": "edm"}.get(prediction_type, "cosine")
    config = options(
        tmp_path,
        prediction_type=prediction_type,
        schedule=schedule,
        learning_rate=5e-3,
        steps=40,
        batch_size=16,
        checkpoint_every=40,
        ema_decay=0.5,
    )
    result = train(config, model_config=TINY)
    objective = DiffusionLoss(
        schedule=checkpoint.load_model(result.checkpoint).schedule, prediction_type=prediction_type
    )
    held_out = load_dataset("digits", split="held_out")
    zero = objective.evaluate(lambda x, t, class_labels: torch.zeros_like(x), held_out.images, held_out.labels)
    assert result.held_out_loss < 0.7 * float(zero)


def test_run_folder_holds_log_curve_pictures_and_description(tmp_path):
    config = options(tmp_path, steps=4, sample_every=4, num_train_timesteps=10)
    result = train(config, model_config=TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"step-4", "log.jsonl", "loss.png", "samples"}
    from PIL import Image

    # Four rows of ten classes, 8 pixels each with a border of 1, enlarged 8 times.
    assert Image.open(tmp_path / "samples" / "step-4.png").size == (8 * (10 * 9 + 1), 8 * (4 * 9 + 1))
    description = checkpoint.load_config(result.checkpoint)
    assert description["image_shape"] == [1, 8, 8]
    assert description["class_names"] == [str(digit) for digit in range(10)]
    assert description["command"] == config.command()
    assert description["step"] == 4
    assert UNetConfig.from_dict(description["model"]) == TINY


def test_speed_and_activations_are_logged_and_told(tmp_path):
    result = train(options(tmp_path, steps=4), model_config=TINY)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    speed = [line for line in lines if "images_per_s" in line]
    assert speed == [{"step": 4, "images_per_s": result.images_per_s, "activation_bytes": result.activation_bytes}]
    # The input of the first residual block alone, 6 images of 16 x 8 x 8 float32, is 24 KiB.
    assert 24 * 1024 < result.activation_bytes < 2**24
    mebibytes = result.activation_bytes / 2**20
    assert f"{result.images_per_s:.0f} images/s, activations {mebibytes:.1f} MiB: " in result.describe()
    # A single step has no time to speak of: it compiles and allocates.
    assert train(options(tmp_path / "short", steps=1), model_config=TINY).images_per_s is None


def test_the_clock_of_the_steps_stands_still_between_them(monkeypatch):
    now = iter([10.0, 12.0, 50.0, 53.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    throughput = Throughput()
    throughput.add(7)
    throughput.stop()  # nothing was started
    assert throughput.images_per_s is None
    for images in (4, 6):
        throughput.start()
        throughput.add(images)
        throughput.stop()
    assert throughput.images_per_s == 10 / 5


def test_unlabelled_data_trains_an_unconditional_model(tmp_path):
    config = options(tmp_path, steps=1, batch_size=2, class_conditional=False)
    result = train(config)
    assert result.model.config.num_classes is None
    assert checkpoint.load_config(result.checkpoint)["class_names"] is None


def test_missing_matplotlib_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"no loss curve without matplotlib: pip install fastdiff\[plot\]") as caught:
        train(options(tmp_path, steps=4, checkpoint_every=2), model_config=TINY)
    assert len(caught) == 1
    assert not (tmp_path / "loss.png").exists()


def test_failing_compiler_is_one_warning(tmp_path, monkeypatch):
    def broken(function, **_):
        def call(*args, **kwargs):
            raise RuntimeError("no working C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile failed") as caught:
        result = train(options(tmp_path, steps=2, compile=True), model_config=TINY)
    assert len(caught) == 1
    assert result.completed


def test_resume_refuses_options_that_decide_the_weights(tmp_path):
    train(options(tmp_path, steps=2), model_config=TINY)
    with pytest.raises(ValueError, match=r"batch_size must be 6 as in the run that resumes from .*step-2, got 12"):
        train(options(tmp_path, steps=4, batch_size=12, resume=True))
    with pytest.raises(ValueError, match="model_config must be that of"):
        train(options(tmp_path, steps=4, resume=True), model_config=dataclasses.replace(TINY, model_channels=8))
    with pytest.raises(ValueError, match="already holds a run: resume it or choose another folder"):
        train(options(tmp_path), model_config=TINY)


def test_resume_needs_a_checkpoint_and_a_writable_folder(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="has no undamaged checkpoint to resume from"):
        train(options(tmp_path, resume=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot write to output .*file/run"):
        train(options(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("model", "unet", "one of digits, cifar10, imagenet64"),
        ("schedule", "quadratic", "one of linear, scaled_linear, cosine, sigmoid, flow, edm"),
        ("prediction_type", "score", "one of epsilon, sample, v_prediction, flow_prediction, edm"),
        ("weighting", "p2", "one of uniform, min_snr"),
        ("lr_schedule", "linear", "one of constant, cosine"),
        ("dtype", "float16", "one of auto, float32, bfloat16"),
        ("cuda_graph", "yes", "one of auto, True, False"),
        ("image_size", 0, "at least 1"),
        ("num_train_timesteps", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("steps", 2.5, "an integer"),
        ("batch_size", -1, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("gradient_accumulation_steps", 5, "a divisor of batch_size 128"),
        ("log_every", 0, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("sample_every", -1, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", math.nan, "greater than 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("max_grad_norm", 0.0, "greater than 0"),
        ("min_snr_gamma", 0.0, "greater than 0"),
        ("label_dropout", 1.0, "in [0, 1)"),
        ("ema_decay", 1.0, "in [0, 1)"),
        ("seed", -1, "in [0, 2^63)"),
        ("seed", True, "an integer"),
    ],
)
def test_bad_option_is_named(field, value, accepted):
    with pytest.raises(ValueError) as error:
        TrainConfig(**{field: value})
    assert str(error.value) == f"{field} must be {accepted}, got {value!r}"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps", "meta"])
def test_bad_device_is_named(tmp_path, device):
    with pytest.raises(ValueError, match=f"device must be .*, got '{device}'"):
        train(options(tmp_path, device=device))


def test_command_lists_what_differs_from_the_defaults():
    options = {"steps": 10, "class_conditional": False, "horizontal_flip": True, "cuda_graph": False}
    config = TrainConfig(**options, dataset="folder:my images")
    expected = "fastdiff train --dataset 'folder:my images' --horizontal-flip --no-class-conditional --steps 10"
    assert config.command() == f"{expected} --cuda-graph False"


def test_preset_follows_the_image_size(tmp_path):
    """8x8 is the size of the preset; at 16x16 the attention stays on its level, which is now 8x8."""
    result = train(options(tmp_path, image_size=16, steps=1, batch_size=2))
    assert (result.model.config.sample_size, result.model.config.attention_resolutions) == (16, (8,))


def test_image_size_that_a_preset_cannot_halve_is_named(tmp_path):
    with pytest.raises(ValueError, match="image_size must be a multiple of 8 for model cifar10, got 28"):
        train(options(tmp_path, image_size=28, model="cifar10"))


def test_a_log_line_that_a_crash_cut_off_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    TrainLog(path, start=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_only_the_newest_checkpoints_and_every_so_many_steps_are_kept(tmp_path):
    config = options(tmp_path, steps=7, checkpoint_every=1, keep_last=2, keep_every=3)
    train(config, model_config=TINY)
    kept = sorted(int(path.name[5:]) for path in tmp_path.glob("step-*"))
    assert kept == [3, 6, 7]
