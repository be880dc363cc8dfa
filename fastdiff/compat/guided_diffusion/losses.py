"""Log-likelihoods of Gaussians, in nats and element by element."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) of tensors that broadcast, or floats for the second."""
    if not isinstance(logvar2, Tensor):
        logvar2 = torch.tensor(logvar2, dtype=torch.float64)  # a scalar on the CPU goes with any device and dtype
    ratio = torch.exp(logvar1 - logvar2)
    return 0.5 * (ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2) - 1 + logvar2 - logvar1)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's distribution function to 3e-4: the tanh of a cubic (Page 1977), as in the original."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of pixels under a Gaussian integrated over each pixel's bin (Ho et al. 2020, equation 13).

    Args:
        x: 8-bit pixels, scaled to [-1, 1]; a bin reaches 1 / 255 to both sides, the first and the last to infinity.
        means, log_scales: like x; the logarithm of the standard deviation.
    """
    half_bin, inverse_scale = 1 / 255, torch.exp(-log_scales)
    above = approx_standard_normal_cdf(inverse_scale * (x - means + half_bin))
    below = approx_standard_normal_cdf(inverse_scale * (x - means - half_bin))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all axes but the first, [B]."""
    return x.mean(dim=list(range(1, x.ndim)))
