"""The hook for latent diffusion: an autoencoder between the images a caller sees and the latents a sampler walks in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LatentSpace:
    """An autoencoder and the affine map that gives its latents unit variance (Rombach et al. 2022, section G).

    latents = (encode(images) - shift_factor) * scaling_factor.

    Args:
        vae: any object with encode(images) and decode(latents). They may return a tensor, a tuple whose first item is
            one, or diffusers' output objects; of a distribution (`latent_dist`) the mode is taken.
        scaling_factor, shift_factor: None takes those of vae.config where it has them, else 1 and 0.

    Raises:
        TypeError: vae lacks encode or decode.
    """

    def __init__(self, vae: Any, *, scaling_factor: float | None = None, shift_factor: float | None = None) -> None:
        missing = [name for name in ("encode", "decode") if not callable(getattr(vae, name, None))]
        if missing:
            raise TypeError(f"vae must have the methods encode and decode, {type(vae).__name__} lacks {missing[0]}")
        self.vae = vae
        self.scaling_factor = _factor(vae, "scaling_factor", scaling_factor, 1.0)
        self.shift_factor = _factor(vae, "shift_factor", shift_factor, 0.0)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> latents [B, c, h, w] float32 of about unit variance."""
        output = self.vae.encode(images.to(self._dtype(images)))
        if hasattr(output, "latent_dist"):
            output = output.latent_dist.mode()
        return (_tensor(output, "latents").float() - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> images [B, C, H, W] float32."""
        unscaled = latents / self.scaling_factor + self.shift_factor
        return _tensor(self.vae.decode(unscaled.to(self._dtype(latents))), "sample").float()

    def _dtype(self, value: Tensor) -> torch.dtype:
        parameters = getattr(self.vae, "parameters", None)
        first = next(iter(parameters()), None) if parameters else None
        return value.dtype if first is None else first.dtype


def mask_like(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask [B or 1, 1, *spatial] of an image at the resolution of its latents: 1 only where every pixel it covers is.

    What is kept must be known as a whole: a latent that saw a pixel to be painted is painted too.

    Raises:
        ValueError: a mask of another number of axes than the latents' shape, or of more than three spatial ones.
    """
    if mask.shape[2:] == shape[2:]:
        return mask
    pools = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}
    if mask.ndim != len(shape) or mask.ndim not in pools:
        raise ValueError(f"mask must have as many axes as the latents {list(shape)}, got {list(mask.shape)}")
    return -pools[mask.ndim](-mask.float(), shape[2:])


def _factor(vae: Any, name: str, given: float | None, default: float) -> float:
    value = getattr(getattr(vae, "config", None), name, None) if given is None else given
    return default if value is None else float(value)


def _tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, (tuple, list)):
        output = output[0]
    output = output if isinstance(output, Tensor) else getattr(output, name, output)
    if not isinstance(output, Tensor):
        raise TypeError(f"the vae must return a tensor or an object with one as .{name}, got {type(output).__name__}")
    return output
