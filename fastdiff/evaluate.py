"""How near samples are to real images, by what a network sees in them: what `fastdiff eval samples` does.

The formulas are those of torch-fidelity, with its defaults, so that figures compare with what others report.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import image_sets
from fastdiff.bulk import generate_many
from fastdiff.checkpoint import load_config
from fastdiff.device import resolve_device
from fastdiff.environment import versions
from fastdiff.eval_config import EvalSamplesConfig
from fastdiff.feature_extractors import extract, load_extractor, missing_package
from fastdiff.generate import find_checkpoint
from fastdiff.image_sets import ImageSet

# of the choice of KID's subsets: torch-fidelity's default
KID_SEED = 2020
KID_PARTS = 10
# Images in a block of the distances between all pairs.
PAIRS_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class FeatureMetrics:
    """Distances between two clouds of features.

    fid: Frechet distance of the Gaussians fitted to them (Heusel et al. 2017, equation 6).
    kid: squared maximum mean discrepancy under a cubic kernel, unbiased, so that it may be slightly below 0 (Binkowski
        et al. 2018, section 4), the mean over random subsets. kid_subset_std: standard deviation of the subsets, which
        share images: what is often reported, but no error of anything.
    kid_standard_error: what another draw of samples and reference would change, from 10 disjoint parts of both: the
        standard deviation of their KID over the root of 10. It is up to that root too large where the sets are alike.
    precision, recall: the fraction of samples within reach of the reference, and the other way round (Kynkäänniemi et
        al. 2019, section 3).
    """

    fid: float
    kid: float
    kid_standard_error: float
    kid_subset_std: float
    kid_subsets: int
    kid_subset_size: int
    precision: float
    recall: float
    neighbours: int


def compare_features(
    samples: Tensor,
    reference: Tensor,
    *,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    neighbours: int = 3,
) -> FeatureMetrics:
    """Metrics of features [N, D] of samples and [M, D] of a reference, computed in float64.

    A KID subset has kid_subset_size images, or as many as there are. Raises ValueError for features of other shapes and
    for fewer than neighbours + 1 or 4 images, ImportError without torch-fidelity.
    """
    try:
        from torch_fidelity import metric_fid, metric_kid, metric_prc
    except ImportError as error:
        raise missing_package() from error
    shapes = [list(features.shape) for features in (samples, reference)]
    if any(len(shape) != 2 or shape[1] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"features must be [N, D] and [M, D] with D of at least 2, got {shapes[0]} and {shapes[1]}")
    # two parts of two images each for the error of KID
    fewest, least = min(len(samples), len(reference)), max(neighbours + 1, 4)
    if fewest < least:
        raise ValueError(f"samples and reference must have at least {least} images for {neighbours=}, got {fewest}")
    samples, reference = samples.double(), reference.double()
    statistics = [metric_fid.fid_features_to_statistics(features.cpu()) for features in (samples, reference)]
    fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    subset_size = min(kid_subset_size, fewest)
    settings: dict[str, Any] = {"rng_seed": KID_SEED, "verbose": False}
    kid = metric_kid.kid_features_to_metric(
        samples, reference, kid_subsets=kid_subsets, kid_subset_size=subset_size, **settings
    )
    kids = [
        metric_kid.kid_features_to_metric(*part, kid_subsets=1, kid_subset_size=len(part[0]), **settings)[
            metric_kid.KEY_METRIC_KID_MEAN
        ]
        for part in _disjoint_parts(samples, reference)
    ]
    reach = metric_prc.prc_features_to_metric(
        # what is called saving memory: without it all distances are in memory at once
        samples,
        reference,
        prc_neighborhood=neighbours,
        prc_batch_size=PAIRS_BLOCK,
        save_cpu_ram=True,
        verbose=False,
    )
    return FeatureMetrics(
        fid=fid[metric_fid.KEY_METRIC_FID],
        kid=kid[metric_kid.KEY_METRIC_KID_MEAN],
        kid_standard_error=float(np.std(kids, ddof=1)) / len(kids) ** 0.5,
        kid_subset_std=kid[metric_kid.KEY_METRIC_KID_STD],
        kid_subsets=kid_subsets,
        kid_subset_size=subset_size,
        precision=reach[metric_prc.KEY_METRIC_PRECISION],
        recall=reach[metric_prc.KEY_METRIC_RECALL],
        neighbours=neighbours,
    )


def _disjoint_parts(*sets: Tensor) -> list[list[Tensor]]:
    """KID_PARTS random parts of each set, or as many as have two images, of one size; no image is in two."""
    random, fewest = np.random.default_rng(KID_SEED), min(map(len, sets))
    count = min(KID_PARTS, fewest // 2)
    orders = [torch.from_numpy(random.permutation(len(features))) for features in sets]
    size = fewest // count
    return [[features[order[i * size : (i + 1) * size]] for features, order in zip(sets, orders)] for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class SampleQuality:
    """The metrics, and all that somebody needs to get the same ones again."""

    metrics: FeatureMetrics
    samples: str
    num_samples: int
    reference: str
    num_reference: int
    extractor: str
    num_features: int
    seeds: dict[str, int | None]
    device: str
    versions: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, the metrics beside the rest."""
        values = asdict(self)
        return {**values.pop("metrics"), **values}

    def describe(self) -> str:
        """A table."""
        found = self.metrics
        subsets = f"{found.kid_subsets} subsets of {found.kid_subset_size:,}"
        lines = [
            ("samples", f"{self.num_samples:,}: {self.samples}"),
            ("reference", f"{self.num_reference:,}: {self.reference}"),
            ("extractor", f"{self.extractor}, {self.num_features:,} features"),
            ("FID", f"{found.fid:.4g}"),
            ("KID", f"{found.kid:.4g} ± {found.kid_standard_error:.2g} (standard error, {subsets})"),
            ("precision", f"{found.precision:.4f} ({found.neighbours} neighbours)"),
            ("recall", f"{found.recall:.4f}"),
        ]
        if min(self.num_samples, self.num_reference) <= self.num_features:
            lines.append(("note", "FID of fewer images than features is biased: compare at equal counts only"))
        return "\n".join(f"{name:<9}  {text}" for name, text in lines)


