"""A diffusion on a subset of the timesteps of another one (Nichol and Dhariwal 2021, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.compat.guided_diffusion.gaussian_diffusion import GaussianDiffusion
from fastdiff.schedule import NoiseSchedule


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> set[int]:
    """Which timesteps of 0 .. num_timesteps - 1 to keep.

    Args:
        section_counts: [n1, n2, ...] or "n1,n2,...": cut the timesteps into as many sections of equal size (the first
            ones longer by one where it does not divide) and keep n_i of section i, evenly spaced with both its ends.
            An int is one section. "ddimN": N timesteps of an integer stride from 0 (Song et al. 2021, appendix D.2).

    Raises:
        ValueError: no counts in that form, a section shorter than its count, or no stride that gives N timesteps.
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        (count,) = _counts(section_counts, section_counts.removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            if -(-num_timesteps // stride) == count:
                return set(range(0, num_timesteps, stride))
        raise ValueError(
            f"section_counts is {section_counts!r}, but no integer stride takes {count} of {num_timesteps} timesteps"
        )
    if isinstance(section_counts, str):
        section_counts = _counts(section_counts, *section_counts.split(","))
    elif isinstance(section_counts, int):
        section_counts = [section_counts]
    if not section_counts or min(section_counts) < 0:
        raise ValueError(f"section_counts is {section_counts}, at least one count and none below 0 is needed")
    size, longer = divmod(num_timesteps, len(section_counts))
    timesteps: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        length = size + (i < longer)
        if length < count:
            raise ValueError(f"section_counts is {section_counts}: section {i} has only {length} timesteps")
        step = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # summed, so that halves round as in the original
        for _ in range(count):
            timesteps.add(start + round(position))
            position += step
        start += length
    return timesteps


def _counts(section_counts: str, *written: str) -> list[int]:
    try:
        return [int(count) for count in written]
    except ValueError:
        raise ValueError(f"section_counts is {section_counts!r}, accepted are 'ddimN' and 'n1,n2,...'") from None


class SpacedDiffusion(GaussianDiffusion):
    """A GaussianDiffusion that walks some timesteps of a longer one; the model is told the longer one's timesteps.

    Args:
        use_timesteps: the timesteps to keep, such as those of `space_timesteps`.
        kwargs: of the longer diffusion's `GaussianDiffusion`.

    Attributes:
        timestep_map: the kept timesteps, rising.
        original_num_steps: N of the longer diffusion.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        alphas_cumprod = NoiseSchedule.from_betas(kwargs["betas"]).alphas_cumprod
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(alphas_cumprod)
        self.timestep_map = [t for t in range(self.original_num_steps) if t in self.use_timesteps]
        if not self.timestep_map or len(self.timestep_map) < len(self.use_timesteps):
            raise ValueError(
                f"use_timesteps is {sorted(self.use_timesteps)}, at least one of 0 .. {self.original_num_steps - 1} "
                "and no other is needed"
            )
        kept = alphas_cumprod[self.timestep_map]
        super().__init__(**{**kwargs, "betas": 1 - kept / np.append(1.0, kept[:-1])})
        self._maps: dict[torch.device, Tensor] = {}

    def _wrap_model(self, model: Callable[..., Any]) -> Callable[..., Any]:
        def at_original_timesteps(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
            return model(x, self._original_timesteps(t), **kwargs)

        return at_original_timesteps

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model does it

    def _original_timesteps(self, t: Tensor) -> Tensor:
        if t.device not in self._maps:
            self._maps[t.device] = torch.tensor(self.timestep_map, device=t.device)
        timesteps = self._maps[t.device][t].to(t.dtype)
        return timesteps.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else timesteps
