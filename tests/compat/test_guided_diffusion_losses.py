"""guided-diffusion's losses and likelihoods against float64 formulas written element by element."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fastdiff.compat.guided_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    discretized_gaussian_log_likelihood,
    normal_kl,
)

N = 8
BETAS = np.linspace(0.02, 0.3, N)
SHAPE = (3, 2, 4)
# float64 against float64: a few roundings of terms below 100
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def diffusion(loss="MSE", mean="EPSILON", var="FIXED_SMALL"):
    return GaussianDiffusion(
        betas=BETAS,
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        loss_type=LossType[loss],
    )


class Network(torch.nn.Module):
    """Smooth, with a parameter for each half of its output."""

    def __init__(self, learned):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.variance = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64)) if learned else None

    def forward(self, x, t):
        mean = self.mean * torch.tanh(x + 0.1 * t.view(-1, 1, 1))
        return mean if self.variance is None else torch.cat([mean, self.variance * torch.sin(3 * x)], dim=1)


@pytest.fixture
def images():
    """8-bit pixels in [-1, 1], the two ends among them."""
    pixels = torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, :2] = torch.tensor([0, 255])
    return pixels.double() / 127.5 - 1


def kl(mean1, variance1, mean2, variance2):
    gaussians = (torch.distributions.Normal(m, v**0.5) for m, v in ((mean1, variance1), (mean2, variance2)))
    return torch.distributions.kl_divergence(*gaussians)


def decoder_nll(x, mean, std):
    """Ho et al. 2020, equation 13, with the tanh approximation of the distribution function."""

    def cdf(value):
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    def one(x, mean, std):
        above = 1.0 if x > 0.999 else cdf((x + 1 / 255 - mean) / std)
        below = 0.0 if x < -0.999 else cdf((x - 1 / 255 - mean) / std)
        return -math.log(max(above - below, 1e-12))

    return double([one(*values) for values in zip(*(v.flatten().tolist() for v in (x, mean, std)))]).view(x.shape)


def bound(made, x0, x, t, output):
    """A term of the bound, in bits a dimension, of a sample at the timestep t."""
    alphas_cumprod = np.cumprod(1 - BETAS)
    bar, beta = alphas_cumprod[t], BETAS[t]
    bar_prev = alphas_cumprod[t - 1] if t > 0 else 1.0
    small = BETAS[max(t, 1)] * (1 - alphas_cumprod[max(t, 1) - 1]) / (1 - alphas_cumprod[max(t, 1)])

    def mean_of(x_start):
        return math.sqrt(bar_prev) * beta / (1 - bar) * x_start + math.sqrt(1 - beta) * (1 - bar_prev) / (1 - bar) * x

    kind, variance_kind = made.model_mean_type.name, made.model_var_type.name
    mean, v = output[:2], output[2:]
    if kind != "PREVIOUS_X":
        mean = mean_of((x - math.sqrt(1 - bar) * mean) / math.sqrt(bar) if kind == "EPSILON" else mean)
    if variance_kind == "LEARNED_RANGE":
        variance = torch.exp((1 + v) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small))
    elif variance_kind == "LEARNED":
        variance = v.exp()
    else:
        large = beta if t > 0 else small
        variance = torch.full_like(x, small if variance_kind == "FIXED_SMALL" else large)
    if t == 0:
        return decoder_nll(x0, mean, variance.sqrt()).mean().item() / math.log(2)
    return kl(mean_of(x0), double(small), mean, variance).mean().item() / math.log(2)


def noised(x0, t, noise):
    bar = torch.from_numpy(np.cumprod(1 - BETAS)[t]).view(-1, 1, 1)
    return bar.sqrt() * x0 + (1 - bar).sqrt() * noise


@pytest.mark.parametrize("var_type", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean_type", ["EPSILON", "START_X", "PREVIOUS_X"])
@pytest.mark.parametrize("loss_type", ["MSE", "RESCALED_MSE", "KL", "RESCALED_KL"])
def test_training_losses(images, loss_type, mean_type, var_type):
    made, learned = diffusion(loss_type, mean_type, var_type), var_type.startswith("LEARNED")
    model, t = Network(learned), torch.tensor([0, 5, N - 1])
    noise = torch.randn(SHAPE, dtype=torch.float64)
    terms = made.training_losses(model, images, t, noise=noise)
    x_t = noised(images, t, noise)
    output = model(x_t, t).detach()
    vb = double([bound(made, images[i], x_t[i], int(t[i]), output[i]) for i in range(3)])
    if loss_type in ("KL", "RESCALED_KL"):
        assert terms.keys() == {"loss"}
        torch.testing.assert_close(terms["loss"], vb * (N if loss_type == "RESCALED_KL" else 1), **TIGHT)
        return
    target = {"EPSILON": noise, "START_X": images}.get(mean_type)
    if target is None:
        target = made.q_posterior_mean_variance(images, x_t, t)[0]
    mse = ((output[:, :2] - target) ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(terms["mse"], mse, **TIGHT)
    if learned:
        torch.testing.assert_close(terms["vb"], vb * (N / 1000 if loss_type == "RESCALED_MSE" else 1), **TIGHT)
        mse = mse + terms["vb"]
    assert ("vb" in terms) == learned
    torch.testing.assert_close(terms["loss"], mse, **TIGHT)


def test_the_bound_trains_the_variance_alone(images):
    model = Network(learned=True)
    terms = diffusion(var="LEARNED_RANGE").training_losses(model, images, torch.tensor([0, 5, N - 1]))
    mean, variance = torch.autograd.grad(terms["vb"].sum(), list(model.parameters()), retain_graph=True)
    assert mean.item() == 0
    assert variance.item() != 0
    (mean,) = torch.autograd.grad(terms["mse"].sum(), [model.mean])
    assert mean.item() != 0


def test_losses_are_differentiable(images):
    """Gradients of the full bound through `q_sample` and the model, against central differences."""
    made, model, t = diffusion("KL", var="LEARNED"), Network(learned=True), torch.tensor([0, 5, N - 1])
    noise = torch.randn(SHAPE, dtype=torch.float64)
    made.training_losses(model, images, t, noise=noise)["loss"].sum().backward()
    step = 1e-5
    for parameter in model.parameters():
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter += sign * step
                ends.append(made.training_losses(model, images, t, noise=noise)["loss"].sum())
                parameter -= sign * step
        # step² times a third derivative of order 10, and roundings of 1e-14 / step
        assert parameter.grad.item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), rel=1e-6, abs=1e-6)


def test_the_whole_bound(images):
    made, model = diffusion(var="LEARNED_RANGE"), Network(learned=True)
    torch.manual_seed(0)
    out = made.calc_bpd_loop(model, images, clip_denoised=False)
    torch.manual_seed(0)
    vb, mse, xstart_mse = [], [], []
    for t in range(N)[::-1]:
        noise = torch.randn_like(images)
        x_t = noised(images, torch.full((3,), t), noise)
        output = model(x_t, torch.full((3,), t)).detach()
        bar = np.cumprod(1 - BETAS)[t]
        x0 = (x_t - math.sqrt(1 - bar) * output[:, :2]) / math.sqrt(bar)
        vb.append(double([bound(made, images[i], x_t[i], t, output[i]) for i in range(3)]))
        mse.append(((output[:, :2] - noise) ** 2).mean(dim=(1, 2)))
        xstart_mse.append(((x0 - images) ** 2).mean(dim=(1, 2)))
    for name, expected in (("vb", vb), ("mse", mse), ("xstart_mse", xstart_mse)):
        torch.testing.assert_close(out[name], torch.stack(expected, 1), **TIGHT)
    bar = np.cumprod(1 - BETAS)[-1]
    prior = kl(math.sqrt(bar) * images, double(1 - bar), double(0.0), double(1.0))
    prior = prior.mean(dim=(1, 2)) / math.log(2)
    torch.testing.assert_close(out["prior_bpd"], prior, **TIGHT)
    torch.testing.assert_close(out["total_bpd"], prior + sum(vb), **TIGHT)


def test_clipping_lowers_the_error_of_x_start(images):
    model = Network(learned=False)
    torch.manual_seed(0)
    clipped = diffusion().calc_bpd_loop(model, images)
    torch.manual_seed(0)
    raw = diffusion().calc_bpd_loop(model, images, clip_denoised=False)
    assert (clipped["xstart_mse"] <= raw["xstart_mse"]).all()
    assert (clipped["xstart_mse"] < raw["xstart_mse"]).any()


def test_the_model_is_told_original_timesteps(images):
    told = []

    def model(x, t, scale):
        told.append(t.tolist())
        return torch.cat([scale * x, x], dim=1)

    made = diffusion(var="LEARNED_RANGE")
    settings = {name: getattr(made, name) for name in ("model_mean_type", "model_var_type", "loss_type")}
    spaced = SpacedDiffusion([0, 3, 7], betas=BETAS, **settings)
    spaced.training_losses(model, images, torch.tensor([0, 1, 2]), model_kwargs={"scale": 0.5})
    spaced.calc_bpd_loop(model, images, model_kwargs={"scale": 0.5})
    assert told == [[0, 3, 7], [7] * 3, [3] * 3, [0] * 3]


def test_normal_kl():
    mean1, logvar1, mean2, logvar2 = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = kl(mean1, logvar1.exp(), mean2, logvar2.exp())
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), expected, **TIGHT)
    expected = kl(mean1, logvar1.exp(), torch.tensor(0.1), torch.tensor(0.2).double().exp())
    torch.testing.assert_close(normal_kl(mean1, logvar1, 0.1, 0.2), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_pixel_likelihoods_are_a_distribution(std):
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean = torch.full_like(pixels, 0.1)
    log_scales = torch.full_like(pixels, math.log(std))
    probability = discretized_gaussian_log_likelihood(pixels, means=mean, log_scales=log_scales).exp()
    # 256 probabilities that were raised to at least 1e-12
    assert probability.sum().item() == pytest.approx(1, abs=1e-9)
    edges = np.concatenate([[-np.inf], pixels.numpy()[:-1] + 1 / 255, [np.inf]])
    exact = np.diff(norm.cdf((edges - 0.1) / std))
    # the tanh approximates the distribution function to 3e-4, so a difference of two to 6e-4
    np.testing.assert_allclose(probability, exact, rtol=0, atol=6e-4)
