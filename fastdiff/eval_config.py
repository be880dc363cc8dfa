"""Options of `fastdiff eval`, validated; the attribute docstrings become the help texts of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fastdiff.bulk_config import BulkConfig
from fastdiff.sampling_options import SamplingOptions, Weights, require_choice, require_integer

Split = Literal["train", "held_out"]
Variance = Literal["fixed_large", "fixed_small"]


@dataclass(frozen=True, kw_only=True)
class EvalSamplesConfig(SamplingOptions):
    """Which samples to compare with which images, and how. Raises ValueError naming the field that is out of range."""

    samples: Path | None = None
    """A folder of images or an npz file, as `fastdiff generate` writes them; None draws them from the checkpoint."""
    reference: str | None = None
    """A dataset as in training, a folder of images or an npz file; None takes the dataset of the checkpoint."""
    split: Split = "train"
    """Which images of a reference dataset: those for training, as is the custom, or those held out."""
    data_root: Path = Path("data")
    """Where mnist and cifar10 are kept, and downloaded to if they are missing."""
    extractor: str = "inception"
    """inception, or module:function for a function of images uint8 [B, 3, H, W] that returns features [B, D]."""
    extractor_weights: Path | None = None
    """The file of the Inception weights; None takes it from where torch-fidelity keeps it."""
    kid_subsets: int = 100
    """KID is the mean over this many random subsets."""
    kid_subset_size: int = 1000
    """Images of a subset; fewer where there are fewer."""
    neighbours: int = 3
    """Precision and recall reach from an image to its k-th nearest neighbour of its own set."""
    num: int = BulkConfig.num
    """How many samples to draw."""
    class_labels: tuple[int, ...] | None = BulkConfig.class_labels
    """Classes, taken in turn by the index of a sample; None takes all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("split", self.split, get_args(Split))
        for name, least in (("num", 1), ("kid_subsets", 2), ("kid_subset_size", 2), ("neighbours", 1)):
            require_integer(name, getattr(self, name), least)
        if self.samples is not None and self.reference is None:
            raise ValueError("reference must be given with samples: what shall they be compared with?")

    def drawing(self, out: Path) -> BulkConfig:
        """The options for `fastdiff.bulk.generate_many` to draw the samples as one npz file in the folder `out`."""
        return BulkConfig(out=out, format="npz", num=self.num, **self.shared())


@dataclass(frozen=True, kw_only=True)
class EvalLikelihoodConfig:
    """Which model, on which images. Raises ValueError naming the field that is out of range."""

    checkpoint: Path | None = None
    """A checkpoint, or the folder of a training run (its newest one); None takes the packaged digits model."""
    weights: Weights = SamplingOptions.weights
    """average: the moving average of the weights; trained: those of the last step, which an exported model lacks."""
    dataset: str | None = None
    """digits, mnist, cifar10 or folder:PATH, as in training; None takes the dataset of the checkpoint."""
    split: Split = "held_out"
    """The images held out from training, or those it saw."""
    data_root: Path = Path("data")
    """Where mnist and cifar10 are kept, and downloaded to if they are missing."""
    num: int | None = None
    """How many images, the first of the split; None takes all. Each costs a model call for every timestep."""
    bits_per_dim: bool = True
    """The variational bound; without it only the loss by timestep, which costs `bins` model calls an image."""
    variance: Variance = "fixed_large"
    """The variance of a step of the walk back: beta, or that of the posterior."""
    bins: int = 10
    """In how many ranges of timesteps the loss is shown."""
    seed: int = 0
    """The noise of image i depends on the seed, on i and on the timestep alone."""
    batch_size: int = 256
    """Images at once; it bounds the memory and changes no noise."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""

    def __post_init__(self) -> None:
        require_choice("split", self.split, get_args(Split))
        require_choice("weights", self.weights, get_args(Weights))
        require_choice("variance", self.variance, get_args(Variance))
        for name in ("num", "bins", "batch_size"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 1)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