def evaluate_samples(config: EvalSamplesConfig, *, progress: bool = False) -> SampleQuality:
    """Compare samples with a reference. What can be wrong with either is found before samples are drawn.

    Raises ValueError naming the option or the file, CheckpointError, ImportError and FileNotFoundError as
    `load_extractor` does, KeyboardInterrupt where drawing was stopped.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("eval runs in one process: let torchrun start `fastdiff generate`, then evaluate its folder")
    device = resolve_device(config.device)
    extractor = load_extractor(config.extractor, device=device, weights=config.extractor_weights)
    with tempfile.TemporaryDirectory() as folder:
        if config.samples is not None:
            samples = image_sets.of_path(config.samples)
            reference = _reference(config, config.reference, samples.size)
            name, seed = samples.name, None
        else:
            directory = find_checkpoint(config.checkpoint)
            stored = load_config(directory)
            side = stored["model"]["sample_size"]
            reference = _reference(config, config.reference or stored.get("dataset"), (side, side))
            drawn = generate_many(config.drawing(Path(folder)), progress=progress)
            if not drawn.completed:
                raise KeyboardInterrupt
            samples = image_sets.of_path(drawn.out)
            name, seed = f"{directory} ({config.solver}, {config.num_inference_steps} steps)", config.seed
        if samples.size != reference.size:
            sizes = [f"{image_set.size[1]}x{image_set.size[0]}" for image_set in (reference, samples)]
            raise ValueError(f"reference {reference.name} is {sizes[0]}, but samples {samples.name} are {sizes[1]}")
        features = [extract(extractor, images, device=device) for images in (samples, reference)]
    return SampleQuality(
        metrics=compare_features(
            features[0].to(device),
            features[1].to(device),
            kid_subsets=config.kid_subsets,
            kid_subset_size=config.kid_subset_size,
            neighbours=config.neighbours,
        ),
        samples=name,
        num_samples=samples.count,
        reference=reference.name,
        num_reference=reference.count,
        extractor=config.extractor,
        num_features=features[0].shape[1],
        seeds={"samples": seed, "kid_subsets": KID_SEED},
        device=str(device),
        versions=versions("torch-fidelity", "numpy"),
    )


def _reference(config: EvalSamplesConfig, spec: str | None, size: tuple[int, int]) -> ImageSet:
    """A path where there is one, else a dataset."""
    if spec is None:
        raise ValueError("reference must be given: the checkpoint does not say what it was trained on")
    if Path(spec).exists() or spec.endswith(".npz"):
        return image_sets.of_path(Path(spec))
    return image_sets.of_dataset(spec, split=config.split, size=size, root=config.data_root)
