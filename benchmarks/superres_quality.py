"""How well super-resolution of the digits, 4x4 to 8x8, works: python -m benchmarks.superres_quality [--steps 1000]

Trains a model as `fastdiff train --task superres` does, and compares it on the held-out digits with bicubic enlargement
of the same low-resolution images. The picture shows, row by row: what the model is given (enlarged by repetition),
bicubic enlargement, one sample, the mean of several samples, and the digits themselves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fastdiff import superres
from fastdiff.data import load_dataset
from fastdiff.environment import environment
from fastdiff.images import image_grid, save_png, to_uint8
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import train
from fastdiff.train_config import TrainConfig

COLUMNS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and picture")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(task="superres", steps=options.steps, output=folder, progress=sys.stderr.isatty())
        started = time.perf_counter()
        result = train(config)
        seconds = time.perf_counter() - started
    score = result.superres
    assert score is not None, "the digits hold images out"
    print(score.describe())

    held_out = load_dataset("digits", split="held_out").images[:COLUMNS]
    small = superres.low_resolution(held_out, config.superres_factor)
    shown = superres.condition(held_out, config.superres_factor)
    sampler = Sampler(
        result.model,
        getattr(NoiseSchedule, config.schedule)(num_train_timesteps=config.num_train_timesteps),
        solver="dpmpp_2m",
        num_inference_steps=superres.STEPS,
        prediction_type=config.prediction_type,
    )
    repeated = shown.repeat_interleave(superres.SAMPLES_PER_IMAGE, 0)
    samples = sampler.sample(tuple(repeated.shape), seed=config.seed, model_kwargs={"condition": repeated})
    samples = samples.unflatten(0, (COLUMNS, superres.SAMPLES_PER_IMAGE)).clamp(-1, 1)
    enlarged = small.repeat_interleave(config.superres_factor, 2).repeat_interleave(config.superres_factor, 3)
    rows = [enlarged, to_uint8(shown), to_uint8(samples[:, 0]), to_uint8(samples.mean(1)), held_out]

    day = datetime.date.today().isoformat()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"superres-quality_{device}_{day}"
    save_png(image_grid(torch.cat(rows), COLUMNS), path.with_suffix(".png"), scale=6)
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.superres_quality", *sys.argv[1:]]),
        "date": day,
        "environment": environment(),
        "config": asdict(config) | {"output": None},
        "train_seconds": seconds,
        "psnr_db": asdict(score) | {"gain": score.gain},
    }
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{path}.json, {path}.png")


if __name__ == "__main__":
    main()
