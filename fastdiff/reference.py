"""Textbook diffusion loops in plain PyTorch, to check the engine against.

Written from the papers' equations, in the dtype of their inputs, without any table, kernel or solver of the engine, so
that agreement with it is evidence. `model` is called as model(x, t) with the conditioning t of the step; `noise_fn` as
noise_fn(i, like) for step i and returns unit normals shaped like `like`. Schedules are sequences of floats from most to
least noise.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Model = Callable[[Tensor, float], Tensor]
NoiseFunction = Callable[[int, Tensor], Tensor]


def q_sample(x_start: Tensor, eps: Tensor, alphas_cumprod_t: float) -> Tensor:
    """x_t = sqrt(ᾱ) x_0 + sqrt(1 - ᾱ) eps (Ho et al. 2020, equation 4)."""
    return math.sqrt(alphas_cumprod_t) * x_start + math.sqrt(1 - alphas_cumprod_t) * eps


def flow_sample(x_start: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """x_t = (1 - sigma) x_0 + sigma eps (Liu et al. 2023)."""
    return (1 - sigma) * x_start + sigma * eps


def v_target(x_start: Tensor, eps: Tensor, alphas_cumprod_t: float) -> Tensor:
    """v = sqrt(ᾱ) eps - sqrt(1 - ᾱ) x_0 (Salimans and Ho 2022, appendix D)."""
    return math.sqrt(alphas_cumprod_t) * eps - math.sqrt(1 - alphas_cumprod_t) * x_start


def flow_target(x_start: Tensor, eps: Tensor) -> Tensor:
    """The velocity eps - x_0 (Liu et al. 2023)."""
    return eps - x_start


def edm_target(x_start: Tensor, eps: Tensor, sigma: float, sigma_data: float = 0.5) -> Tensor:
    """(x_0 - c_skip x) / c_out with x = x_0 + sigma eps (Karras et al. 2022, equation 8)."""
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
    return (x_start - c_skip * (x_start + sigma * eps)) / c_out


def mse_loss(model_output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, [B]."""
    return ((model_output - target) ** 2).flatten(1).mean(1)


def min_snr_weight(snr: float, prediction_type: str, gamma: float = 5.0) -> float:
    """Min-SNR weight of a squared error (Hang et al. 2023, section 3.4), for a variance-preserving process."""
    weight = min(snr, gamma)
    return {"sample": weight, "epsilon": weight / snr, "v_prediction": weight / (snr + 1)}[prediction_type]


