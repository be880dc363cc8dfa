"""k-diffusion's model wrappers, from the definitions of eps and v; and what the host knows of sigmas."""

import itertools
import math

import numpy as np
import pytest
import torch

import fastdiff.compat.k_diffusion as K
from fastdiff.compat.guided_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from fastdiff.compat.k_diffusion import sigmas as levels
from fastdiff.compat.k_diffusion.external import (
    CompVisDenoiser,
    CompVisVDenoiser,
    DiscreteEpsDDPMDenoiser,
    DiscreteVDDPMDenoiser,
    OpenAIDenoiser,
    VDenoiser,
)

N = 50
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-3, 0.1, N, dtype=torch.float64), 0)
SIGMAS = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()


@pytest.fixture
def data():
    """x0, eps and sigma of a batch; x = x0 + sigma * eps."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    return x0, eps, torch.tensor([0.3, 5.0, 1.7], dtype=torch.float64)


class Oracle(torch.nn.Module):
    """Knows x0 and eps and answers with what it is asked to predict, plus an error of 0.1; keeps its arguments."""

    alphas_cumprod = ALPHAS_CUMPROD

    def __init__(self, x0, eps, sigma, predicts):
        super().__init__()
        alpha = 1 / (1 + sigma**2).sqrt().view(-1, 1, 1)
        v = alpha * eps - sigma.view(-1, 1, 1) * alpha * x0
        self.answer = {"eps": eps, "v": v}[predicts] + 0.1
        self.expected_input = alpha * (x0 + sigma.view(-1, 1, 1) * eps)

    def forward(self, x, t, cond=None, doubled=False):
        torch.testing.assert_close(x, self.expected_input)
        self.t = t
        return torch.cat([self.answer, x], dim=1) if doubled else self.answer

    apply_model = forward


def wrapped(kind, oracle):
    if kind == "VDenoiser":
        return VDenoiser(oracle)
    if kind.startswith("CompVis"):
        return {"CompVisDenoiser": CompVisDenoiser, "CompVisVDenoiser": CompVisVDenoiser}[kind](oracle)
    classes = {"eps": DiscreteEpsDDPMDenoiser, "v": DiscreteVDDPMDenoiser}
    return classes[kind](oracle, ALPHAS_CUMPROD, quantize=False)


@pytest.mark.parametrize("kind", ["eps", "v", "CompVisDenoiser", "CompVisVDenoiser", "VDenoiser"])
def test_wrappers_denoise_and_score(data, kind):
    x0, eps, sigma = data
    predicts = "eps" if kind in ("eps", "CompVisDenoiser") else "v"
    oracle = Oracle(x0, eps, sigma, predicts)
    model = wrapped(kind, oracle)
    kwargs = {"cond": None} if kind.startswith("CompVis") else {}
    level = sigma.view(-1, 1, 1)
    # of x0 = x - sigma * eps and x0 = alpha * (alpha * x) - sigma * alpha * v the derivative by the prediction
    error = -0.1 * level if predicts == "eps" else -0.1 * level / (1 + level**2).sqrt()
    torch.testing.assert_close(model(x0 + level * eps, sigma, **kwargs), x0 + error)
    loss = model.loss(x0, eps, sigma, **kwargs)
    torch.testing.assert_close(loss, torch.full((3,), 0.01, dtype=torch.float64))


def test_timesteps_and_levels(data):
    model = DiscreteEpsDDPMDenoiser(None, ALPHAS_CUMPROD, quantize=False)
    t = torch.tensor([0.0, 10.0, 10.25, 48.9, 49.0], dtype=torch.float64)
    sigma = model.t_to_sigma(t)
    torch.testing.assert_close(sigma[1], SIGMAS[10])
    torch.testing.assert_close(sigma[2], SIGMAS[10] ** 0.75 * SIGMAS[11] ** 0.25)
    torch.testing.assert_close(model.sigma_to_t(sigma), t)
    torch.testing.assert_close(model.sigma_to_t(torch.tensor([1e-9, 1e9]).double()), torch.tensor([0.0, 49.0]).double())
    quantized = model.sigma_to_t(sigma.view(5, 1), quantize=True)
    assert quantized.tolist() == [[0], [10], [10], [49], [49]]
    torch.testing.assert_close(model.get_sigmas(), torch.cat([SIGMAS.flip(0), torch.zeros(1).double()]))
    few = model.get_sigmas(8)
    torch.testing.assert_close(few[[0, 3, 7, 8]], torch.stack([SIGMAS[49], SIGMAS[28], SIGMAS[0], 0 * SIGMAS[0]]))
    assert (model.sigma_min, model.sigma_max) == (SIGMAS[0], SIGMAS[-1])
    continuous = VDenoiser(None)
    torch.testing.assert_close(continuous.t_to_sigma(torch.tensor(0.5)), torch.tensor(1.0))
    torch.testing.assert_close(continuous.sigma_to_t(torch.tensor(math.tan(0.2))), torch.tensor(0.4 / math.pi))


def test_models_of_guided_diffusion(data):
    x0, eps, sigma = data
    diffusion = GaussianDiffusion(
        betas=np.linspace(1e-3, 0.1, N),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.MSE,
    )
    oracle = Oracle(x0.float(), eps.float(), sigma.float(), "eps")
    model = OpenAIDenoiser(oracle, diffusion)
    level = sigma.float().view(-1, 1, 1)
    denoised = model(x0.float() + level * eps.float(), sigma.float(), doubled=True)
    # float32: the state is below 20
    torch.testing.assert_close(denoised, x0.float() - 0.1 * level, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.sigmas.double(), SIGMAS, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "weighting",
    ["karras", "soft-min-snr", "snr", torch.sqrt],
    ids=lambda weighting: getattr(weighting, "__name__", weighting),
)
def test_karras_preconditioning(data, weighting):
    x0, eps, sigma = data
    sigma_data = 0.7
    inner = lambda x, sigma: 0.5 * x  # noqa: E731
    model = K.layers.Denoiser(inner, sigma_data=sigma_data, weighting=weighting)
    level = sigma.view(-1, 1, 1)
    x, total = x0 + level * eps, level**2 + sigma_data**2
    denoised = sigma_data**2 / total * x + level * sigma_data / total.sqrt() * 0.5 * x / total.sqrt()
    torch.testing.assert_close(model(x, sigma), denoised)
    squared = ((denoised - x0) ** 2).mean(dim=(1, 2)) * (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    snr = sigma_data**2 / (sigma**2 + sigma_data**2)
    weight = {
        "karras": 1,
        "soft-min-snr": (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2,
        "snr": snr,
        torch.sqrt: sigma.sqrt(),
    }[weighting]
    torch.testing.assert_close(model.loss(x0, eps, sigma), squared * weight)
    simple = K.layers.SimpleLossDenoiser(inner, sigma_data=sigma_data).loss(x0, eps, sigma)
    torch.testing.assert_close(simple, (((x - denoised) / level - eps) ** 2).mean(dim=(1, 2)))


def test_losses_are_differentiable(data):
    x0, eps, sigma = data
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for model in (K.layers.Denoiser(lambda x, _: scale * x), VDenoiser(lambda x, _: scale * x)):
        (gradient,) = torch.autograd.grad(model.loss(x0, eps, sigma).sum(), scale)
        assert gradient.isfinite()
        assert gradient != 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="weighting is 'min-snr'"):
        K.layers.Denoiser(None, weighting="min-snr")
    with pytest.raises(ValueError, match="scales is 2"):
        K.layers.Denoiser(None, scales=2)
    with pytest.raises(ValueError, match="target_dims=1"):
        levels.append_dims(torch.zeros(2, 2), 1)


class OffHost(torch.Tensor):
    """A tensor that says it is on a GPU and counts how often it is copied to the host."""

    copies = itertools.count()

    @property
    def device(self):
        return torch.device("cuda")

    def cpu(self):
        next(self.copies)
        return self.as_subclass(torch.Tensor)


def test_known_sigmas_are_not_copied():
    values = np.array([3.0, 1.0])
    known, unknown = (torch.tensor([3.0, 1.0]).as_subclass(OffHost) for _ in range(2))
    OffHost.copies = itertools.count()
    levels._keep(known, values)
    assert levels.host_values(known) is values
    assert next(OffHost.copies) == 0
    np.testing.assert_array_equal(levels.host_values(unknown), values)
    known[1] = 0.5
    np.testing.assert_array_equal(levels.host_values(known), [3.0, 0.5])
    assert next(OffHost.copies) == 3  # two copies, and the question before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    x = torch.randn(2, 3, 8, 8, device="cuda") * 10
    sigmas = K.sampling.get_sigmas_karras(5, 0.1, 10.0, device="cuda")
    functions = [getattr(K.sampling, name) for name in K.sampling.__all__ if name.startswith("sample_")]

    def model(x, sigma):
        return x / (1 + sigma.view(-1, 1, 1, 1))

    waits = torch.cuda.get_sync_debug_mode()
    for function in functions:
        options = {"noise_sampler": lambda *_: torch.randn_like(x)} if "sde" in function.__name__ else {}
        function(model, x, sigmas, disable=True, **options)

        def callback(report):
            torch.cuda.set_sync_debug_mode("error" if report["i"] < 4 else "default")

        try:
            function(model, x, sigmas, callback=callback, disable=True, **options)
        finally:
            torch.cuda.set_sync_debug_mode(waits)
