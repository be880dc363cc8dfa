"""Wrappers that make a model of another convention a denoiser: forward(x, sigma [B], **kwargs) -> x0.

`loss(input, noise, sigma, **kwargs)` is the mean squared error [B] of what the inner model predicts, at
input + sigma * noise. Everything is differentiable, and nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.compat.k_diffusion.sigmas import append_dims, append_zero


def _scalings(sigma: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """1 / sqrt(sigma² + 1), the model's input scale, and sigma, of ndim axes: x is variance preserving if scaled so."""
    sigma = append_dims(sigma, ndim)
    return 1 / (sigma**2 + 1) ** 0.5, sigma


class _VelocityModel(nn.Module):
    """A model of v = alpha * eps - alpha * sigma * x0 with alpha = 1 / sqrt(sigma² + 1) (Salimans and Ho 2022)."""

    sigma_data = 1.0

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in of x0 = c_skip * x + c_out * v(c_in * x)."""
        c_in = 1 / (sigma**2 + 1) ** 0.5
        return c_in**2, -sigma * c_in, c_in

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """[B] of v."""
        c_in, level = _scalings(sigma, input.ndim)
        v = self.get_v((input + level * noise) * c_in, self.sigma_to_t(sigma), **kwargs)
        return (v - (noise - level * input) * c_in).pow(2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_skip, c_out, c_in = (append_dims(scale, input.ndim) for scale in self.get_scalings(sigma))
        return self.get_v(input * c_in, self.sigma_to_t(sigma), **kwargs) * c_out + input * c_skip


class VDenoiser(_VelocityModel):
    """For a v model on continuous times t in [0, 1], sigma = tan(t * pi / 2) (v-diffusion)."""

    def __init__(self, inner_model: nn.Module) -> None:
        super().__init__()
        self.inner_model = inner_model

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The time in [0, 1) of a level."""
        return sigma.atan() / math.pi * 2

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The level at a time in [0, 1)."""
        return (t * math.pi / 2).tan()

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        """The inner model's output."""
        return self.inner_model(*args, **kwargs)


class DiscreteSchedule(nn.Module):
    """Levels of a model's timesteps 0 .. N - 1, and between them by interpolation of ln sigma.

    Args:
        sigmas: [N], rising.
        quantize: `sigma_to_t` gives the nearest timestep, int64, instead of a fractional one.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, sigmas: Tensor, quantize: bool) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> Tensor:
        """The level of timestep 0."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """The level of timestep N - 1."""
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """[n + 1] levels of n timesteps evenly spaced from N - 1 to 0, and 0; None: of all timesteps."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        return append_zero(self.t_to_sigma(torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)))

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The timesteps of levels, held inside [0, N - 1]."""
        log_sigma = sigma.log()
        if self.quantize if quantize is None else quantize:
            return (log_sigma.flatten() - self.log_sigmas[:, None]).abs().argmin(dim=0).view(sigma.shape)
        low = torch.searchsorted(self.log_sigmas, log_sigma, right=True) - 1
        low = low.clamp(0, len(self.log_sigmas) - 2)
        start, end = self.log_sigmas[low], self.log_sigmas[low + 1]
        return low + ((log_sigma - start) / (end - start)).clamp(0, 1)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The levels at timesteps in [0, N - 1]."""
        t = t.to(self.log_sigmas.dtype)
        start, end = self.log_sigmas[t.floor().long()], self.log_sigmas[t.ceil().long()]
        return (start + (end - start) * t.frac()).exp()


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """For a model of eps on discrete timesteps, called as model(x, t, **kwargs); alphas_cumprod [N] falls."""

    sigma_data = 1.0

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5, quantize)
        self.inner_model = model

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_out and c_in of x0 = x + c_out * eps(c_in * x)."""
        return -sigma, 1 / (sigma**2 + 1) ** 0.5

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The inner model's prediction of the noise."""
        return self.inner_model(*args, **kwargs)

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """[B] of eps."""
        c_in, level = _scalings(sigma, input.ndim)
        eps = self.get_eps((input + level * noise) * c_in, self.sigma_to_t(sigma), **kwargs)
        return (eps - noise).pow(2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_in, level = _scalings(sigma, input.ndim)
        return input - level * self.get_eps(input * c_in, self.sigma_to_t(sigma), **kwargs)


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """For models of guided-diffusion and their `GaussianDiffusion`; has_learned_sigmas drops the half of a variance."""

    def __init__(
        self,
        model: Any,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        alphas_cumprod = torch.tensor(diffusion.alphas_cumprod, dtype=torch.float32, device=device)
        super().__init__(model, alphas_cumprod, quantize=quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The inner model's prediction of the noise."""
        output = self.inner_model(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """For latent diffusion models of eps, which have `alphas_cumprod` and `apply_model`."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The inner model's prediction of the noise."""
        return self.inner_model.apply_model(*args, **kwargs)


class DiscreteVDDPMDenoiser(DiscreteSchedule, _VelocityModel):
    """For a model of v on discrete timesteps, called as model(x, t, **kwargs); alphas_cumprod [N] falls."""

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(((1 - alphas_cumprod) / alphas_cumprod) ** 0.5, quantize)
        self.inner_model = model

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        """The inner model's prediction of v."""
        return self.inner_model(*args, **kwargs)


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """For latent diffusion models of v, which have `alphas_cumprod` and `apply_model`."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_v(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
        """The inner model's prediction of v."""
        return self.inner_model.apply_model(x, t, cond)
