"""Options of `fastdiff generate`, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fastdiff.sample_config import SampleConfig, SampleDtype

BulkFormat = Literal["png", "npz"]


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """How many samples to write, of which model, how, and where to. Raises ValueError naming the field."""

    out: Path = Path("samples")
    """Folder for the samples; it must be empty or, with --resume, hold a part of the same samples."""
    num: int = 50_000
    """How many samples: those of the indices 0 to num - 1."""
    format: BulkFormat = "png"
    """png: a file for each sample, named by its index; npz: one array uint8 [N, H, W, C], as FID tools read it."""
    resume: bool = False
    """Go on where an earlier run of the same options stopped, if one did; with any number of processes."""
    checkpoint: Path | None = SampleConfig.checkpoint
    """A checkpoint, or the folder of a training run (its newest one); None takes the packaged digits model."""
    class_labels: tuple[int, ...] | None = SampleConfig.class_labels
    """Classes, taken in turn by the index of a sample; None takes all classes."""
    seed: int = SampleConfig.seed
    """Sample i depends on the seed and on i alone."""
    solver: str = SampleConfig.solver
    """How to walk from noise to image: ddim, dpmpp_2m, unipc, ... An unknown name lists all."""
    num_inference_steps: int = SampleConfig.num_inference_steps
    """Steps of the walk, at most as many as the model was trained with."""
    guidance_scale: float | None = SampleConfig.guidance_scale
    """Classifier-free guidance; 1 is none. None takes 1.5 for a model that was trained for it, else none."""
    batch_size: int = SampleConfig.batch_size
    """Samples drawn at once. The same number gives the same bytes, whatever stops in between, on any number of GPUs."""
    device: str = SampleConfig.device
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one, under torchrun that of the process."""
    dtype: SampleDtype = SampleConfig.dtype
    """What the model computes in: another one than float32 means autocast."""
    compile: bool = SampleConfig.compile
    """Run the model through torch.compile."""

    def __post_init__(self) -> None:
        if self.format not in get_args(BulkFormat):
            raise ValueError(f"format must be one of {', '.join(get_args(BulkFormat))}, got {self.format!r}")
        self.sampling()  # checks the options that both have

    def sampling(self) -> SampleConfig:
        """The same options for `fastdiff.generate.prepare`."""
        return SampleConfig(
            num=self.num,
            checkpoint=self.checkpoint,
            class_labels=self.class_labels,
            seed=self.seed,
            solver=self.solver,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            compile=self.compile,
        )

    def command(self) -> str:
        """The command line of these options, without --resume."""
        defaults = BulkConfig()
        words = ["fastdiff", "generate"]
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "resume" or value == getattr(defaults, name):
                continue
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, tuple):
                words += [option, *map(str, value)]
            elif isinstance(value, bool):
                words.append(option)
            else:
                words += [option, str(value)]
        return shlex.join(words)
