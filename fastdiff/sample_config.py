"""Options of `fastdiff sample`, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastdiff.sampling_options import SamplingOptions, require_integer


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingOptions):
    """What to sample, from which model, how, and where to. Raises ValueError naming the field that is out of range."""

    out: Path | None = Path("samples.png")
    """PNG with all samples as a grid; None writes none."""
    save_npy: Path | None = None
    """Also write the samples as they are: float32 [N, C, H, W] in [-1, 1], a NumPy file."""
    num: int = 64
    """How many samples."""
    input: tuple[Path, ...] | None = None
    """Images of one size to enlarge, for a model of task superres; one sample is drawn of each, num does not count."""
    scale: int | None = None
    """Pixels of the PNG for each pixel of a sample, side by side; None makes small samples about 64 pixels large."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("num", self.num, 1)
        if self.scale is not None:
            require_integer("scale", self.scale, 1)
        if self.input is not None and not self.input:
            raise ValueError("input must name at least one image, got none")
        if self.out is not None and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"out must end in .png, got {str(self.out)!r}")
        if self.out is None and self.save_npy is None:
            raise ValueError("out and save_npy are both None: the samples would go nowhere")
        if None not in (self.out, self.save_npy) and Path(self.out or "") == Path(self.save_npy or ""):
            raise ValueError(f"out and save_npy must be two files, got {str(self.out)!r} for both")
