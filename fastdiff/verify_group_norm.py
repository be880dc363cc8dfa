"""Inputs for `fastdiff.kernels.group_norm_silu`, values and gradients, in every dtype, layout and feature."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastdiff.kernels.group_norm import group_norm_silu
from fastdiff.verify_cases import DTYPES, LAYOUTS, Case, Expected, Inputs, Outputs
from fastdiff.verify_formulas import Array, Rounded, U

# "no SiLU" first: its result is linear in the bias, which the check of the check changes
FEATURES = ("no SiLU", "SiLU", "channel bias", "scale and shift", "everything")
EPS = 1e-5
# Sums run over at most 64 values one after the other, or as many updates of a running mean, then in pairs.
ROUNDINGS = 80
SHAPE, NUM_GROUPS = (3, 12, 5, 7), 3
# no tile holds a plane of this size, so that the kernels take two passes
LARGE_SHAPE = (1, 8, 67, 67)


def group_norm_cases() -> Iterator[Case]:
    """All of them."""
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for feature in FEATURES:
                yield group_norm_case(dtype, layout, feature, SHAPE, NUM_GROUPS)
            if layout == LAYOUTS[0]:
                yield group_norm_case(dtype, layout, "everything, large plane", LARGE_SHAPE, 2)


def group_norm_case(dtype: str, layout: str, feature: str, shape: tuple[int, ...], num_groups: int) -> Case:
    """x, its gradient, scale and shift in the dtype; weight, bias and channel bias in float32."""
    inputs = Inputs("group_norm", dtype, layout, feature, layout=layout)

    def has(*features: str) -> bool:
        return feature in features or "everything" in feature

    batch, channels = shape[:2]
    x, dy = (inputs.tensor(DTYPES[dtype], shape) for _ in range(2))
    rows = {"weight": inputs.uniform(0.5, 1.5, channels), "bias": inputs.uniform(-1, 1, channels)}
    if has("channel bias"):
        rows["channel_bias"] = inputs.uniform(-2, 2, batch, channels)
    if has("scale and shift"):
        rows["scale"], rows["shift"] = inputs.tensor(DTYPES[dtype], (batch, 2 * channels)).chunk(2, dim=1)
    silu = feature != "no SiLU"

    def run(device: torch.device, nudge: float) -> Outputs:
        nudged = {name: value.clone().to(device).requires_grad_() for name, value in rows.items()}
        with torch.no_grad():
            nudged["bias"] += nudge
        placed = inputs.place(x, device).requires_grad_()
        y = group_norm_silu(
            placed,
            num_groups,
            nudged["weight"],
            nudged["bias"],
            EPS,
            channel_bias=nudged.get("channel_bias"),
            scale=nudged.get("scale"),
            shift=nudged.get("shift"),
            silu=silu,
        )
        gradients = torch.autograd.grad(y, [placed, *nudged.values()], inputs.place(dy, device))
        return {"y": y, **{f"d{name}": gradient for name, gradient in zip(("x", *nudged), gradients)}}

    def expect() -> Expected:
        values = {name: value.double().numpy() for name, value in rows.items()}
        result = _formula(x.double().numpy(), dy.double().numpy(), values, num_groups, silu)
        return {**result, "d": Rounded.exact(np.ones(shape))}

    return Case("group_norm", dtype, layout, feature, run, expect, nudged="y")


def _formula(x: Array, dy: Array, rows: dict[str, Array], num_groups: int, silu: bool) -> Expected:
    """Values and gradients with their bounds, to first order in u.

    The mean h of a group is off by ROUNDINGS u mean|h|, its rstd by as much relatively, and z and SiLU add a handful of
    roundings; SiLU's slope is below 1.1 and changes by less than 1/2 with z. A gradient is a sum of terms, or a sum of
    sums of them: off by twice ROUNDINGS u of the sum of their sizes.
    """
    ndim, per_sample = x.ndim, tuple(range(2, x.ndim))
    columns = {name: value.reshape(-1, value.shape[-1], *[1] * (ndim - 2)) for name, value in rows.items()}

    def group_mean(value: Array) -> Array:
        groups = value.reshape(x.shape[0], num_groups, -1)
        return np.broadcast_to(groups.mean(2, keepdims=True), groups.shape).reshape(x.shape)

    h = x + columns.get("channel_bias", 0.0)
    deviation = h - group_mean(h)
    rstd = 1 / np.sqrt(group_mean(deviation**2) + EPS)
    xhat = deviation * rstd
    scale = 1 + columns.get("scale", np.zeros(1))
    factor = columns["weight"] * scale
    offset = columns["bias"] * scale + columns.get("shift", 0.0)
    z = factor * xhat + offset
    sigmoid = 1 / (1 + np.exp(-z))
    y, slope = (z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))) if silu else (z, np.ones_like(z))

    reach = np.abs(xhat) + group_mean(np.abs(h)) * rstd
    z_error = ROUNDINGS * U * np.abs(factor) * reach + 8 * U * (
        np.abs(z) + np.abs(columns["bias"] * scale) + np.abs(offset)
    )
    y_error = 1.1 * z_error + 8 * U * np.abs(y)

    dz = dy * slope
    m1, m2 = group_mean(factor * dz), group_mean(factor * dz * xhat)
    dx = rstd * (factor * dz - m1 - m2 * xhat)
    size = np.abs(dy) * (1.1 + 0.5 * (np.abs(z) + np.abs(factor) * reach))
    weighted = np.abs(factor) * size
    dx_size = rstd * (weighted + group_mean(weighted) + reach * group_mean(weighted * reach))

    def total(terms: Array, sizes: Array, like: Array) -> Rounded:
        axes = (0, *per_sample) if like.ndim == 1 else per_sample
        return Rounded(terms.sum(axes), 2 * ROUNDINGS * U * sizes.sum(axes))

    result = {"y": Rounded(y, y_error), "dx": Rounded(dx, 2 * ROUNDINGS * U * dx_size)}
    terms = {
        "weight": (scale * dz * xhat, np.abs(scale) * size * reach),
        "bias": (scale * dz, np.abs(scale) * size),
        "channel_bias": (dx, dx_size),
        "scale": (
            dz * (columns["weight"] * xhat + columns["bias"]),
            size * (np.abs(columns["weight"]) * reach + np.abs(columns["bias"])),
        ),
        "shift": (dz, size),
    }
    return result | {f"d{name}": total(*terms[name], value) for name, value in rows.items()}
