"""Falling sequences of noise levels between two ends, float64."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def karras_sigmas(sigma_min: float, sigma_max: float, n: int, rho: float = 7.0) -> NDArray[np.float64]:
    """[n] from sigma_max to sigma_min, evenly spaced in sigma^(1 / rho) (Karras et al. 2022, equation 5)."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (first + np.linspace(0, 1, n) * (last - first)) ** rho


def exponential_sigmas(sigma_min: float, sigma_max: float, n: int) -> NDArray[np.float64]:
    """[n] from sigma_max to sigma_min, evenly spaced in the logarithm."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), n))


def beta_sigmas(sigma_min: float, sigma_max: float, n: int) -> NDArray[np.float64]:
    """[n] from sigma_max to sigma_min at quantiles of Beta(0.6, 0.6) (Lee et al. 2024, Beta Sampling)."""
    return sigma_min + (sigma_max - sigma_min) * beta_quantile(np.linspace(1, 0, n))


def beta_quantile(probability: ArrayLike, a: float = 0.6) -> NDArray[np.float64]:
    """Quantiles of the symmetric distribution Beta(a, a) for probabilities in [0, 1], absolute error about 1e-15."""
    p = np.asarray(probability, dtype=np.float64)
    tail = np.minimum(p, 1 - p)
    # The cumulative distribution is x^a / B(a, a) * sum of c_k * x^k, whose terms fall like 2^-k in the lower half.
    k = np.arange(64)
    series = np.cumprod(np.append(1.0, (k[1:] - a) / k[1:])) / (a + k) * math.gamma(2 * a) / math.gamma(a) ** 2
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle**a * np.polynomial.polynomial.polyval(middle, series) < tail
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p <= 0.5, low, 1 - low)


# Even in the log signal-to-noise ratio (Lu et al. 2022) means even in ln(sigma / alpha), the exponential spacing where
# noise levels are sigma / alpha; `NoiseSchedule.sigmas` converts those of a flow schedule.
SIGMA_SPACINGS = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
    "logsnr": exponential_sigmas,
}
