"""The whole sampler against the textbook loops of `fastdiff.reference`, with a bound that follows every rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import reference, verify_formulas
from fastdiff.checkpoint import CheckpointError, load_model
from fastdiff.generate import packaged_model
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET
from fastdiff.kernels.philox import STREAMS
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import StepTable
from fastdiff.verify_formulas import Rounded, total

SHAPE = (3, 3, 5, 7)
SEED = 2**40 + 3
STEPS = 10
# The network: SLOPE * x + SHIFT * t. Linear, so that the effect of a rounding on the rest of the walk is known.
SLOPE, SHIFT = 0.3, 1e-4
# x0 = alpha x - sigma v does not amplify roundings, as (x - sigma eps) / alpha does at the start of a walk.
PREDICTION_TYPE = "v_prediction"


def walk_errors(device: torch.device) -> Iterator[tuple[str, Tensor, Rounded]]:
    """For each solver its name, the sampler's result, and the textbook's float64 result with the bound of its error."""
    schedule = NoiseSchedule.linear()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return SLOPE * x + (SHIFT * t.float()).view(-1, 1, 1, 1)

    for solver in ("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m"):
        sampler = Sampler(
            network,
            schedule,
            solver=solver,
            num_inference_steps=STEPS,
            prediction_type=PREDICTION_TYPE,
            device=device,
        )
        got = sampler.sample(SHAPE, seed=SEED)
        bound = _walk(sampler.table)
        expected = _textbook(solver, schedule)
        # The textbook's own rounding, in float64, is a millionth of the bound.
        yield solver, got, Rounded(expected, bound.error)


def packaged_model_is_finite(device: torch.device) -> bool | None:
    """Whether ten samples of it are finite; None if there is no packaged model."""
    try:
        directory = packaged_model()
    except CheckpointError:
        return None
    loaded = load_model(directory, device=device)
    config = loaded.model.config
    sampler = Sampler(
        loaded.model,
        loaded.schedule,
        solver="dpmpp_2m",
        num_inference_steps=5,
        prediction_type=loaded.prediction_type,
        guidance_scale=1.5,
    )
    labels = torch.arange(10, device=device) % (config.num_classes or 10)
    shape = (10, config.in_channels, config.sample_size, config.sample_size)
    return bool(sampler.sample(shape, model_kwargs={"class_labels": labels}).isfinite().all())


def _normals(stream: str, draw: int) -> Rounded:
    batch = SHAPE[0]
    constant = [np.full(batch, value) for value in (SEED, draw, STREAMS[stream])]
    return verify_formulas.normals(constant[0], np.arange(batch), constant[1], constant[2], SHAPE)


def _walk(table: StepTable) -> Rounded:
    """All rows by formula, in which every float32 rounding of the sampler widens the bound."""
    x = _normals("initial", 0) * Rounded.constant(table.init_noise_sigma)
    model_input = x * Rounded.constant(table.columns["c_in"][0])
    slots = [Rounded.exact(np.zeros(SHAPE))] * table.n_slots
    packed = table.to("cpu").floats.double().numpy()
    for i, (columns, slot, draw) in enumerate(zip(packed, table.slot, table.draw)):
        # The sampler's coefficients are those of the textbook, rounded.
        row = {name: Rounded.constant(columns[k]) for k, name in enumerate(FLOAT_COLUMNS)}
        row["lim"] = Rounded.exact(np.inf)
        h = [Rounded.constant(value) for value in columns[HISTORY_OFFSET:]]
        m = total(
            Rounded.constant(SLOPE) * model_input,
            Rounded.constant(SHIFT) * Rounded.constant(float(table.timesteps[i])),
        )
        z = _normals("step", int(draw)) if draw >= 0 else None
        result = verify_formulas.p_sample(row, h, x, m, slots=slots, z=z)
        if slot >= 0:
            slots = [result["y"] if k == slot else value for k, value in enumerate(slots)]
        x, model_input = result["x"], result["model_input"]
    return x


def _textbook(solver: str, schedule: NoiseSchedule) -> np.ndarray:
    """The same walk by `fastdiff.reference`, float64."""
    timesteps = [int(t) for t in schedule.timesteps(STEPS, "trailing")]
    bars = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    alphas, sigmas = np.sqrt(bars), np.sqrt(1 - np.array(bars))
    levels = [*(sigmas / alphas), 0.0]
    v: dict[str, Any] = {"prediction_type": PREDICTION_TYPE}
    initial = torch.from_numpy(_normals("initial", 0).value)
    draws = itertools.count()

    def network(x: Tensor, t: float) -> Tensor:
        return SLOPE * x + SHIFT * t

    def noise(_: int, like: Tensor) -> Tensor:
        return torch.from_numpy(_normals("step", next(draws)).value)

    if solver == "ddpm":
        walked = reference.ddpm(network, initial, timesteps=timesteps, alphas_cumprod=bars, noise_fn=noise, **v)
    elif solver == "ddim":
        walked = reference.ddim(network, initial, timesteps=timesteps, alphas_cumprod=bars, **v)
    elif solver == "dpmpp_2m":
        walked = reference.dpmpp_2m(
            network, initial, timesteps=timesteps, alphas=alphas.tolist(), sigmas=sigmas.tolist(), **v
        )
    else:
        denoise = reference.vp_denoiser(network, PREDICTION_TYPE, lambda level: timesteps[levels.index(level)])
        start = initial * levels[0]
        if solver == "euler":
            walked = reference.euler(denoise, start, sigmas=levels)
        else:
            walked = reference.euler_ancestral(denoise, start, sigmas=levels, noise_fn=noise)
    return walked.numpy()
