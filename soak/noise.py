"""Noise does not depend on the batch: any partition, in any order, gives the same bits and the same images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff import Sampler, noise
from fastdiff.checkpoint import load_model
from fastdiff.generate import packaged_model
from fastdiff.kernels.dropout import dropout
from fastdiff.kernels.philox import STREAMS
from fastdiff.kernels.uniform import uniform_words
from soak.trial import Attempt, require, trial

BATCH = "Batch size does not change the noise"


def partition(random: np.random.Generator, batch: int) -> list[Tensor]:
    """0 to batch - 1 in a random order, cut into random runs."""
    order = torch.from_numpy(random.permutation(batch))
    cuts = np.sort(random.integers(0, batch + 1, int(random.integers(1, 5))))
    return [part for part in order.tensor_split([int(cut) for cut in cuts]) if len(part)]


@trial(promise=BATCH, tried="random partition", short=25, full=500)
def partitions(folder: Path) -> Iterator[Attempt]:
    """Normals of every stream, uniform words and dropout, bit for bit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def attempt(number: int) -> None:
        random = np.random.default_rng(number)
        batch, stream = int(random.integers(2, 20)), list(STREAMS)[number % len(STREAMS)]
        shape = tuple(int(size) for size in random.integers(1, 12, 3))
        seed = torch.from_numpy(random.integers(0, 2**63 - 1, batch)).to(device)
        index, draw = (torch.from_numpy(random.integers(0, 2**32, batch)).to(device) for _ in range(2))
        x = torch.ones(batch, *shape, device=device)

        def made(part: Tensor) -> list[Tensor]:
            keys = {"seed": seed[part], "sample_indices": index[part], "draw": draw[part]}
            return [
                noise.normal((len(part), *shape), stream=stream, **keys),
                uniform_words(stream=stream, **keys).t(),
                dropout(x[part], 0.3, torch.stack([seed, index, draw], 1)[part], number % 1024),
            ]

        parts = [part.to(device) for part in partition(random, batch)]
        whole = made(torch.arange(batch, device=device))
        for name, value, *pieces in zip(("normals", "words", "dropout"), whole, *map(made, parts)):
            require(torch.equal(value[torch.cat(parts)], torch.cat(pieces)), f"{name} of stream {stream} differ")

    yield attempt


@trial(promise=BATCH, tried="batch of images in parts", short=2, full=12)
def images(folder: Path) -> Iterator[Attempt]:
    """The packaged model, another solver each time, within one 8-bit level in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(packaged_model(), device=device)
    solvers = ("ddpm", "ddim", "dpmpp_2m", "euler_a", "unipc", "heun")

    def attempt(number: int) -> None:
        solver = solvers[number % len(solvers)]
        sampler = Sampler(
            loaded.model,
            loaded.schedule,
            solver=solver,
            num_inference_steps=6,
            guidance_scale=2.0,
            prediction_type=loaded.prediction_type,
        )
        random = np.random.default_rng(number)
        labels = torch.from_numpy(random.integers(0, 10, 9)).to(device)

        def drawn(part: Tensor) -> Tensor:
            drawn = sampler.sample(
                (len(part), 1, 8, 8), seed=number, sample_indices=part, model_kwargs={"class_labels": labels[part]}
            )
            return drawn.clone()

        parts = [part.to(device) for part in partition(random, 9)]
        whole = drawn(torch.arange(9, device=device))[torch.cat(parts)]
        far = (whole - torch.cat([drawn(part) for part in parts])).abs().max().item()
        # one level is 2 / 255
        require(far <= 2 / 255, f"{solver} in parts of {[len(part) for part in parts]} is off by {far:.1e}")

    yield attempt
