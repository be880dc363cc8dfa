"""Options of `fastdiff profile`, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from fastdiff.kernel_classes import CLASSES
from fastdiff.sample_config import SampleConfig, SampleDtype
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
class ProfileSampleConfig:
    """What to sample, from which model and how, and how often. Raises ValueError naming the field out of range."""

    out: Path = Path("profile")
    """Folder of the results: trace.json (or trace.json.gz) for Perfetto, profile.json, profile.md."""
    checkpoint: Path | None = None
    """A checkpoint, or the folder of a training run (its newest one); None takes the packaged digits model."""
    model: str | None = None
    """Instead of a checkpoint a U-Net preset with random weights: digits, cifar10 or imagenet64."""
    input: tuple[Path, ...] | None = None
    """Images of one size to enlarge, for a model of task superres; they are the batch."""
    class_labels: tuple[int, ...] | None = None
    """Classes to draw, repeated until there are enough; None takes all classes in turn."""
    solver: str = "dpmpp_2m"
    """How to walk from noise to image: ddim, dpmpp_2m, unipc, ... An unknown name lists all."""
    num_inference_steps: int = 15
    """Steps of the walk."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none. None takes 1.5 for a model that was trained for it, else none."""
    batch_size: int = 64
    """Samples drawn at once."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""
    dtype: SampleDtype = "float32"
    """What the model computes in: another one than float32 means autocast."""
    compile: bool = False
    """Run the model through torch.compile."""
    repeats: int = 3
    """Walks that are timed, and again as many that are profiled, after the warm-up."""

    def __post_init__(self) -> None:
        for name in ("repeats", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.model is not None and self.model not in PRESETS:
            raise ValueError(f"model must be None or one of {', '.join(PRESETS)}, got {self.model!r}")
        if self.model is not None and self.checkpoint is not None:
            raise ValueError(f"model must be None with a checkpoint, got {self.model!r}")
        self.sampling()

    def sampling(self) -> SampleConfig:
        """The options of sampling."""
        shared = {field.name for field in fields(self)} & {field.name for field in fields(SampleConfig)} - {"out"}
        return SampleConfig(num=self.batch_size, **{name: getattr(self, name) for name in shared})


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
