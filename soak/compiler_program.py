"""Something that compiles, with whatever compiler there is; prints its warnings, and whether it equals the eager one.

Run in a process of its own: python -m soak.compiler_program sampler|step|training FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


def sampler(folder: Path) -> list[Tensor]:
    from fastdiff import NoiseSchedule, Sampler

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.Conv2d(2, 1, 3, padding=1))
    results = []
    for compile in (False, True):
        made = Sampler(
            lambda x, t: model(x), NoiseSchedule.cosine(20), solver="ddim", num_inference_steps=3, compile=compile
        )
        results += [made.sample((2, 1, 4, 4), seed=seed).clone() for seed in (1, 2)]
    return results


def step(folder: Path) -> list[Tensor]:
    from fastdiff.kernels import compiled_ref
    from fastdiff.kernels.device_table import HISTORY_OFFSET
    from fastdiff.kernels.solver_step import solver_step

    torch.manual_seed(0)
    x, floats, row = torch.randn(2, 3, 4, 4), torch.rand(2, HISTORY_OFFSET), torch.tensor([1])
    results = []
    for enabled in (False, True):
        compiled_ref.ENABLED = enabled
        for remember in (False, True):
            results.append(torch.cat(solver_step(x, x * 2, floats, row, remember=remember)))
    return results


def training(folder: Path) -> list[Tensor]:
    from fastdiff.checkpoint import load_train_state
    from soak.small_runs import options, run

    results = []
    for compile in (False, True):
        done = run(options(folder / str(compile), steps=3, checkpoint_every=3, compile=compile))
        averages = load_train_state(done.checkpoint)[0]
        # safetensors hands them out in any order
        results.append(torch.cat([averages[name].flatten() for name in sorted(averages)]))
    return results


def main(what: str, folder: Path) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = {"sampler": sampler, "step": step, "training": training}[what](folder)
    half = len(results) // 2
    equal = all(torch.equal(*pair) for pair in zip(results[:half], results[half:]))
    # of ours: torch warns of things of its own
    told = [str(one.message) for one in caught if "eager" in str(one.message) or "uncompiled" in str(one.message)]
    print(json.dumps({"equal": equal, "told": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
