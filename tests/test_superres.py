"""Super-resolution: what the model is shown, how it is scored, and that training beats bicubic enlargement."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import cli, superres
from fastdiff.data import load_dataset
from fastdiff.images import save_png
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import train
from fastdiff.train_config import TrainConfig
from fastdiff.unet import UNet, UNetConfig

pytest.importorskip("sklearn")


def images(count: int = 5, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_low_resolution_is_the_rounded_mean_of_squares():
    source = images()
    small = superres.low_resolution(source, 4)
    assert small.dtype == torch.uint8
    expected = source.double().unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    assert (small.double() - expected).abs().max() <= 0.5
    with pytest.raises(ValueError, match="superres_factor"):
        superres.low_resolution(source, 3)


def test_the_condition_is_bicubic_and_knows_no_more_than_the_low_resolution():
    source = images()
    shown = superres.condition(source, 2)
    assert shown.shape == source.shape
    assert shown.abs().max() <= 1
    # moving a bright pixel within its square changes nothing
    moved = source.clone()
    moved[:, :, 0, 0], moved[:, :, 1, 1] = source[:, :, 1, 1], source[:, :, 0, 0]
    assert torch.equal(superres.condition(moved, 2), shown)
    flat = superres.condition(torch.full((1, 1, 8, 8), 200, dtype=torch.uint8), 2)
    torch.testing.assert_close(flat, torch.full_like(flat, 200 / 127.5 - 1))


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 1, 4, 4)
    # peak to peak 2, errors 0.2 and 0.02: 20 dB and 40 dB
    noisy = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), -0.02)])
    assert superres.psnr(noisy, reference) == pytest.approx(30.0, abs=1e-4)


def test_a_model_that_knows_the_answer_scores_high_and_a_blind_one_low():
    source = images(4)
    truth = source.float() / 127.5 - 1

    def oracle(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The image whose condition this is."""
        which = [int(((superres.condition(source, 2) - one) ** 2).flatten(1).sum(1).argmin()) for one in condition]
        return truth[which]

    schedule = NoiseSchedule.cosine()
    score = superres.evaluate(oracle, schedule, "sample", source, 2, samples_per_image=3, batch_size=5)
    assert score.mean_of_samples > 100
    assert (score.images, score.samples_per_image) == (4, 3)
    assert score.bicubic == pytest.approx(superres.psnr(superres.condition(source, 2), truth))
    blind = superres.evaluate(lambda x, t, condition: 0 * x, schedule, "sample", source, 2)
    assert blind.mean_of_samples < score.bicubic


def test_the_unet_takes_its_condition_and_refuses_another():
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_num_groups=4,
        condition_channels=2,
    )
    model, x, t = UNet(config), torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 9])
    assert UNetConfig.from_dict(config.to_dict()) == config
    with torch.no_grad():
        model.conv_out.weight.normal_()
        first, second = (model(x, t, condition=torch.full((3, 2, 8, 8), value)) for value in (0.0, 1.0))
    assert first.shape == (3, 1, 8, 8)
    assert not torch.equal(first, second)
    for wrong in (None, torch.zeros(3, 1, 8, 8), torch.zeros(3, 2, 4, 4)):
        with pytest.raises(ValueError, match="condition must have shape"):
            model(x, t, condition=wrong)
    with pytest.raises(ValueError, match="condition must be None"):
        UNet.preset("digits")(x, t, condition=torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match="condition_channels"):
        UNetConfig.from_dict({**config.to_dict(), "condition_channels": -1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """100 steps, a fiftieth of what the default recipe takes in images seen."""
    output = tmp_path_factory.mktemp("superres")
    config = TrainConfig(
        task="superres", steps=100, batch_size=64, warmup_steps=20, ema_decay=0.9, output=str(output), progress=False
    )
    return train(config)


def test_training_beats_bicubic_by_more_than_a_decibel(trained):
    score = trained.superres
    assert score is not None
    assert score.images == len(load_dataset("digits", split="held_out"))
    assert score.gain >= 1.0
    logged = [json.loads(line) for line in (trained.checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["superres"]["bicubic"] == score.bicubic


def test_sampling_from_the_checkpoint_enlarges_image_files(trained, tmp_path, capsys):
    held_out = load_dataset("digits", split="held_out").images[:3]
    paths = []
    for index, image in enumerate(superres.low_resolution(held_out, 2)):
        paths.append(str(tmp_path / f"{index}.png"))
        save_png(image, paths[-1])
    out = tmp_path / "large.npy"
    words = ["sample", "--checkpoint", str(trained.checkpoint), "--out", "None", "--save-npy", str(out)]
    assert cli.main([*words, "--input", *paths]) == 0
    drawn = torch.from_numpy(np.load(out))
    assert drawn.shape == (3, 1, 8, 8)
    reference = held_out.float() / 127.5 - 1
    assert superres.psnr(drawn, reference) > superres.psnr(superres.condition(held_out, 2), reference)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "input is needed"),
        (["missing.png"], "missing.png is not a readable image"),
        (["a.png", "b.png"], "must have one size"),
    ],
)
def test_bad_inputs_are_one_sentence(trained, tmp_path, monkeypatch, capsys, inputs, message):
    monkeypatch.chdir(tmp_path)
    for name, size in {"a.png": 4, "b.png": 6}.items():
        save_png(torch.zeros(1, size, size, dtype=torch.uint8), name)
    words = ["sample", "--checkpoint", str(trained.checkpoint), "--out", str(tmp_path / "x.png")]
    assert cli.main([*words, *(["--input", *inputs] if inputs else [])]) == cli.BAD_ARGUMENT
    assert message in capsys.readouterr().err


def test_a_model_for_generation_takes_no_input(tmp_path, capsys):
    assert cli.main(["sample", "--input", "a.png", "--out", str(tmp_path / "x.png")]) == cli.BAD_ARGUMENT
    assert "input must be None" in capsys.readouterr().err
