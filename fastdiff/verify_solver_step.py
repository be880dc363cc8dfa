"""Inputs for `fastdiff.kernels.solver_step`, in every dtype, layout and feature."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastdiff import verify_formulas
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET
from fastdiff.kernels.solver_step import solver_step
from fastdiff.verify_cases import DTYPES, LAYOUTS, SHAPE, Case, Expected, Inputs, Outputs, exact
from fastdiff.verify_formulas import Rounded

FEATURES = ("plain", "clip", "threshold", "history", "learned variance", "noise", "one row", "everything")


def solver_step_cases() -> Iterator[Case]:
    """All of them."""
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for feature in FEATURES:
                yield solver_step_case(dtype, layout, feature)


def solver_step_case(dtype: str, layout: str, feature: str) -> Case:
    """Three samples, of different rows but for "one row"; sample, model output and history in the dtype."""
    inputs = Inputs("solver_step", dtype, layout, feature, layout=layout)

    def has(*features: str) -> bool:
        return feature in (*features, "everything")

    batch, channels = SHAPE[:2]
    learned, n_values = has("learned variance"), 2 if has("history") else 0
    floats = inputs.uniform(0.3, 1.3, 4, HISTORY_OFFSET + n_values)
    floats *= inputs.uniform(-1, 1, *floats.shape).sign()
    floats[:, FLOAT_COLUMNS.index("lim")] = inputs.uniform(0.4, 0.9, 4) if has("clip") else torch.inf
    row = torch.tensor([2]) if feature == "one row" else torch.tensor([2, 0, 1])
    sample = inputs.tensor(DTYPES[dtype])
    output = inputs.tensor(DTYPES[dtype], (batch, (2 if learned else 1) * channels, *SHAPE[2:]))
    history = [inputs.tensor(DTYPES[dtype]) for _ in range(n_values)]
    noise = inputs.tensor(torch.float32) if has("noise", "learned variance") else None
    threshold = inputs.uniform(0.3, 1.5, batch) if feature == "threshold" else None

    def run(device: torch.device, nudge: float) -> Outputs:
        nudged = floats.clone()
        nudged[:, FLOAT_COLUMNS.index("cx")] += nudge
        x, x0, y = solver_step(
            inputs.place(sample, device),
            inputs.place(output, device),
            nudged.to(device),
            row.to(device),
            history=[inputs.place(value, device) for value in history],
            noise=None if noise is None else inputs.place(noise, device),
            threshold=None if threshold is None else threshold.to(device),
            remember=True,
            return_x0=True,
        )
        return {"x": x, "x0": x0, "y": y}

    def expect() -> Expected:
        columns = floats[row.expand(batch)].double()[:, :, None, None, None].numpy()
        coefficients = {name: Rounded.exact(columns[:, i]) for i, name in enumerate(FLOAT_COLUMNS)}
        result = verify_formulas.p_sample(
            coefficients,
            [Rounded.exact(columns[:, HISTORY_OFFSET + age]) for age in range(n_values)],
            exact(sample),
            exact(output[:, :channels]),
            slots=[exact(value) for value in history],
            v=exact(output[:, channels:]) if learned else None,
            z=None if noise is None else exact(noise),
            threshold=None if threshold is None else Rounded.exact(threshold.double().numpy()[:, None, None, None]),
        )
        return {"x": result["x"], "x0": result["x0"], "y": result["y"], "d": exact(sample)}

    return Case("solver_step", dtype, layout, feature, run, expect, nudged="x")
