"""The command line, end to end: what it writes, what it says, and what it does about bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli
from fastdiff.checkpoint import save_checkpoint
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import PRESETS, UNet, UNetConfig

SIZE, NUM_CLASSES = 4, 3
FAST = ["--num-inference-steps", "2"]


def tiny_unet(**fields):
    defaults = {"sample_size": SIZE, "in_channels": 1, "out_channels": 1, "num_classes": NUM_CLASSES}
    shape = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    return UNetConfig(**{**defaults, **shape, "norm_num_groups": 4, **fields})


def write_checkpoint(directory, *, num_classes=NUM_CLASSES, channels=1, bias=0.0, **config):
    model_config = tiny_unet(num_classes=num_classes, in_channels=channels, out_channels=channels)
    torch.manual_seed(0)
    model = UNet(model_config)
    with torch.no_grad():
        for parameter in model.parameters():  # the last convolution starts at zero: labels would not matter
            parameter.add_(0.1 * torch.randn_like(parameter) + bias)
    settings = {
        "model": model_config.to_dict(),
        "schedule": NoiseSchedule.cosine(20).to_config(),
        "prediction_type": "v_prediction",
        **config,
    }
    return save_checkpoint(directory, weights=model.state_dict(), config=settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "step-1")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def fastdiff(capsys):
    """Runs the command line in this process; returns its exit status, stdout and stderr."""

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_sample_writes_picture_and_array(fastdiff, checkpoint, tmp_path):
    status, out, err = fastdiff(
        "sample", "--checkpoint", checkpoint, *FAST, "--num", 5, "--out", "grid.png", "--save-npy", "a/b.npy"
    )
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    assert "images/s" in out
    assert "grid.png, a/b.npy" in out
    array = np.load("a/b.npy")
    assert array.dtype == np.float32
    assert array.shape == (5, 1, SIZE, SIZE)
    assert -1 <= array.min() < array.max() <= 1
    # 3 classes side by side, every pixel a square of 64 / 4 = 16, samples one such pixel apart
    picture = np.asarray(Image.open("grid.png"))
    assert picture.shape == ((2 * (SIZE + 1) + 1) * 16, (3 * (SIZE + 1) + 1) * 16)
    pixels = picture[::16, ::16]
    np.testing.assert_array_equal(np.repeat(np.repeat(pixels, 16, 0), 16, 1), picture)
    for i, sample in enumerate(np.round((array[:, 0] + 1) * 127.5).astype(np.uint8)):
        top, left = 1 + i // 3 * (SIZE + 1), 1 + i % 3 * (SIZE + 1)
        np.testing.assert_array_equal(pixels[top : top + SIZE, left : left + SIZE], sample)
    assert written(tmp_path / "work") == ["a", "grid.png"]


def test_sample_json_and_label_cycle(fastdiff, checkpoint):
    arguments = ["--num", 5, "--class-labels", 2, 0, "--solver", "ddpm", "--seed", 7, "--out", "None"]
    status, out, err = fastdiff(
        "sample", "--checkpoint", checkpoint, *FAST, *arguments, "--save-npy", "x.npy", "--json"
    )
    result = json.loads(out)
    assert (status, err) == (0, "")
    assert result["labels"] == [2, 0, 2, 0, 2]
    assert result["files"] == ["x.npy"]
    assert (result["images"], result["solver"], result["num_inference_steps"]) == (5, "ddpm", 2)
    assert result["guidance_scale"] == 1.5
    assert result["images_per_second"] == pytest.approx(5 / result["seconds"])


def test_labels_seed_and_batch_size(fastdiff, checkpoint):
    def draw(*arguments):
        status, *_ = fastdiff(
            "sample", "--checkpoint", checkpoint, *FAST, "--num", 5, "--save-npy", "x.npy", *arguments
        )
        assert status == 0
        return np.load("x.npy")

    first = draw()
    np.testing.assert_array_equal(draw(), first)
    assert np.abs(draw("--seed", 1) - first).max() > 0.1
    assert np.abs(draw("--class-labels", 1)[0] - first[0]).max() > 1e-4
    assert np.abs(draw("--guidance-scale", 1) - first).max() > 1e-4
    # the noise is the same; convolutions of another batch size may round differently: half an 8-bit level
    np.testing.assert_allclose(draw("--batch-size", 2), first, atol=1 / 255)


def test_newest_checkpoint_of_a_run(fastdiff, tmp_path):
    write_checkpoint(tmp_path / "run" / "step-2")
    write_checkpoint(tmp_path / "run" / "step-10")
    status, out, _ = fastdiff("sample", "--checkpoint", tmp_path / "run", *FAST, "--num", 1, "--json")
    assert status == 0
    assert json.loads(out)["checkpoint"] == str(tmp_path / "run" / "step-10")


BAD_ARGUMENTS = {
    "label too large": (["--class-labels", 1, 3], "class_labels must be in [0, 2], got 3"),
    "negative label": (["--class-labels", -1], "class_labels must be in [0, 2], got -1"),
    "unknown solver": (["--solver", "leap"], "solver"),
    "no steps": (["--num-inference-steps", 0], "num_inference_steps must be an integer of at least 1, got 0"),
    "too many steps": (["--num-inference-steps", 21], "num_inference_steps"),
    "no samples": (["--num", 0], "num must be"),
    "negative seed": (["--seed", -1], "seed must be in [0, 2^63), got -1"),
    "not a number": (["--num", "many"], "--num"),
    "unknown option": (["--nmu", 3], "--nmu"),
    "unknown device": (["--device", "tpu3000"], "device must be"),
    "missing GPU": (["--device", "cuda:99"], "device must be"),
    "unknown dtype": (["--dtype", "int8"], "int8"),
    "guidance not finite": (["--guidance-scale", "nan"], "guidance_scale must be a finite number"),
    "not a PNG": (["--out", "x.jpg"], "out must end in .png"),
    "nothing to write": (["--out", "None"], "out and save_npy are both None"),
    "one file twice": (["--out", "x.png", "--save-npy", "x.png"], "must be two files"),
    "unexpected word": (["digits"], "digits"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_argument(arguments, message, fastdiff, checkpoint, tmp_path):
    status, out, err = fastdiff("sample", "--checkpoint", checkpoint, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fastdiff sample: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert written(tmp_path / "work") == []


@pytest.mark.parametrize("arguments", [[], ["smaple"], ["--frob"]], ids=["none", "misspelt", "option"])
def test_bad_command(arguments, fastdiff):
    status, out, err = fastdiff(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fastdiff: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--guidance-scale", 2], "without a null class, got 2.0"), (["--class-labels", 0], "a model without classes")],
    ids=["guidance", "labels"],
)
def test_model_without_classes(arguments, message, fastdiff, tmp_path):
    directory = write_checkpoint(tmp_path / "step-1", num_classes=None)
    status, _, err = fastdiff("sample", "--checkpoint", directory, *FAST, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    status, out, _ = fastdiff("sample", "--checkpoint", directory, *FAST, "--num", 2, "--json")
    assert status == 0
    assert json.loads(out)["guidance_scale"] is None


def test_null_class_that_was_never_trained(fastdiff, tmp_path):
    directory = write_checkpoint(tmp_path / "step-1", label_dropout=0.0)
    status, _, err = fastdiff("sample", "--checkpoint", directory, *FAST, "--guidance-scale", 2)
    assert (status, "without a null class" in err) == (2, True)


def test_channels_that_no_png_has(fastdiff, tmp_path):
    directory = write_checkpoint(tmp_path / "step-1", channels=2)
    status, _, err = fastdiff("sample", "--checkpoint", directory, *FAST)
    assert (status, "a PNG has 1 or 3" in err) == (2, True)
    status, *_ = fastdiff(
        "sample", "--checkpoint", directory, *FAST, "--num", 1, "--out", "None", "--save-npy", "x.npy"
    )
    assert (status, np.load("x.npy").shape) == (0, (1, 2, SIZE, SIZE))


def test_missing_and_damaged_checkpoint(fastdiff, tmp_path):
    status, _, err = fastdiff("sample", "--checkpoint", tmp_path / "nowhere")
    assert (status, err) == (1, f"fastdiff sample: error: checkpoint {tmp_path / 'nowhere'} does not exist\n")
    weights = write_checkpoint(tmp_path / "step-1") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    status, _, err = fastdiff("sample", "--checkpoint", tmp_path / "step-1")
    assert (status, err.count("\n")) == (1, 1)
    assert f"{weights} is damaged" in err
    assert written(tmp_path / "work") == []


@pytest.mark.parametrize("option", ["--out", "--save-npy"])
@pytest.mark.parametrize("place", ["file/x.png", "folder.png"])
def test_unwritable_output_is_found_before_sampling(place, option, fastdiff, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "sample", lambda *_, **__: pytest.fail("sampled before the output was opened"))
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.png").mkdir()
    status, _, err = fastdiff("sample", "--checkpoint", checkpoint, *FAST, option, tmp_path / place)
    assert (status, err.count("\n")) == (1, 1)
    assert f"cannot write to {tmp_path / place}: " in err
    assert written(tmp_path / "work") == []


@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt, 130), (RuntimeError("out of memory"), 1)])
def test_failure_leaves_files_as_they_were(error, expected, fastdiff, checkpoint, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Sampler, "sample", fail)
    (tmp_path / "work" / "x.png").write_text("before")
    status, out, err = fastdiff("sample", "--checkpoint", checkpoint, *FAST, "--out", "x.png", "--save-npy", "y.npy")
    assert (status, out) == (expected, "")
    assert err == ("" if error is KeyboardInterrupt else "fastdiff sample: error: out of memory\n")
    assert written(tmp_path / "work") == ["x.png"]
    assert (tmp_path / "work" / "x.png").read_text() == "before"


def test_samples_that_are_not_finite(fastdiff, tmp_path):
    directory = write_checkpoint(tmp_path / "step-1", bias=float("nan"))
    status, _, err = fastdiff("sample", "--checkpoint", directory, *FAST)
    assert (status, err.count("\n")) == (1, 1)
    assert "are not finite" in err
    assert written(tmp_path / "work") == []


def test_train_then_sample(fastdiff, monkeypatch):
    monkeypatch.setitem(PRESETS, "digits", tiny_unet(sample_size=8, num_classes=10))
    options = ["--steps", 2, "--batch-size", 4, "--sample-every", 0, "--no-progress", "--num-train-timesteps", 20]
    status, out, err = fastdiff("train", *options, "--output", "run")
    assert status == 0, err
    assert "step-2" in out
    assert "held-out loss" in out
    status, out, err = fastdiff("train", *options, "--output", "run")
    assert (status, "already holds a run" in err) == (2, True)
    status, out, _ = fastdiff("sample", "--checkpoint", "run", *FAST, "--num", 2, "--save-npy", "x.npy")
    assert (status, np.load("x.npy").shape) == (0, (2, 1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", 0], "steps must be at least 1, got 0"), (["--dataset", "digitz"], "dataset must be digits")],
    ids=["value", "dataset"],
)
def test_train_bad_argument(arguments, message, fastdiff):
    status, _, err = fastdiff("train", "--no-progress", "--output", "run", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"fastdiff train: error: {message}")


def test_env(fastdiff):
    status, out, _ = fastdiff("env", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["torch"] == torch.__version__
    assert report["cores"] >= 1
    assert report["packages"]["numpy"] == np.__version__
    status, out, _ = fastdiff("env")
    assert status == 0
    assert torch.__version__ in out


def test_traceback_on_request(fastdiff, monkeypatch):
    monkeypatch.setenv("FASTDIFF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="num must be"):
        fastdiff("sample", "--num", 0)


def test_help_is_quick_because_torch_is_not_imported():
    script = "import sys; from fastdiff.cli import main; sys.argv[1:] = ['sample', '--help']\n"
    script += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "--guidance-scale" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_module_as_a_process(checkpoint, tmp_path):
    command = [sys.executable, "-m", "fastdiff", "sample", "--checkpoint", str(checkpoint), "--num", "3"]
    done = subprocess.run([*command, "--class-labels", "9"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastdiff sample: error: class_labels must be in [0, 2], got 9\n"
