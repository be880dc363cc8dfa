"""Profiling: what is counted and written, the real loop's operators, and the command."""

import gzip
import json
import subprocess
import sys

import pytest
import torch

from fastdiff import cli, profile
from fastdiff.checkpoint import load_model, save_checkpoint
from fastdiff.flops import count_flops
from fastdiff.generate import packaged_model
from fastdiff.kernel_classes import CLASSES
from fastdiff.profile import named_cpu_kernels, profile_calls
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import PRESETS, UNet, UNetConfig

MIB = 2**20
TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    num_classes=10,
    model_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_num_groups=4,
)


class Work:
    """Two operators a call; the first call does more."""

    def __init__(self, device):
        self.x = torch.ones(MIB // 4, device=device)  # 1 MiB
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            torch.softmax(self.x, 0)
        return torch.exp(self.x).sum()


def test_profile_of_a_call(device, tmp_path):
    work = Work(device)
    result = profile_calls(work, device=device, repeats=2, warmup=1, trace=tmp_path / "a" / "trace.json")
    assert work.calls == 1 + 2 + 1 + (1 + 2)
    assert result.repeats == 2
    assert result.ms > 0
    # a GPU may also clear the counters of the sum's blocks
    launched = {kind: share.launches for kind, share in result.classes.items() if share.launches and kind != "copy"}
    assert launched == {"elementwise": 1, "reduction": 1}
    assert result.launches == sum(share.launches for share in result.classes.values())
    assert 2 <= result.launches <= 3
    assert sum(share.share for share in result.classes.values()) == pytest.approx(1)
    assert sum(share.ms for share in result.classes.values()) == pytest.approx(result.busy_ms)
    assert MIB <= result.working_memory_bytes < 1.1 * MIB  # the exponentials; the sum and its partial sums are small
    assert (result.peak_memory_bytes is None) == (device.type == "cpu")
    names = {event.get("name") for event in json.loads((tmp_path / "a" / "trace.json").read_text())["traceEvents"]}
    assert {"aten::exp", "aten::sum"} < names
    assert "aten::softmax" not in names


def test_large_trace_is_compressed(device, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "COMPRESS_ABOVE_BYTES", 100)
    profile_calls(Work(device), device=device, repeats=1, trace=tmp_path / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
    assert "aten::exp" in gzip.decompress((tmp_path / "trace.json.gz").read_bytes()).decode()


def test_no_repeats(device):
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        profile_calls(Work(device), device=device, repeats=0)


def test_kernels_are_named_only_inside():
    config = torch._inductor.config.cpp
    with named_cpu_kernels():
        assert config.enable_kernel_profile
    assert not config.enable_kernel_profile


# Of a row of ddim with the packaged model, whatever the batch. A change that adds to them has to say what for.
OPERATORS_OF_A_STEP = {
    "convolution": 25,
    "matmul": 8,
    "attention": 4,
    "group_norm": 21,
    "elementwise": 66,
    "reduction": 1,
    "resize": 1,
    "copy": 12,
}


@pytest.fixture
def two_threads():
    """With one thread torch sends small 1x1 convolutions another way, with copies of their bias."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_operators_of_a_sampling_step_on_a_cpu(two_threads):
    loaded, labels = load_model(packaged_model()), torch.tensor([3, 7])

    def operators(steps):
        sampler = Sampler(
            loaded.model, loaded.schedule, solver="ddim", num_inference_steps=steps, prediction_type="v_prediction"
        )
        walk = profile_calls(
            lambda: sampler.sample((2, 1, 8, 8), model_kwargs={"class_labels": labels}),
            device="cpu",
            repeats=1,
            warmup=0,
        )
        return {kind: share.launches for kind, share in walk.classes.items()}

    fewer, more = operators(1), operators(3)
    grown = {kind: (more[kind] - fewer.get(kind, 0)) / 2 for kind in more}
    assert {kind: count for kind, count in grown.items() if count} == OPERATORS_OF_A_STEP


@pytest.fixture
def fastdiff(capsys, tmp_path, monkeypatch):
    """Runs the command line in an empty folder; returns its exit status, stdout and stderr."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setitem(PRESETS, "digits", TINY)

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


def written(folder):
    return sorted(path.name for path in folder.iterdir())


def test_profile_sample(fastdiff, tmp_path):
    torch.manual_seed(0)
    model = UNet(TINY)
    config = {
        "model": TINY.to_dict(),
        "schedule": NoiseSchedule.cosine(20).to_config(),
        "prediction_type": "epsilon",
        "label_dropout": 0.0,
    }
    checkpoint = save_checkpoint(tmp_path / "step-1", weights=model.state_dict(), config=config)
    arguments = ["--num-inference-steps", 2, "--solver", "ddim", "--batch-size", 3, "--repeats", 1, "--out", "a/b"]
    status, out, err = fastdiff("profile", "sample", "--checkpoint", checkpoint, *arguments, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert written(tmp_path / "work" / "a" / "b") == ["profile.json", "profile.md", "trace.json"]
    assert json.loads((tmp_path / "work" / "a" / "b" / "profile.json").read_text()) == report
    assert (report["images"], report["steps"]) == (3, 2)
    one = torch.zeros(3, dtype=torch.int64)
    # the embedding of the timesteps, under 1 % of the work, is not computed for every image
    assert report["flops"] == pytest.approx(2 * count_flops(lambda: model(torch.zeros(3, 1, 8, 8), one, one)), rel=0.01)
    assert report["images_per_s"] == pytest.approx(3000 / report["profile"]["ms"])
    assert report["mfu"] == pytest.approx(
        report["flops"] * 1000 / report["profile"]["ms"] / report["matmul_flops_per_s"]
    )
    assert report["environment"]["torch"] == torch.__version__
    assert set(report["profile"]["classes"]) <= set(CLASSES) - {"other"}


def test_profile_train(fastdiff, tmp_path):
    status, out, err = fastdiff("profile", "train", "--batch-size", 4, "--steps", 1, "--out", "p")
    assert (status, err) == (0, "")
    for text in ("images/s", "MFU", "convolution", "optimizer", "activation memory", "launches", "p"):
        assert text in out
    assert written(tmp_path / "work") == ["p"]
    report = json.loads((tmp_path / "work" / "p" / "profile.json").read_text())
    assert (report["images"], report["steps"]) == (4, 1)
    assert report["parameters"] == sum(parameter.numel() for parameter in UNet(TINY).parameters())
    x, t = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    forward = count_flops(lambda: UNet(TINY)(x, t, t))
    # The backward pass costs twice as much; half of attention's forward more, which computes its scores anew; and less
    # by the gradients of the images and of the sinusoids, which nobody needs.
    scores_anew = 2 * 4 * 64 * 64 * 8
    images, sinusoids = 2 * 4 * 64 * 9 * 8, 2 * 4 * 8 * 32
    assert report["flops"] == 3 * forward + scores_anew - images - sinusoids
    assert report["activation_bytes"] > 4 * 64 * TINY.model_channels * 4  # more than one layer's float32 output
    markdown = (tmp_path / "work" / "p" / "profile.md").read_text()
    assert "| class | ms/step | share | launches/step | holds |" in markdown


BAD_ARGUMENTS = {
    "repeats": (["sample", "--repeats", 0], 2, "repeats must be an integer of at least 1, got 0"),
    "solver": (["sample", "--solver", "leap"], 2, "solver"),
    "preset": (
        ["sample", "--model", "vast"],
        2,
        "model must be None or one of digits, cifar10, imagenet64, got 'vast'",
    ),
    "two models": (["sample", "--model", "digits", "--checkpoint", "x"], 2, "model must be None with a checkpoint"),
    "no checkpoint": (["sample", "--checkpoint", "x"], 1, "checkpoint x does not exist"),
    "batch": (["sample", "--batch-size", 0], 2, "error: batch_size must be an integer of at least 1, got 0"),
    "steps": (["train", "--steps", 0], 2, "steps must be at least 1, got 0"),
    "output of a run": (["train", "--output", "run"], 2, "--output"),
    "no folder": (["train", "--batch-size", 1, "--out", "file/p"], 1, "cannot write to out file/p: "),
    "neither": (["verify"], 2, "verify"),
}


@pytest.mark.parametrize(("arguments", "expected", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_argument(arguments, expected, message, fastdiff, tmp_path):
    (tmp_path / "work" / "file").write_text("not a folder")
    status, out, err = fastdiff("profile", *arguments)
    assert (status, out) == (expected, "")
    assert err.startswith(f"fastdiff profile {arguments[0]}: error: ".replace(" verify", ""))
    assert err.count("\n") == 1
    assert message in err
    assert written(tmp_path / "work") == ["file"]


def test_help_explains_the_figures_without_torch():
    script = "import sys; from fastdiff.cli import main; sys.argv[1:] = ['profile', 'train', '--help']\n"
    script += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "--batch-size" in done.stdout
    assert "--checkpoint-every" not in done.stdout
    for word in ("ms/step", "launches/step", "MFU", *CLASSES):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
