"""Options of `fastdiff sample`, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

SampleDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to sample, from which model, how, and where to. Raises ValueError naming the field that is out of range."""

    out: Path | None = Path("samples.png")
    """PNG with all samples as a grid; None writes none."""
    save_npy: Path | None = None
    """Also write the samples as they are: float32 [N, C, H, W] in [-1, 1], a NumPy file."""
    checkpoint: Path | None = None
    """A checkpoint, or the folder of a training run (its newest one); None takes the packaged digits model."""
    num: int = 64
    """How many samples."""
    input: tuple[Path, ...] | None = None
    """Images of one size to enlarge, for a model of task superres; one sample is drawn of each, num does not count."""
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
    scale: int | None = None
    """Pixels of the PNG for each pixel of a sample, side by side; None makes small samples about 64 pixels large."""

    def __post_init__(self) -> None:
        for name in ("num", "num_inference_steps", "batch_size", "scale"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.class_labels is not None and not self.class_labels:
            raise ValueError("class_labels must hold at least one class, got none")
        if self.input is not None and not self.input:
            raise ValueError("input must name at least one image, got none")
        if self.dtype not in get_args(SampleDtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(SampleDtype))}, got {self.dtype!r}")
        if self.out is not None and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"out must end in .png, got {str(self.out)!r}")
        if self.out is None and self.save_npy is None:
            raise ValueError("out and save_npy are both None: the samples would go nowhere")
        if None not in (self.out, self.save_npy) and Path(self.out or "") == Path(self.save_npy or ""):
            raise ValueError(f"out and save_npy must be two files, got {str(self.out)!r} for both")
