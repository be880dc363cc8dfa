"""Options of `fastdiff profile`, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from fastdiff.kernel_classes import CLASSES
from fastdiff.sampling_options import SamplingOptions, require_integer
from fastdiff.train_config import TrainConfig
from fastdiff.unet_config import PRESETS

# Printed below the help of the command.
FIGURES = """The table, per step (a row of the walk, a training step):
  class          what the kernels do, see below
  ms/step        on a GPU the time of the kernels; on a CPU the own time of the operators while the profiler watches,
                 which slows them
  share          of the sum over all classes
  launches/step  on a GPU the kernels, copies and fills that ran, those of CUDA graphs one by one; on a CPU the
                 operators that do work themselves
The figures beside it:
  images/s, time of a step         without the profiler, without compilation and warm-up
  FLOPs                            of convolutions, matrix products and attention, counted; a multiply-add is two
  MFU                              FLOP/s as a share of those of a matrix product, measured on this machine
  launches, synchronisations       how often the host launched something and waited for the device
  peak, reserved, working memory   most that torch had allocated, had taken from the driver, allocated during a call
  activation memory                what a training step keeps from its forward for its backward pass
The classes:
"""
FIGURES += "\n".join(f"  {name:<13}  {holds}" for name, holds in CLASSES.items())


@dataclass(frozen=True, kw_only=True)
class ProfileSampleConfig(SamplingOptions):
    """What to sample, from which model and how, and how often. Raises ValueError naming the field out of range."""

    out: Path = Path("profile")
    """Folder of the results: trace.json (or trace.json.gz) for Perfetto, profile.json, profile.md."""
    model: str | None = None
    """Instead of a checkpoint a U-Net preset with random weights: digits, cifar10 or imagenet64."""
    input: tuple[Path, ...] | None = None
    """Images of one size to enlarge, for a model of task superres; they are the batch."""
    batch_size: int = 64
    """Samples drawn at once."""
    repeats: int = 3
    """Walks that are timed, and again as many that are profiled, after the warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("repeats", self.repeats, 1)
        if self.input is not None and not self.input:
            raise ValueError("input must name at least one image, got none")
        if self.model is not None and self.model not in PRESETS:
            raise ValueError(f"model must be None or one of {', '.join(PRESETS)}, got {self.model!r}")
        if self.model is not None and self.checkpoint is not None:
            raise ValueError(f"model must be None with a checkpoint, got {self.model!r}")


@dataclass(frozen=True, kw_only=True)
class ProfileTrainConfig(TrainConfig):
    """The options of a training run, of which nothing but a few steps is done."""

    out: Path = Path("profile")
    """Folder of the results: trace.json (or trace.json.gz) for Perfetto, profile.json, profile.md."""
    steps: int = 3
    """Steps that are timed, and again as many that are profiled, after the warm-up."""

    def training(self) -> TrainConfig:
        """The options of training."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields(TrainConfig)})
