"""Inputs for `fastdiff.kernels.uniform`, for every stream: its words are integers, so they are equal or wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastdiff import verify_formulas
from fastdiff.kernels.philox import STREAMS
from fastdiff.kernels.uniform import uniform_words
from fastdiff.verify_cases import Case, Expected, Inputs, Outputs
from fastdiff.verify_formulas import MASK, Rounded


def uniform_cases() -> Iterator[Case]:
    """One for each stream."""
    for stream in STREAMS:
        yield uniform_case(stream)


def uniform_case(stream: str) -> Case:
    """Random counters of a few samples."""
    counters = Inputs("uniform", stream, layout="contiguous").counters()

    def run(device: torch.device, nudge: float) -> Outputs:
        on_device: dict[str, Any] = {name: value.to(device) for name, value in counters.items()}
        return {"words": uniform_words(stream=stream, **on_device)}

    def expect() -> Expected:
        seed, index, draw = (counters[name].numpy().astype(np.uint64) for name in ("seed", "sample_indices", "draw"))
        counter = (np.zeros_like(seed), draw, index, np.full_like(seed, STREAMS[stream]))
        words = verify_formulas.philox(counter, (seed & np.uint64(MASK), seed >> np.uint64(32)))
        return {"words": Rounded.exact(np.stack(words))}

    return Case("uniform", "int64", "contiguous", stream, run, expect)
