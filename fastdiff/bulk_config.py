"""Options of `fastdiff generate`, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fastdiff.sampling_options import SamplingOptions, require_choice, require_integer

BulkFormat = Literal["png", "npz"]


@dataclass(frozen=True, kw_only=True)
class BulkConfig(SamplingOptions):
    """How many samples to write, of which model, how, and where to. Raises ValueError naming the field."""

    out: Path = Path("samples")
    """Folder for the samples; it must be empty or, with --resume, hold a part of the same samples."""
    num: int = 50_000
    """How many samples: those of the indices 0 to num - 1."""
    format: BulkFormat = "png"
    """png: a file for each sample, named by its index; npz: one array uint8 [N, H, W, C], as FID tools read it."""
    resume: bool = False
    """Go on where an earlier run of the same options stopped, if one did; with any number of processes."""
    class_labels: tuple[int, ...] | None = None
    """Classes, taken in turn by the index of a sample; None takes all classes."""
    batch_size: int = SamplingOptions.batch_size
    """Samples drawn at once. The same number gives the same bytes, whatever stops in between, on any number of GPUs."""
    device: str = SamplingOptions.device
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one, under torchrun that of the process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("num", self.num, 1)
        require_choice("format", self.format, get_args(BulkFormat))

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
