"""Noise levels of a walk, falling and ending at 0, and what the host knows of them.

A walk's rows are made on the host, so a sampling function copies sigmas of a GPU to the host once, before its first
step. It does not where they come as they are from `get_sigmas_*` or `append_zero` of this module: their values are
kept with the tensor, until it is written to. A slice, or a tensor moved by `.to(device)`, is another tensor: ask for
sigmas on the device instead.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff.prediction import FloatArray
from fastdiff.spacing import exponential_sigmas, karras_sigmas

# (version of the tensor, its values)
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def host_values(sigmas: Tensor) -> FloatArray:
    """The values of a tensor in float64; from a GPU without waiting for it where they are known."""
    if sigmas.device.type != "cpu" and not sigmas.is_inference():
        version, values = _known.get(sigmas, (-1, None))
        if values is not None and version == sigmas._version:
            return values
    return sigmas.detach().cpu().double().numpy()


def _keep(sigmas: Tensor, values: FloatArray) -> Tensor:
    if sigmas.device.type != "cpu" and not sigmas.is_inference():  # inference tensors count no versions
        _known[sigmas] = (sigmas._version, values)
    return sigmas


def _with_zero(levels: FloatArray, device: torch.device | str) -> Tensor:
    rounded = torch.tensor(np.append(levels, 0.0), dtype=torch.get_default_dtype())
    return _keep(rounded.to(device), rounded.double().numpy())


def append_zero(x: Tensor) -> Tensor:
    """x [n] and a 0, [n + 1]."""
    longer = torch.cat([x, x.new_zeros([1])])
    if x.device.type == "cpu" or x.is_inference() or x not in _known:
        return longer
    version, values = _known[x]
    return _keep(longer, np.append(values, 0.0)) if version == x._version else longer


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1] evenly spaced in sigma^(1 / rho) (Karras et al. 2022, equation 5), and 0."""
    return _with_zero(karras_sigmas(float(sigma_min), float(sigma_max), n, rho), device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """[n + 1] evenly spaced in ln sigma, and 0."""
    return _with_zero(exponential_sigmas(float(sigma_min), float(sigma_max), n), device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1] whose ln sigma falls like the power rho of an even ramp from 1 to 0, and 0."""
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _with_zero(np.exp(np.linspace(1, 0, n) ** rho * (high - low) + low), device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1] of the continuous VP process at times 1 to eps_s (Karras et al. 2022, table 1), and 0."""
    t = np.linspace(1, eps_s, n)
    return _with_zero(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)), device)


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """x with axes of size 1 at its end, up to target_dims axes."""
    if x.ndim > target_dims:
        raise ValueError(f"x has {x.ndim} axes, more than target_dims={target_dims}")
    return x.reshape(*x.shape, *(1,) * (target_dims - x.ndim))
