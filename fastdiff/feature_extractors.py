"""What turns images into the features that FID and its like compare: Inception, or a function of one's own."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.image_sets import ImageSet

FeatureExtractor = Callable[[Tensor], Tensor]

INCEPTION = "inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Images given to the extractor at once; results do not depend on how many are drawn at once.
BATCH_SIZE = 64


def load_extractor(spec: str, *, device: torch.device | str = "cpu", weights: Path | None = None) -> FeatureExtractor:
    """The extractor of that name: a function of images uint8 [B, 3, H, W] on `device` to features [B, D].

    spec: "inception" is torch-fidelity's conversion of the network that FID is defined with (2,048 features, Heusel et
        al. 2017, section 2), its weights the file `weights`, or the one where torch-fidelity itself would put it;
        nothing is downloaded. "module:function" is a function from a Python module, searched in the current folder too.

    Raises ValueError for another name, FileNotFoundError or ValueError for weights that are missing or damaged,
    ImportError where a package or the module is missing.
    """
    if spec == INCEPTION:
        return _inception(torch.device(device), weights)
    module_name, separator, function = spec.partition(":")
    if not (separator and module_name and function):
        raise ValueError(f"extractor must be {INCEPTION} or module:function, got {spec!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # a console script does not have the current folder there, `python -m` does
        sys.path.append(str(Path.cwd()))
    try:
        extractor = getattr(importlib.import_module(module_name), function)
    except ModuleNotFoundError as error:
        raise ImportError(f"extractor {spec!r}: there is no module {error.name}") from error
    except AttributeError as error:
        raise ValueError(f"extractor {spec!r}: {module_name} has no {function}") from error
    if not callable(extractor):
        raise ValueError(f"extractor {spec!r} must be a function, got {type(extractor).__name__}")
    return extractor


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: ImageSet, *, device: torch.device | str = "cpu") -> Tensor:
    """Features float64 [N, D] of all images, on the CPU.

    Raises ValueError for an extractor that does not return finite features [B, D].
    """
    parts = []
    for batch in images.batches(BATCH_SIZE):
        features = torch.as_tensor(extractor(batch.to(device)))
        if features.ndim != 2 or len(features) != len(batch):
            found = list(features.shape)
            raise ValueError(f"extractor must return [{len(batch)}, D] for {len(batch)} images, got {found}")
        if not features.isfinite().all():
            raise ValueError(f"extractor must return finite features, got others for images of {images.name}")
        parts.append(features.cpu())
    return torch.cat(parts).double()


def inception_weights() -> Path:
    """Where torch-fidelity keeps the weights that it has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _inception(device: torch.device, weights: Path | None) -> FeatureExtractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise missing_package() from error
    path = inception_weights() if weights is None else weights
    if not path.is_file():
        raise FileNotFoundError(
            f"the Inception weights {path} are not there: put the file {URL_INCEPTION_V3} in that place, name it with "
            "--extractor-weights, or take another --extractor"
        )
    try:
        # torch-fidelity reads the file in a way that may run code in it: this reads tensors only, and refuses others
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the Inception weights of torch-fidelity") from error
    network.to(device)
    return lambda images: network(images)[0]


def missing_package() -> ImportError:
    """What to install."""
    return ImportError("the metrics need torch-fidelity: pip install fastdiff[eval]")
