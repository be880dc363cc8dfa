"""k-diffusion's sampling functions: x from noise, x = x_T of standard deviation sigmas[0], to an image.

Every function takes

    model: called as model(x, sigma, **extra_args) with x like the argument and sigma [B]; returns x0, "denoised".
    x: [B, ...] of any float dtype; the result is like it. Arithmetic is in float32, for float64 in float64.
    sigmas: [n + 1] levels of the n steps and the end, which may be 0; on any device (see `sigmas` about GPUs).
    callback: called after the first evaluation of each step with a dict of x, i, sigma, sigma_hat and denoised.
    disable: no progress bar; None: none where there is no terminal.

and stochastic ones eta (0: the ODE), s_noise (a factor of the noise) and noise_sampler(sigma, sigma_next), which gets
scalars on the CPU. Noise is drawn where and as the original draws it, so the same seed gives the same image. One fused
op follows an evaluation, and no step waits for the device.

`sample_dpm_fast`, `sample_dpm_adaptive` and `log_likelihood` of the original are not part of this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compat.k_diffusion import steps
from fastdiff.compat.k_diffusion.noise import (
    BatchedBrownianTree,
    BrownianTreeNoiseSampler,
    NoiseSampler,
    default_noise_sampler,
)
from fastdiff.compat.k_diffusion.sigmas import (
    append_dims,
    append_zero,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    host_values,
)
from fastdiff.compat.k_diffusion.walk import Callback, walk
from fastdiff.prediction import FloatArray

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]

Model = Callable[..., Tensor]
ExtraArgs = dict[str, Any] | None


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dsigma = (x - denoised) / sigma, for sigma [B] or a scalar (Karras et al. 2022, equation 1)."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """(sigma_down, sigma_up) of numbers or tensors: the level to step down to, and the noise to add there."""
    if not eta:
        return sigma_to, 0.0
    up = eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5
    up = torch.minimum(sigma_to, up) if isinstance(up, Tensor) else min(sigma_to, up)
    return (sigma_to**2 - up**2) ** 0.5, up


def _levels(sigmas: Tensor) -> FloatArray:
    """The levels on the host.

    Raises:
        ValueError: not a list of levels above 0, the last one excepted.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be of shape [n + 1] with n >= 1, got {list(sigmas.shape)}")
    levels = host_values(sigmas)
    if not (np.isfinite(levels).all() and (levels[:-1] > 0).all() and levels[-1] >= 0):
        raise ValueError(f"sigmas are {levels}, finite numbers above 0 are needed (the last one may be 0)")
    return levels


def _sde_noise(x: Tensor, levels: FloatArray, noise_sampler: NoiseSampler | None, dtype: torch.dtype) -> NoiseSampler:
    if noise_sampler is not None:
        return noise_sampler
    low, high = (torch.tensor(level, dtype=dtype) for level in (levels[levels > 0].min(), levels.max()))
    return BrownianTreeNoiseSampler(x, low, high)


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Karras et al. 2022, algorithm 2, without its correction."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    plan = steps.churned(_levels(sigmas), "euler", **churn)
    return walk(model, x, sigmas, plan, default_noise_sampler(x), extra_args, callback, disable)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Karras et al. 2022, algorithm 2; two evaluations a step, one in a step to 0."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    plan = steps.churned(_levels(sigmas), "heun", **churn)
    return walk(model, x, sigmas, plan, default_noise_sampler(x), extra_args, callback, disable)


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Like `sample_heun` with the midpoint rule in ln sigma (DPM-Solver-2, Lu et al. 2022a)."""
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    plan = steps.churned(_levels(sigmas), "dpm_2", **churn)
    return walk(model, x, sigmas, plan, default_noise_sampler(x), extra_args, callback, disable)


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler's steps to sigma_down and noise sigma_up (`get_ancestral_step`); eta = 1 is DDPM's."""
    plan = steps.ancestral(_levels(sigmas), "euler", eta=eta, s_noise=s_noise)
    return walk(model, x, sigmas, plan, noise_sampler or default_noise_sampler(x), extra_args, callback, disable)


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """`sample_dpm_2`'s steps to sigma_down and noise sigma_up."""
    plan = steps.ancestral(_levels(sigmas), "dpm_2", eta=eta, s_noise=s_noise)
    return walk(model, x, sigmas, plan, noise_sampler or default_noise_sampler(x), extra_args, callback, disable)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1) to sigma_down and noise sigma_up."""
    plan = steps.ancestral(_levels(sigmas), "dpmpp_2s", eta=eta, s_noise=s_noise)
    return walk(model, x, sigmas, plan, noise_sampler or default_noise_sampler(x), extra_args, callback, disable)


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep, Adams-Bashforth in sigma, of order 1 to 4."""
    plan = steps.lms_steps(_levels(sigmas), order=order)
    return walk(model, x, sigmas, plan, default_noise_sampler(x), extra_args, callback, disable)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""
    plan = steps.dpmpp_2m_steps(_levels(sigmas))
    return walk(model, x, sigmas, plan, default_noise_sampler(x), extra_args, callback, disable)


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """DPM-Solver++ on the reverse SDE, two evaluations a step, the second a fraction r of the way in ln sigma.

    Raises:
        ImportError: no noise_sampler is given and torchsde, of whose Brownian tree it is by default, is missing.
    """
    levels = _levels(sigmas)
    sampler = _sde_noise(x, levels, noise_sampler, sigmas.dtype)
    plan = steps.dpmpp_sde_steps(levels, eta=eta, s_noise=s_noise, r=r)
    return walk(model, x, sigmas, plan, sampler, extra_args, callback, disable)


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) on the reverse SDE (Lu et al. 2022b, appendix B.3); solver_type "midpoint" or "heun".

    Raises:
        ImportError: as in `sample_dpmpp_sde`.
    """
    levels = _levels(sigmas)
    sampler = _sde_noise(x, levels, noise_sampler, sigmas.dtype)
    plan = steps.dpmpp_multistep_sde(levels, order=2, eta=eta, s_noise=s_noise, solver_type=solver_type)
    return walk(model, x, sigmas, plan, sampler, extra_args, callback, disable)


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++ with three values on the reverse SDE.

    Raises:
        ImportError: as in `sample_dpmpp_sde`.
    """
    levels = _levels(sigmas)
    sampler = _sde_noise(x, levels, noise_sampler, sigmas.dtype)
    plan = steps.dpmpp_multistep_sde(levels, order=3, eta=eta, s_noise=s_noise, solver_type="heun")
    return walk(model, x, sigmas, plan, sampler, extra_args, callback, disable)
