"""Options that all commands that draw samples share; the attribute docstrings become the help texts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

SampleDtype = Literal["float32", "float16", "bfloat16"]
Weights = Literal["average", "trained"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Which model to sample from, and how. Raises ValueError naming the field that is out of range."""

    checkpoint: Path | None = None
    """A checkpoint, or the folder of a training run (its newest one); None takes the packaged digits model."""
    weights: Weights = "average"
    """average: the moving average of the weights; trained: those of the last step, which an exported model lacks."""
    class_labels: tuple[int, ...] | None = None
    """Classes to draw, repeated until there are enough; None takes all classes in turn."""
    seed: int = 0
    """Sample i depends on the seed and on i alone."""
    solver: str = "dpmpp_2m"
    """How to walk from noise to image: ddim, dpmpp_2m, unipc, ... An unknown name lists all."""
    num_inference_steps: int = 15
    """Steps of the walk, at most as many as the model was trained with."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none. None takes 1.5 for a model that was trained for it, else none."""
    batch_size: int = 256
    """Samples drawn at once; it bounds the memory and changes no noise."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""
    dtype: SampleDtype = "float32"
    """What the model computes in: another one than float32 means autocast."""
    compile: bool = False
    """Run the model through torch.compile: worth its time for many samples."""

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size"):
            require_integer(name, getattr(self, name), 1)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.class_labels is not None and not self.class_labels:
            raise ValueError("class_labels must hold at least one class, got none")
        require_choice("weights", self.weights, get_args(Weights))
        require_choice("dtype", self.dtype, get_args(SampleDtype))

    def shared(self) -> dict[str, Any]:
        """These options alone, without those of a subclass."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingOptions)}


def require_integer(name: str, value: object, least: int) -> None:
    """Raise ValueError unless it is an integer of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
