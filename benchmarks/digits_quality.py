"""Are the packaged model's digits digits, and are they new? python -m benchmarks.digits_quality

A support-vector classifier (scikit-learn) learns the real digits of the training split; what it says about held-out
real digits is the yardstick. Then it names class-conditional samples. Copies of training images would show as a
distance to the nearest training image far below that of held-out digits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fastdiff.data import Dataset, load_dataset
from fastdiff.environment import environment
from fastdiff.generate import generate
from fastdiff.sample_config import SampleConfig


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Fractions in [0, 1] and distances between images [-1, 1]^64 in the Euclidean norm."""

    num: int
    guidance_scale: float
    recognised: float
    recognised_held_out: float
    median_distance: float
    median_distance_held_out: float
    seconds: float

    @property
    def distance_ratio(self) -> float:
        """Median nearest-neighbour distance to the training set, samples over held-out digits."""
        return self.median_distance / self.median_distance_held_out


def pixels(images: torch.Tensor) -> np.ndarray:
    """float64 [N, D] in [-1, 1] from uint8 or float images [N, C, H, W]."""
    values = images.double()
    return (values * (2 / 255) - 1 if images.dtype == torch.uint8 else values).flatten(1).numpy()


def nearest_distance(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N] Euclidean distance of each point [N, D] to the nearest of the others [M, D]."""
    squares = (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)[None]
    return np.sqrt(np.maximum(squares.min(1), 0))


def measure(*, num: int, guidance_scale: float, seed: int = 0) -> Quality:
    """Draw `num` samples of the packaged model as `fastdiff sample` does, labels in turn, and judge them."""
    from sklearn.svm import SVC

    train, held_out = load_dataset("digits", split="train"), load_dataset("digits", split="held_out")
    known = pixels(train.images)
    classifier = SVC(gamma="scale", C=10.0).fit(known, _labels(train))
    with tempfile.TemporaryDirectory() as folder:
        drawn = generate(
            SampleConfig(
                out=None,
                save_npy=Path(folder) / "samples.npy",
                num=num,
                seed=seed,
                guidance_scale=guidance_scale,
            )
        )
    assert drawn.labels is not None
    samples = pixels(drawn.images)
    return Quality(
        num=num,
        guidance_scale=guidance_scale,
        recognised=float((classifier.predict(samples) == drawn.labels.numpy()).mean()),
        recognised_held_out=float((classifier.predict(pixels(held_out.images)) == _labels(held_out)).mean()),
        median_distance=float(np.median(nearest_distance(samples, known))),
        median_distance_held_out=float(np.median(nearest_distance(pixels(held_out.images), known))),
        seconds=drawn.seconds,
    )


def _labels(dataset: Dataset) -> np.ndarray:
    assert dataset.labels is not None
    return dataset.labels.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON file")
    options = parser.parse_args()
    measured = [measure(num=options.num, guidance_scale=scale) for scale in (1.0, 1.5)]
    day = datetime.date.today().isoformat()
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.digits_quality", *sys.argv[1:]]),
        "date": day,
        "environment": environment(),
        "quality": [asdict(quality) | {"distance_ratio": quality.distance_ratio} for quality in measured],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"digits-quality_cpu_{day}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    for quality in measured:
        print(
            f"guidance {quality.guidance_scale}: {quality.recognised:.1%} of {quality.num} samples recognised "
            f"(held-out digits: {quality.recognised_held_out:.1%}); nearest training image at "
            f"{quality.distance_ratio:.0%} of the distance of held-out digits"
        )
    print(path)


if __name__ == "__main__":
    main()
