"""Walks of diffusers' schedulers and of their façades, for the tests that compare them."""

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

import fastdiff.compat.diffusers as compat

ONE_STEP = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "LCMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "TCDScheduler",
)
STATEFUL = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
SCHEDULERS = (*ONE_STEP, *STATEFUL)
SHAPE = (2, 3, 5, 7)


# The constructor of KDPM2's classes looks up each of the training's timesteps among all of them: seconds for 1000.
SHORT = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.11}


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """diffusers' scheduler of that name and its façade, made from its configuration."""
    if name.startswith("KDPM2"):
        config = {**SHORT, **config}
    original = getattr(diffusers, name)(**config)
    return original, getattr(compat, f"Fast{name}").from_config(original.config)


def model(x: Tensor, t: float, channels: int = 1) -> Tensor:
    """A smooth network; with channels=2 the second half is a variance in [-1, 1]."""
    output = torch.tanh(0.5 * x + 1e-4 * float(t))
    return torch.cat([output, torch.sin(3 * x)], 1) if channels == 2 else output


def scale(scheduler: Any, x: Tensor, t: Any) -> Tensor:
    """The model's input, of schedulers that scale it."""
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def walk(
    scheduler: Any,
    steps: int | dict[str, Any],
    *,
    start: int = 0,
    channels: int = 1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(sample, prev_sample, x0) of each step of a seeded walk from `timesteps[start:]`.

    Args:
        steps: the number of steps, or all of set_timesteps' arguments.
        options: of `step`.
    """
    scheduler.set_timesteps(**(steps if isinstance(steps, dict) else {"num_inference_steps": steps}))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator).to(dtype)
    if start == 0:
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    taken = []
    for t in scheduler.timesteps[start:]:
        out = scheduler.step(model(scale(scheduler, x, t), t, channels), t, x, **options)
        taken.append((x, out.prev_sample, getattr(out, "pred_original_sample", getattr(out, "denoised", None))))
        x = out.prev_sample
    return taken


def worst(ours: list, theirs: list) -> float:
    """The largest difference over two walks, relative to the largest number that enters or leaves the step.

    x0 alone may be far smaller than the sample it is computed from, in both alike: 1e-6 of a sample of 80 is 1e-4 of an
    image.
    """
    assert len(ours) == len(theirs) > 0
    error = 0.0
    for ours_at, theirs_at in zip(ours, theirs):
        unit = max(float(value.abs().max()) for value in theirs_at if value is not None)
        for one, other in zip(ours_at, theirs_at):
            if one is None:
                assert other is None
                continue
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert not one.isnan().any()
            error = max(error, float((one - other).abs().max()) / unit)
    return error
