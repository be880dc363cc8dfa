"""The forward process on timesteps 0 .. N - 1 and its posterior (Ho et al. 2020, section 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES
from fastdiff.kernels.q_sample import q_sample
from fastdiff.prediction import FloatArray
from fastdiff.schedule import NoiseSchedule


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """In which to compute with x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class ForwardProcess:
    """q(x_t | x_0) and q(x_{t-1} | x_t, x_0), and the tables they are made of; see `GaussianDiffusion`.

    Args:
        betas: [N] in (0, 1), the last one may be 1.
    """

    betas: FloatArray
    alphas_cumprod: FloatArray
    alphas_cumprod_prev: FloatArray
    alphas_cumprod_next: FloatArray
    sqrt_alphas_cumprod: FloatArray
    sqrt_one_minus_alphas_cumprod: FloatArray
    log_one_minus_alphas_cumprod: FloatArray
    sqrt_recip_alphas_cumprod: FloatArray
    sqrt_recipm1_alphas_cumprod: FloatArray
    posterior_variance: FloatArray
    posterior_log_variance_clipped: FloatArray
    posterior_mean_coef1: FloatArray
    posterior_mean_coef2: FloatArray

    def __init__(self, betas: ArrayLike) -> None:
        self.schedule = NoiseSchedule.from_betas(betas)
        self.num_timesteps = self.schedule.num_train_timesteps
        for name, table in self.schedule.vp_tables.items():
            setattr(self, name, table.copy())
        self._tables = {
            **self.schedule.vp_tables,
            "one_minus_alphas_cumprod": 1 - self.alphas_cumprod,
            "log_betas": np.log(self.betas),
        }
        # tables that were copied to a device, by whatever names them there
        self._on_device: dict[tuple[Any, ...], Tensor] = {}

    def _extract(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The table's values at t, [B, 1, ...] of as many axes as `like`."""
        dtype = arithmetic_dtype(like)
        key = (name, t.device, dtype)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self._tables[name], dtype=dtype, device=t.device)
        return self._on_device[key][t].view(-1, *(1,) * (like.ndim - 1))

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and its logarithm of q(x_t | x_0), all of the shape of x_start."""
        mean = self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._extract("one_minus_alphas_cumprod", t, x_start)
        log_variance = self._extract("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand(x_start.shape), log_variance.expand(x_start.shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) noise; noise None: torch.randn_like(x_start)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if noise.shape != x_start.shape:
            raise ValueError(f"noise must have the shape of x_start, {list(x_start.shape)}, got {list(noise.shape)}")
        if x_start.dtype in FLOAT_DTYPES and noise.dtype in FLOAT_DTYPES and x_start.ndim <= 4:
            key = ("training_table", t.device)
            if key not in self._on_device:
                self._on_device[key] = self.schedule.training_table("epsilon", t.device)
            layout = torch.preserve_format
            table = self._on_device[key]
            return q_sample(x_start, t, table, noise=noise, out_dtype=torch.float32, memory_format=layout)
        scale = self._extract("sqrt_alphas_cumprod", t, x_start)
        return scale * x_start + self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and its clipped logarithm of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equations 6 and 7)."""
        coef1, coef2 = self._extract("posterior_mean_coef1", t, x_t), self._extract("posterior_mean_coef2", t, x_t)
        variance = self._extract("posterior_variance", t, x_t)
        log_variance = self._extract("posterior_log_variance_clipped", t, x_t)
        return coef1 * x_start + coef2 * x_t, variance.expand(x_t.shape), log_variance.expand(x_t.shape)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        recip, recipm1 = "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"
        return self._extract(recip, t, x_t) * x_t - self._extract(recipm1, t, x_t) * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        coef1, coef2 = self._extract("posterior_mean_coef1", t, x_t), self._extract("posterior_mean_coef2", t, x_t)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        recip, recipm1 = "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"
        return (self._extract(recip, t, x_t) * x_t - pred_xstart) / self._extract(recipm1, t, x_t)
