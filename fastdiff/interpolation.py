"""Between two noises, or two images by way of their noises."""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation of each sample of a with that of b (Song et al. 2021, appendix D.5, equation 67).

    A straight line between two Gaussian noises passes through points that are too short to be noise; the arc does not.
    Two images are interpolated by inverting both ("ddim_inverse"), and sampling from the arc between what comes out.

    Args:
        a, b: [B, ...] of one shape.
        weight: 0 gives a, 1 gives b; a number, or a tensor [B].

    Returns:
        tensor like a. Where the two are (anti-)parallel, which have no one arc, the straight line.

    Raises:
        ValueError: shapes differ, or weight is a tensor of another shape than [B].
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"a and b must have one shape [B, ...], got {list(a.shape)} and {list(b.shape)}")
    weight = torch.as_tensor(weight, dtype=torch.float64, device=a.device)
    if weight.ndim and weight.shape != a.shape[:1]:
        raise ValueError(f"weight must be a number or of shape [{a.shape[0]}], got {list(weight.shape)}")
    spread = (-1, *[1] * (a.ndim - 1))
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    norms = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    angle = torch.arccos(((flat_a * flat_b).sum(1) / norms.clamp(min=1e-300)).clamp(-1, 1))
    sine = torch.sin(angle)
    on_a_line = sine < 1e-6
    safe = torch.where(on_a_line, 1.0, sine)
    of_a = torch.where(on_a_line, 1 - weight, torch.sin((1 - weight) * angle) / safe)
    of_b = torch.where(on_a_line, weight, torch.sin(weight * angle) / safe)
    return of_a.to(a.dtype).view(spread) * a + of_b.to(a.dtype).view(spread) * b
