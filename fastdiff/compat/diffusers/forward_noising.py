"""`add_noise` and `get_velocity`, right in every dtype."""

from __future__ import annotations

import torch
from torch import Tensor


class WideNoising:
    """The original's `add_noise` in float32, for schedulers that noise by their sigmas.

    In float16 the square of a large sigma is infinite, which left no noise at all; in bfloat16 a state of some tens is
    rounded to halves before it is whole.
    """

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The original's, in the dtype of original_samples."""
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        noisy = super().add_noise(original_samples.to(wide), noise.to(wide), timesteps)  # type: ignore[misc]
        return noisy.to(original_samples.dtype)


class ForwardNoising:
    """Forward noising of variance-preserving schedulers with roots taken in float32.

    The original casts alphas_cumprod to the sample's dtype first: in bfloat16 the values of the first timesteps round
    to 1, and the noise that is added there to exactly zero. In float32 and float64 the results are the original's.
    """

    alphas_cumprod: Tensor
    _bar_on: tuple[Tensor, dict[torch.device, Tensor]] | None = None

    def _roots(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at timesteps [B], float32 or wider, to multiply samples."""
        if self._bar_on is None or self._bar_on[0] is not self.alphas_cumprod:
            self._bar_on = self.alphas_cumprod, {}
        table = self._bar_on[1].get(sample.device)
        if table is None:
            table = self._bar_on[1][sample.device] = self.alphas_cumprod.to(sample.device)
        bar = table.to(torch.promote_types(sample.dtype, torch.float32))[timesteps.to(sample.device)]
        bar = bar.reshape(-1, *[1] * (sample.ndim - 1))
        return bar**0.5, (1 - bar) ** 0.5

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alphas_cumprod) * original_samples + sqrt(1 - alphas_cumprod) * noise at timesteps [B]."""
        signal, sigma = self._roots(original_samples, timesteps)
        return (signal * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v-prediction target sqrt(alphas_cumprod) * noise - sqrt(1 - alphas_cumprod) * sample at timesteps [B]."""
        signal, sigma = self._roots(sample, timesteps)
        return (signal * noise - sigma * sample).to(sample.dtype)
