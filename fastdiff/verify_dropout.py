"""Inputs for `fastdiff.kernels.dropout`, forward and backward, in every dtype and layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastdiff import verify_formulas
from fastdiff.kernels.dropout import dropout
from fastdiff.kernels.philox import STREAMS
from fastdiff.verify_cases import DTYPES, LAYOUTS, SHAPE, Case, Expected, Inputs, Outputs, exact


def dropout_cases() -> Iterator[Case]:
    """A usual p, a large one and none."""
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for p in (0.1, 0.9, 0.0):
                yield dropout_case(dtype, layout, p)


def dropout_case(dtype: str, layout: str, p: float) -> Case:
    """Random keys of a few samples; epochs of 32 bits, so that the draws wrap."""
    feature = f"p {p}"
    inputs = Inputs("dropout", dtype, feature, layout=layout)
    x, gradient = inputs.tensor(DTYPES[dtype]), inputs.tensor(DTYPES[dtype])
    counters = inputs.counters()
    keys = torch.stack([counters["seed"], counters["sample_indices"], counters["draw"]], dim=1)
    layer = int(inputs.random.integers(0, 1024))

    def run(device: torch.device, nudge: float) -> Outputs:
        placed = inputs.place(x, device).requires_grad_()
        out = dropout(placed, p, keys.to(device), layer)
        (x_gradient,) = torch.autograd.grad(out, placed, inputs.place(gradient, device))
        return {"out": out, "gradient": x_gradient}

    def expect() -> Expected:
        seed, index, epoch = keys.numpy().T
        draw = (epoch * 1024 + layer) % 2**32
        stream = np.full_like(draw, STREAMS["dropout"])
        words = verify_formulas.arranged(verify_formulas.element_words(seed, index, draw, stream, SHAPE), SHAPE)
        return {
            "out": verify_formulas.dropout(exact(x), words, p),
            "gradient": verify_formulas.dropout(exact(gradient), words, p),
        }

    return Case("dropout", dtype, layout, feature, run, expect)
