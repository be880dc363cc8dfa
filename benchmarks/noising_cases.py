"""Forward noising, its noise and the loss, at the sizes they are measured at, beside their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernel_case import Inputs, KernelCase, Outputs
from benchmarks.kernel_inputs import (
    DRAW,
    NAMES,
    SEED,
    TOLERANCE,
    bf16,
    contract_noise,
    fp32,
    itemsize,
    normal_like,
    per_sample,
    uint8,
)
from fastdiff import noise
from fastdiff.kernels.mse import mse
from fastdiff.kernels.q_sample import q_sample
from fastdiff.schedule import NoiseSchedule

# The noise is over half of what is made at these: it can be told from the rounding of a narrow result.
TIMESTEPS = 500, 1000


def q_sample_case(
    shape: Sequence[int], pixels: torch.dtype, out: torch.dtype, *, noise_given: bool = False
) -> KernelCase:
    """Forward noising; the formula's coefficients are in the dtype of the result, as training loops have them."""

    def inputs(device: torch.device) -> Inputs:
        if pixels == uint8:
            x = torch.randint(0, 256, tuple(shape), dtype=uint8, device=device)
            x = x.to(memory_format=torch.channels_last)
        else:
            x = normal_like(shape, pixels, device)
        made = {
            "x": x,
            "t": torch.randint(*TIMESTEPS, (shape[0],), device=device),
            "table": NoiseSchedule.linear().training_table("epsilon", device),
            **per_sample(shape[0], device),
        }
        if noise_given:
            made["noise"] = normal_like(shape, out, device)
        return made

    def formula(values: Inputs, drawn: Tensor | None) -> Outputs:
        x, dtype = values["x"], out if values["table"].dtype == fp32 else values["table"].dtype
        if x.dtype == uint8:
            x = x.to(dtype) * (2 / 255) - 1
        a, b = (values["table"][values["t"], column].to(dtype).view(-1, 1, 1, 1) for column in (0, 1))
        return (a * x + b * (torch.randn_like(x) if drawn is None else drawn),)

    def ours(values: Inputs) -> Callable[[], Outputs]:
        if noise_given:
            return lambda: (q_sample(values["x"], values["t"], values["table"], noise=values["noise"], out_dtype=out),)
        counters = {"seed": values["seed"], "sample_indices": values["sample"], "draw": values["draw"]}
        return lambda: (q_sample(values["x"], values["t"], values["table"], **counters, out_dtype=out),)

    kind = NAMES[pixels] if pixels != uint8 else f"uint8-{NAMES[out]}"
    item = itemsize(out)
    costs = {(fp32, False): "q_sample", (bf16, False): "q_sample bf16", (uint8, False): "q_sample uint8"}
    costs |= {(fp32, True): "q_sample noise given", (bf16, True): "q_sample bf16, noise given"}
    return KernelCase(
        name=f"q-sample-{kind}" + "-noise-given" * noise_given,
        elements=math.prod(shape),
        bytes_per_element=itemsize(pixels) + item * (2 if noise_given else 1),
        cost=costs[pixels, noise_given],
        inputs=inputs,
        ours=ours,
        formula=formula,
        noise=(lambda values: values["noise"]) if noise_given else contract_noise("train"),
        draws=not noise_given,
        noise_scale=lambda values: values["table"][values["t"], 1].to(out).view(-1, 1, 1, 1),
        # uint8 pixels in bf16: u is exact up to 256, and 2/255 u - 1 rounds twice more
        tolerance=TOLERANCE[out],
    )


def mse_case(shape: Sequence[int], dtype: torch.dtype) -> KernelCase:
    """Loss and gradient against epsilon; ours makes the noise anew, plain PyTorch has kept that of the noising."""

    def inputs(device: torch.device) -> Inputs:
        made = {
            "x": normal_like(shape, dtype, device),
            "x_start": normal_like(shape, dtype, device),
            "t": torch.randint(0, 1000, (shape[0],), device=device),
            "table": NoiseSchedule.linear().training_table("epsilon", device),
            **per_sample(shape[0], device),
        }
        return made | {"noise": contract_noise("train")(made)}

    def formula(values: Inputs, kept: Tensor | None) -> Outputs:
        error = values["x"].to(kept.dtype) - kept if kept is not None else values["x"]
        loss = error.square().flatten(1).mean(1)
        return loss, (error * (2 / math.prod(shape[1:]))).to(values["x"].dtype)

    def ours(values: Inputs) -> Callable[[], Outputs]:
        counters = {"seed": values["seed"], "sample_indices": values["sample"], "draw": values["draw"]}
        scale = torch.ones(1, device=values["x"].device)
        arguments = values["x"], values["x_start"], values["t"], values["table"]
        return lambda: mse(*arguments, target="epsilon", **counters, grad_scale=scale)

    return KernelCase(
        name=f"mse-{NAMES[dtype]}",
        elements=math.prod(shape),
        bytes_per_element=2 * itemsize(dtype),
        cost="mse" if dtype == fp32 else "mse bf16",
        inputs=inputs,
        ours=ours,
        formula=formula,
        noise=lambda values: values["noise"],
        # the mean of n squares, added in anybody's order: about sqrt(n) half units, and four times that
        tolerance=max(TOLERANCE[dtype], 4 * math.prod(shape[1:]) ** 0.5 * 2.0**-24),
    )


def normal_case(shape: Sequence[int]) -> KernelCase:
    """Standard normals."""

    def formula(values: Inputs, drawn: Tensor | None) -> Outputs:
        return (torch.randn_like(values["x"]) if drawn is None else drawn,)

    def inputs(device: torch.device) -> Inputs:
        # x only lends its shape and layout
        return {"x": normal_like(shape, fp32, device), **per_sample(shape[0], device)}

    return KernelCase(
        name="normal-fp32",
        elements=math.prod(shape),
        bytes_per_element=4,
        cost="normal",
        inputs=inputs,
        ours=lambda values: lambda: (contract_noise("train")(values),),
        formula=formula,
        noise=lambda values: noise.normal(
            tuple(shape), seed=SEED, stream="train", draw=DRAW, device=values["x"].device
        ),
        draws=True,
        noise_scale=lambda values: torch.ones(1, 1, 1, 1, device=values["x"].device),
        tolerance=TOLERANCE[fp32],
    )
