"""The textbook loops against answers known in closed form, so that they can judge the engine."""

import math

import pytest
import torch

from fastdiff import reference


def bars(steps):
    return [math.cos(0.01 + 1.5 * (steps - i) / steps) ** 2 for i in range(steps)]


def no_noise(i, like):
    return torch.zeros_like(like)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loops_recover_data_from_a_perfect_prediction(prediction_type):
    # A model that knows x0 says the same x0 at every step, so every loop without noise ends there.
    x0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    walk = bars(7)

    def model(x, i):
        alpha, sigma = math.sqrt(walk[i]), math.sqrt(1 - walk[i])
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[prediction_type]

    start = reference.q_sample(x0, noise, walk[0])
    common = {"timesteps": range(7), "prediction_type": prediction_type}
    ends = [
        reference.ddpm(model, start, alphas_cumprod=walk, noise_fn=no_noise, **common),
        reference.ddim(model, start, alphas_cumprod=walk, **common),
        reference.dpmpp_2m(
            model, start, alphas=[math.sqrt(b) for b in walk], sigmas=[math.sqrt(1 - b) for b in walk], **common
        ),
    ]
    for end in ends:
        torch.testing.assert_close(end, x0, rtol=1e-12, atol=1e-12)


def test_euler_loops_recover_data_from_a_perfect_prediction():
    x0 = torch.tensor([0.3, -1.2], dtype=torch.float64)
    sigmas = [10.0, 3.0, 0.5, 0.0]
    noisy = x0 + 10 * torch.tensor([0.7, -0.1], dtype=torch.float64)
    for end in (
        reference.euler(lambda x, sigma: x0, noisy, sigmas=sigmas),
        reference.euler_ancestral(lambda x, sigma: x0, noisy, sigmas=sigmas, noise_fn=no_noise),
        reference.flow_euler(lambda x, t: (x - x0) / (t / 1000), noisy, sigmas=[1.0, 0.4, 0.1, 0.0]),
    ):
        torch.testing.assert_close(end, x0, rtol=1e-12, atol=1e-12)


def test_ddim_with_eta_1_is_ddpm():
    x, normals = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).unbind()
    arguments = {"timesteps": range(8), "alphas_cumprod": bars(8), "noise_fn": lambda i, like: normals[i]}

    def model(x, i):
        return torch.tanh(x + i)

    ancestral = reference.ddpm(model, x, **arguments)
    torch.testing.assert_close(ancestral, reference.ddim(model, x, eta=1.0, **arguments), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ancestral, reference.ddim(model, x, eta=0.0, **arguments), atol=1e-3)


def test_fixed_large_adds_more_noise_and_clipping_bounds_the_end():
    x, ones = torch.zeros(3, dtype=torch.float64), lambda i, like: torch.ones_like(like)
    arguments = {"timesteps": range(2), "alphas_cumprod": bars(2), "noise_fn": ones, "prediction_type": "sample"}
    small, large = (
        reference.ddpm(lambda x, i: x, x, variance=variance, **arguments) for variance in ("fixed_small", "fixed_large")
    )
    assert (large > small).all()
    end = reference.ddpm(lambda x, i: 9 + x, x, clip_sample=0.25, **arguments)
    torch.testing.assert_close(end, torch.full_like(end, 0.25))


def test_targets_solve_for_the_data():
    x0, eps = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).unbind()
    alpha, sigma = math.sqrt(0.3), math.sqrt(0.7)
    x = reference.q_sample(x0, eps, 0.3)
    targets = {"epsilon": eps, "sample": x0, "v_prediction": reference.v_target(x0, eps, 0.3)}
    for prediction_type, target in targets.items():
        for got, want in zip(reference.x0_and_eps(target, x, alpha, sigma, prediction_type), (x0, eps)):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    flow = reference.x0_and_eps(
        reference.flow_target(x0, eps), reference.flow_sample(x0, eps, 0.6), 0.4, 0.6, "flow_prediction"
    )
    torch.testing.assert_close(flow[0], x0, rtol=1e-12, atol=1e-12)
    denoise = reference.edm_denoiser(lambda x, t: reference.edm_target(x0, eps, 2.5))
    torch.testing.assert_close(denoise(x0 + 2.5 * eps, 2.5), x0, rtol=1e-12, atol=1e-12)


def test_loss_and_min_snr_weights():
    loss = reference.mse_loss(torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]), torch.zeros(2, 1, 2))
    torch.testing.assert_close(loss, torch.tensor([5.0, 0.0]))
    assert reference.min_snr_weight(20.0, "sample") == 5.0
    assert reference.min_snr_weight(20.0, "epsilon") == 0.25
    assert reference.min_snr_weight(4.0, "v_prediction") == 0.8


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type is 'noise'"):
        reference.x0_and_eps(torch.zeros(1), torch.zeros(1), 0.6, 0.8, "noise")
