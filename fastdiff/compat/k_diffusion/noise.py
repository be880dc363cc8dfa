"""Where the noise of a stochastic walk comes from: noise_sampler(sigma, sigma_next) -> unit normals like x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Independent noise for each step: torch.randn_like(x)."""
    return lambda sigma, sigma_next: torch.randn_like(x)


class BatchedBrownianTree:
    """Increments of Brownian motions like x between any two times of [t0, t1]; asking twice gives the same.

    Args:
        seed: one for the whole tensor, or a sequence with one for each sample; None: from torch's generator.

    Raises:
        ImportError: torchsde is not installed.
    """

    def __init__(self, x: Tensor, t0: Tensor, t1: Tensor, seed: int | Sequence[int] | None = None, **kwargs: Any):
        try:
            from torchsde import BrownianTree
        except ImportError:
            raise ImportError(
                "the Brownian tree needs the package torchsde (pip install fastdiff[k-diffusion]); for noise that is "
                "independent in each step pass noise_sampler=default_noise_sampler(x)"
            ) from None
        t0, t1, self.sign = self.sort(t0, t1)
        w0 = kwargs.pop("w0", torch.zeros_like(x))
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []))
        self.batched = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if self.batched:
            if len(seeds) != x.shape[0]:
                raise ValueError(f"seed holds {len(seeds)} seeds, {x.shape[0]} are needed, one for each sample")
            w0 = w0[0]
        self.trees = [BrownianTree(t0, w0, t1, entropy=one, **kwargs) for one in seeds]

    @staticmethod
    def sort(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
        """The two in order, and -1 if they were not."""
        return (a, b, 1) if a < b else (b, a, -1)

    def __call__(self, t0: Tensor, t1: Tensor) -> Tensor:
        t0, t1, sign = self.sort(t0, t1)
        increments = [tree(t0, t1) * (self.sign * sign) for tree in self.trees]
        return torch.stack(increments) if self.batched else increments[0]


class BrownianTreeNoiseSampler:
    """Noise of steps as increments of one Brownian motion over sigma, so that refined steps see the same path.

    Args:
        x: shape, dtype and device of the noise.
        sigma_min, sigma_max: the ends of the motion.
        seed: see `BatchedBrownianTree`.
        transform: from sigma to the time of the motion.

    Raises:
        ImportError: torchsde is not installed.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: float | Tensor,
        sigma_max: float | Tensor,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    ) -> None:
        self.transform = transform
        t0, t1 = (transform(torch.as_tensor(sigma)) for sigma in (sigma_min, sigma_max))
        self.tree = BatchedBrownianTree(x, t0, t1, seed)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        t0, t1 = (self.transform(torch.as_tensor(value)) for value in (sigma, sigma_next))
        return self.tree(t0, t1) / (t1 - t0).abs().sqrt()
