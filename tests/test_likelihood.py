"""Bits a dimension and the loss by timestep: against guided-diffusion's loop, formulas, and a model that is exact."""

import json
import math

import mpmath
import numpy as np
import pytest
import torch

from fastdiff.checkpoint import save_checkpoint
from fastdiff.cli import main
from fastdiff.compat.guided_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from fastdiff.data import load_dataset
from fastdiff.eval_config import EvalLikelihoodConfig
from fastdiff.generate import packaged_model
from fastdiff.likelihood import (
    FIRST_DRAW,
    bin_edges,
    evaluate_likelihood,
    loss_by_timestep,
    pixel_log_probability,
    variational_bound,
)
from fastdiff.noise import normal
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet, UNetConfig

N = 8
SCHEDULE = NoiseSchedule.from_betas(np.linspace(0.02, 0.3, N))
TYPES = ["epsilon", "sample", "v_prediction", "flow_prediction", "edm"]


def pixels(*shape):
    """uint8, the two ends among them."""
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 255
    return images


def smooth_model(x, t):
    """A stand-in for a network: float32, one result an element, told the time."""
    return 0.8 * torch.tanh(x + 0.05 * t.float().view(-1, 1, 1, 1))


def x0_of(prediction_type, x, output, alpha, sigma):
    """x_0 of what a model says about x = alpha * x_0 + sigma * eps, as each paper writes it."""
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return alpha * x - sigma * output
    if prediction_type == "flow_prediction":
        return (x - sigma * output) / (alpha + sigma)
    level = sigma / alpha
    skip, out = 0.25 / (level**2 + 0.25), 0.5 * level / (level**2 + 0.25) ** 0.5
    return skip * x / alpha + out * output


