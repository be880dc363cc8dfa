"""The preconditioner of Karras et al. 2022 around a model that is called as model(c_in * x, sigma [B], **kwargs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.compat.k_diffusion.sampling import to_d
from fastdiff.compat.k_diffusion.sigmas import append_dims

Weighting = Callable[[Tensor], Tensor]


class Denoiser(nn.Module):
    """forward(x, sigma [B], **kwargs) -> x0 (Karras et al. 2022, equation 7 and table 1).

    Args:
        sigma_data: standard deviation of the data.
        weighting: of the loss by sigma: "karras" (1, for c_out² in front of the error of x0), "soft-min-snr", "snr" or
            a function of sigma.
        scales: only 1; the multi-scale loss of the original needs its discrete cosine transform.

    Raises:
        ValueError: another weighting, or scales.
    """

    def __init__(
        self, inner_model: nn.Module, sigma_data: float = 1.0, weighting: str | Weighting = "karras", scales: int = 1
    ) -> None:
        super().__init__()
        known: dict[str, Weighting] = {
            "karras": torch.ones_like,
            "soft-min-snr": lambda sigma: (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2,
            "snr": lambda sigma: sigma_data**2 / (sigma**2 + sigma_data**2),
        }
        if isinstance(weighting, str) and weighting not in known:
            raise ValueError(f"weighting is {weighting!r}, accepted are {', '.join(known)} and functions of sigma")
        if scales != 1:
            raise ValueError(f"scales is {scales}, only 1 is accepted")
        self.inner_model = inner_model
        self.sigma_data = sigma_data
        self.weighting = known[weighting] if isinstance(weighting, str) else weighting
        self.scales = scales

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, like sigma."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """[B] the weighted squared error of the inner model at input + sigma * noise (equation 8)."""
        c_skip, c_out, c_in = (append_dims(scale, input.ndim) for scale in self.get_scalings(sigma))
        noised = input + noise * append_dims(sigma, input.ndim)
        output = self.inner_model(noised * c_in, sigma, **kwargs)
        target = (input - c_skip * noised) / c_out
        return (output - target).pow(2).flatten(1).mean(1) * self.weighting(sigma)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_skip, c_out, c_in = (append_dims(scale, input.ndim) for scale in self.get_scalings(sigma))
        return self.inner_model(input * c_in, sigma, **kwargs) * c_out + input * c_skip


class SimpleLossDenoiser(Denoiser):
    """The same, trained on the squared error of eps (Ho et al. 2020, equation 14)."""

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """[B] the squared error of (x - x0) / sigma."""
        noised = input + noise * append_dims(sigma, input.ndim)
        eps = to_d(noised, sigma, self(noised, sigma, **kwargs))
        return (eps - noise).pow(2).flatten(1).mean(1)