def x0_and_eps(
    model_output: Tensor, x: Tensor, alpha: float, sigma: float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Both predictions at x = alpha x_0 + sigma eps, with alpha² + sigma² = 1 for "v_prediction"."""
    if prediction_type == "epsilon":
        return (x - sigma * model_output) / alpha, model_output
    if prediction_type == "sample":
        return model_output, (x - alpha * model_output) / sigma
    if prediction_type == "v_prediction":
        return alpha * x - sigma * model_output, sigma * x + alpha * model_output
    if prediction_type == "flow_prediction":  # eps = x_0 + velocity in x = alpha x_0 + sigma eps
        x0 = (x - sigma * model_output) / (alpha + sigma)
        return x0, x0 + model_output
    raise ValueError(f"prediction_type is {prediction_type!r}")


def edm_denoiser(network: Model, sigma_data: float = 0.5) -> Model:
    """D(x; sigma) of a network F preconditioned as in Karras et al. 2022, equation 7 and table 1."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        total = sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / math.sqrt(total)
        return c_skip * x + c_out * network(x / math.sqrt(total), math.log(sigma) / 4)

    return denoise


def vp_denoiser(network: Model, prediction_type: str, timestep: Callable[[float], float]) -> Model:
    """D(x; sigma) for x = x_0 + sigma eps of a network for x / sqrt(1 + sigma²), conditioned by timestep(sigma)."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        root = math.sqrt(1 + sigma**2)
        x_vp = x / root
        return x0_and_eps(network(x_vp, timestep(sigma)), x_vp, 1 / root, sigma / root, prediction_type)[0]

    return denoise


def ddpm(
    model: Model,
    x: Tensor,
    *,
    timesteps: Sequence[float],
    alphas_cumprod: Sequence[float],
    noise_fn: NoiseFunction,
    prediction_type: str = "epsilon",
    variance: str = "fixed_small",
    clip_sample: float | None = None,
) -> Tensor:
    """Ho et al. 2020, algorithm 2, with beta_t = 1 - ᾱ_t / ᾱ_prev between the listed timesteps; no noise at the end.

    alphas_cumprod holds ᾱ at each of the timesteps. variance: "fixed_small" β̃_t or "fixed_large" β_t (section 3.2).
    """
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        bar, bar_prev = alphas_cumprod[i], 1.0 if last else alphas_cumprod[i + 1]
        alpha = bar / bar_prev
        beta = 1 - alpha
        x0, _ = x0_and_eps(model(x, t), x, math.sqrt(bar), math.sqrt(1 - bar), prediction_type)
        if clip_sample is not None:
            x0 = x0.clamp(-clip_sample, clip_sample)
        x = math.sqrt(bar_prev) * beta / (1 - bar) * x0 + math.sqrt(alpha) * (1 - bar_prev) / (1 - bar) * x
        if not last:
            beta_tilde = (1 - bar_prev) / (1 - bar) * beta
            x = x + math.sqrt({"fixed_small": beta_tilde, "fixed_large": beta}[variance]) * noise_fn(i, x)
    return x


def ddim(
    model: Model,
    x: Tensor,
    *,
    timesteps: Sequence[float],
    alphas_cumprod: Sequence[float],
    noise_fn: NoiseFunction | None = None,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    clip_sample: float | None = None,
    use_clipped_model_output: bool = False,
) -> Tensor:
    """Song et al. 2021, equations 12 and 16; alphas_cumprod holds ᾱ at each of the timesteps, the end is ᾱ = 1."""
    for i, t in enumerate(timesteps):
        bar, bar_prev = alphas_cumprod[i], alphas_cumprod[i + 1] if i + 1 < len(timesteps) else 1.0
        x0, eps = x0_and_eps(model(x, t), x, math.sqrt(bar), math.sqrt(1 - bar), prediction_type)
        if clip_sample is not None:
            x0 = x0.clamp(-clip_sample, clip_sample)
        if use_clipped_model_output:
            eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        variance = eta**2 * (1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev)
        x = math.sqrt(bar_prev) * x0 + math.sqrt(1 - bar_prev - variance) * eps
        if variance > 0 and noise_fn is not None:
            x = x + math.sqrt(variance) * noise_fn(i, x)
    return x


def euler(denoise: Model, x: Tensor, *, sigmas: Sequence[float]) -> Tensor:
    """dx/dsigma = (x - D(x; sigma)) / sigma by Euler's method (Karras et al. 2022, algorithm 1, lines 3 to 5).

    sigmas [n + 1] end at 0; x starts as sigmas[0] times unit noise and is denoised as denoise(x, sigma).
    """
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        x = x + (sigma_next - sigma) * d
    return x


def euler_ancestral(denoise: Model, x: Tensor, *, sigmas: Sequence[float], noise_fn: NoiseFunction) -> Tensor:
    """k-diffusion's sample_euler_ancestral with eta = 1: an Euler step to sigma_down, then noise of sigma_up."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        d = (x - denoise(x, sigma)) / sigma
        x = x + (sigma_down - sigma) * d
        if sigma_next > 0:
            x = x + sigma_up * noise_fn(i, x)
    return x


def flow_euler(velocity: Model, x: Tensor, *, sigmas: Sequence[float], num_train_timesteps: int = 1000) -> Tensor:
    """dx/dsigma = eps - x_0 on a straight path by Euler's method (Liu et al. 2023); sigmas [n + 1] end at 0."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * velocity(x, sigma * num_train_timesteps)
    return x


def dpmpp_2m(
    model: Model,
    x: Tensor,
    *,
    timesteps: Sequence[float],
    alphas: Sequence[float],
    sigmas: Sequence[float],
    prediction_type: str = "epsilon",
    clip_sample: float | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2, with first-order first and last steps.

    alphas and sigmas hold alpha_t >= 0 and sigma_t > 0 at each of the timesteps; the walk ends at alpha = 1, sigma = 0.
    """
    log_snr = [math.log(a / s) if a > 0 else -math.inf for a, s in zip(alphas, sigmas, strict=True)]
    x0_last: Tensor | None = None
    for i, t in enumerate(timesteps):
        x0, _ = x0_and_eps(model(x, t), x, alphas[i], sigmas[i], prediction_type)
        if clip_sample is not None:
            x0 = x0.clamp(-clip_sample, clip_sample)
        if i + 1 == len(timesteps):  # sigma = 0: exp(-h) = 0
            return x0
        h = log_snr[i + 1] - log_snr[i]
        d = x0
        if x0_last is not None:
            r = (log_snr[i] - log_snr[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * math.expm1(-h) * d
        x0_last = x0
    return x