def input_of(prediction_type, x, alpha, sigma):
    """What the model is shown of x."""
    return x / alpha / ((sigma / alpha) ** 2 + 0.25) ** 0.5 if prediction_type == "edm" else x


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_bound_is_that_of_guided_diffusion(prediction_type, variance, monkeypatch):
    images = pixels(3, 2, 4, 4)
    found = variational_bound(smooth_model, SCHEDULE, prediction_type, images, variance=variance, seed=5)
    told = torch.tensor(SCHEDULE.timestep_condition(prediction_type), dtype=torch.float32)
    alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma

    def predicts_x0(x, t):
        a, s = alpha[t[0]], sigma[t[0]]
        shown = input_of(prediction_type, x, a, s)
        return x0_of(prediction_type, x, smooth_model(shown.float(), told[t]).double(), a, s)

    diffusion = GaussianDiffusion(
        betas=SCHEDULE.betas,
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType[variance.upper()],
        loss_type=LossType.MSE,
    )
    noises = (normal(images.shape, seed=5, stream="train", draw=FIRST_DRAW - t).double() for t in range(N)[::-1])
    monkeypatch.setattr(torch, "randn_like", lambda _: next(noises))
    # the original approximates the distribution function to 3e-4
    monkeypatch.setattr(
        "fastdiff.compat.guided_diffusion.losses.approx_standard_normal_cdf", lambda x: torch.special.ndtr(x)
    )
    expected = diffusion.calc_bpd_loop(predicts_x0, images.double() / 127.5 - 1)
    # Ours takes a float32 x_t below 4, rounded by 1e-7 at random, and so x_0 by up to 3e-7 (alpha > 0.4). Times twice
    # the error of x_0, about 0.6, times its weight, at most 25 (beta >= 0.02), a mean of 32, in bits: 1.2e-6.
    torch.testing.assert_close(found.terms.flip(1), expected["vb"], rtol=0, atol=5e-6)
    torch.testing.assert_close(found.prior, expected["prior_bpd"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.total, expected["total_bpd"], rtol=0, atol=1e-5)


def test_bound_of_an_exact_model_is_the_entropy_of_the_data():
    """Pixels that are black or white with equal chance hold one bit. Their posterior mean is a tanh.

    The first steps are small, so that the decoder's Gaussian is narrow beside a bin, and all are, so that the steps
    back are nearly Gaussian.
    """
    schedule = NoiseSchedule.from_betas(np.geomspace(1e-6, 0.2, 400))
    alpha, sigma = (torch.tensor(table, dtype=torch.float32) for table in (schedule.alpha, schedule.sigma))

    def posterior_mean(x, t):
        at = t.long()
        return torch.tanh(x * (alpha[at] / sigma[at] ** 2).view(-1, 1, 1, 1))

    images = (torch.arange(2000) % 2 * 255).to(torch.uint8).view(-1, 1, 1, 1)

    def bits(model, variance):
        bound = variational_bound(model, schedule, "sample", images, variance=variance, batch_size=2000)
        return bound.total.mean().item(), bound.total.std().item() / 2000**0.5

    mean, error = bits(posterior_mean, "fixed_small")
    assert error < 0.01
    # from above by what a Gaussian step leaves, a few thousandths here
    assert 1 - 4 * error < mean < 1.02 + 4 * error
    # what is wrong costs bits: a variance made for other data, a prediction that is not the mean
    assert bits(posterior_mean, "fixed_large")[0] > mean + 0.1
    assert bits(lambda x, t: 0.9 * posterior_mean(x, t), "fixed_small")[0] > mean + 0.1


def test_terms_of_a_model_that_knows_the_image():
    images = pixels(1, 1, 2, 4)
    x0 = images.float() / 127.5 - 1
    found = variational_bound(lambda x, t: x0, SCHEDULE, "sample", images, variance="fixed_small")
    # x_0 from uint8 in float64 and in float32: 1e-7, squared
    torch.testing.assert_close(found.terms[:, 1:], torch.zeros(1, N - 1).double(), rtol=0, atol=1e-11)
    large = variational_bound(lambda x, t: x0, SCHEDULE, "sample", images, variance="fixed_large")
    ratio = SCHEDULE.posterior_variance[1:] / SCHEDULE.betas[1:]
    expected = torch.tensor(0.5 * (ratio - 1 - np.log(ratio)) / math.log(2))[None]
    torch.testing.assert_close(large.terms[:, 1:], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(large.terms[:, 0], found.terms[:, 0])


@pytest.mark.parametrize("std", [0.004, 0.05, 1.0])
def test_mass_of_pixels(std):
    levels = torch.arange(256).double() / 127.5 - 1
    for mean in (-1.3, -1.0, 0.0013, 0.7):
        logs = pixel_log_probability(levels, torch.full_like(levels, mean), std)
        # float64, 256 terms
        assert logs.exp().sum().item() == pytest.approx(1, abs=1e-12)
        with mpmath.workdps(60):
            for level in (0, 1, 100, 128, 254, 255):
                low, high = ((levels[level].item() + side / 255 - mean) / std for side in (-1, 1))
                below = 0 if level == 0 else mpmath.ncdf(low)
                above = 1 if level == 255 else mpmath.ncdf(high)
                if above - below > 0:  # 60 digits see no further
                    # the bin's edges are rounded to 1e-16, in units of std, at up to 500 of them
                    assert logs[level].item() == pytest.approx(float(mpmath.log(above - below)), rel=1e-9)
        assert logs.isfinite().all()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_loss_by_timestep(prediction_type):
    images, bins = pixels(5, 2, 4, 4), 3
    found = loss_by_timestep(smooth_model, SCHEDULE, prediction_type, images, bins=bins, seed=7, batch_size=2)
    assert found.shape == (5, bins)
    assert bin_edges(SCHEDULE, bins) == [0, 2, 5, 8]
    told = torch.tensor(SCHEDULE.timestep_condition(prediction_type), dtype=torch.float32)
    table = SCHEDULE.training_table(prediction_type).double()
    for i in range(5):
        fraction = i * (5**0.5 - 1) / 2 % 1
        for column, (low, high) in enumerate([(0, 2), (2, 5), (5, 8)]):
            t = low + int(fraction * (high - low))
            index = torch.tensor([i])
            eps = normal((1, 2, 4, 4), seed=7, sample_indices=index, stream="train", draw=FIRST_DRAW - t).double()
            x0 = images[i : i + 1].double() / 127.5 - 1
            shown = table[t, 0] * x0 + table[t, 1] * eps
            target = table[t, 2] * x0 + table[t, 3] * eps
            expected = (smooth_model(shown.float(), told[[t]]).double() - target).square().mean()
            # float32 sums of 32 squares of errors below 10
            assert found[i, column].item() == pytest.approx(expected.item(), rel=1e-5)


def test_mean_loss_of_the_packaged_model_is_what_its_training_measured():
    config = json.loads((packaged_model() / "config.json").read_text())
    found = evaluate_likelihood(EvalLikelihoodConfig(bits_per_dim=False, bins=4, num=100, device="cpu"))
    losses = [row[2] for row in found.losses]
    error = sum(row[3] ** 2 for row in found.losses) ** 0.5 / 4
    # training's figure has one timestep an image: about twice the standard error, and other images
    assert np.mean(losses) == pytest.approx(config["held_out_loss"], abs=4 * 3 * error)
    assert error < 0.01
    assert found.bits_per_dim is None
    assert "bits/dim" not in found.describe()


def write_model(directory, *, schedule=SCHEDULE, prediction_type="v_prediction", **config):
    fields = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_classes": 10, **config.pop("model", {})}
    shape = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    model_config = UNetConfig(**shape, norm_num_groups=4, **fields)
    torch.manual_seed(0)
    model = UNet(model_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    settings = {
        "model": model_config.to_dict(),
        "schedule": schedule.to_config(),
        "prediction_type": prediction_type,
        "dataset": "digits",
        **config,
    }
    return save_checkpoint(directory, weights=model.state_dict(), config=settings)


def test_results_depend_on_seed_and_index_alone(tmp_path):
    checkpoint = write_model(tmp_path / "step-1")

    def evaluate(**options):
        return evaluate_likelihood(EvalLikelihoodConfig(checkpoint=checkpoint, device="cpu", bins=2, **options))

    whole, parts = evaluate(num=11), evaluate(num=11, batch_size=3)
    assert evaluate(num=11) == whole
    # a convolution's sums of another batch size may be rounded differently
    assert parts.bits_per_dim == pytest.approx(whole.bits_per_dim, rel=1e-5)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    assert evaluate(num=11, seed=1).bits_per_dim != pytest.approx(whole.bits_per_dim, rel=1e-5)
    images = load_dataset("digits", split="held_out").images
    first, more = (variational_bound(smooth_model, SCHEDULE, "epsilon", images[:count]) for count in (4, 9))
    torch.testing.assert_close(first.terms, more.terms[:4], rtol=0, atol=0)


def test_command_line(tmp_path, capsys):
    words = ["eval", "likelihood", "--checkpoint", str(write_model(tmp_path / "step-1")), "--device", "cpu"]
    assert main([*words, "--num", "6", "--bins", "3", "--seed", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = evaluate_likelihood(
        EvalLikelihoodConfig(checkpoint=tmp_path / "step-1", device="cpu", num=6, bins=3, seed=4)
    )
    assert report == json.loads(json.dumps(expected.to_dict()))
    assert report["dataset"] == "digits (held_out)"
    assert (report["num_images"], report["seed"], report["variance"]) == (6, 4, "fixed_large")
    assert report["bits_per_dim"] > report["decoder_bits_per_dim"] > 0
    assert [(row["first_timestep"], row["stop_timestep"]) for row in report["losses"]] == [(0, 2), (2, 5), (5, 8)]
    assert all(row["standard_error"] > 0 for row in report["losses"])
    assert main([*words, "--num", "6", "--bins", "3", "--seed", "4"]) == 0
    table = capsys.readouterr().out
    assert f"bits/dim  {report['bits_per_dim']:.4f} ± {report['bits_per_dim_standard_error']:.4f}" in table
    assert f"   2 - 4     {report['losses'][1]['mean_squared_error']:.5f}" in table
    assert main([*words, "--num", "1", "--bins", "1"]) == 0  # one image has no standard error
    assert "± 0.0000" in capsys.readouterr().out


def test_conditional_and_unconditional_models(tmp_path):
    """A model of super-resolution is shown the small image; one without classes gets no labels."""
    shown = {"num_classes": None, "condition_channels": 1}
    enlarges = write_model(tmp_path / "step-1", model=shown, task="superres", superres_factor=2)
    plain = write_model(tmp_path / "step-2", model={"num_classes": None})
    for checkpoint in (enlarges, plain):
        found = evaluate_likelihood(EvalLikelihoodConfig(checkpoint=checkpoint, num=3, device="cpu", bins=2))
        assert math.isfinite(found.bits_per_dim)


def test_models_and_options_that_do_not_fit(tmp_path, capsys):
    flow = write_model(tmp_path / "flow", schedule=NoiseSchedule.flow(N), prediction_type="flow_prediction")
    blind = write_model(
        tmp_path / "blind", schedule=SCHEDULE.rescale_zero_terminal_snr(), prediction_type="epsilon", dataset=None
    )
    classes = write_model(tmp_path / "classes", model={"num_classes": 3})
    coloured = write_model(tmp_path / "coloured", model={"in_channels": 3, "out_channels": 3})
    learned = write_model(tmp_path / "learned", model={"out_channels": 2})
    cases = [
        (flow, [], "bits_per_dim needs a schedule of kind vp, this model's is flow"),
        (blind, ["--dataset", "digits"], "bits_per_dim is undefined for prediction_type='epsilon' where alpha = 0"),
        (blind, [], "dataset must be given: the checkpoint does not say what it was trained on"),
        (classes, [], "dataset digits has 10 classes, this model was trained with 3"),
        (coloured, [], "dataset digits has images of 1 channels, this model takes 3"),
        (learned, [], "likelihood takes models of a fixed variance"),
        (classes, ["--bins", "0"], "bins must be an integer of at least 1, got 0"),
        (flow, ["--bins", "9"], "bins must be 1 to 8, the timesteps of this model, got 9"),
        (flow, ["--seed", "-1"], "seed must be in [0, 2^63), got -1"),
    ]
    for checkpoint, words, message in cases:
        command = ["eval", "likelihood", "--checkpoint", str(checkpoint), "--device", "cpu", "--bins", "2", *words]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"fastdiff eval likelihood: error: {message}")
        assert error.count("\n") == 1
    # a flow has losses, if no bound
    words = ["--no-bits-per-dim", "--num", "3", "--bins", "2", "--device", "cpu"]
    assert main(["eval", "likelihood", "--checkpoint", str(flow), *words]) == 0
    assert "mean squared error (flow_prediction)" in capsys.readouterr().out
