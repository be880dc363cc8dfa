"""GroupNorm + SiLU, forward and backward, at the shapes it has in the U-Nets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_case import Inputs, KernelCase, Outputs
from benchmarks.kernel_inputs import NAMES, itemsize
from fastdiff.kernels.group_norm import group_norm_silu
from fastdiff.kernels.group_norm_plan import choose_plan

NUM_GROUPS, EPS = 32, 1e-5
# (channels, height and width)
SHAPES = ((128, 32), (256, 16), (320, 64), (1280, 8))
# The output is of the size of its largest term, and so is every term of the gradient of x: a few units in the last
# place of the dtype. Plain PyTorch also rounds the normalised values before SiLU, and the sums over a batch of n
# positions, of either sign, carry the rounding errors of their terms: 16 units.
TOLERANCE = {torch.float32: 16 * 2.0**-22, torch.bfloat16: 16 * 2.0**-8}

# cases of tests/kernels/static_check.py that are this and no more; what takes several kernels has none
COSTS = {
    ("forward", 128, 32, torch.bfloat16): "group_norm 128 at 32, bf16",
    ("forward", 128, 32, torch.float32): "group_norm 128 at 32",
    ("forward", 256, 16, torch.bfloat16): "group_norm 256 at 16, bf16",
    ("forward", 1280, 8, torch.bfloat16): "group_norm 1280 at 8, bf16",
    ("backward", 256, 16, torch.bfloat16): "backward 256 at 16, bf16",
}


def group_norm_case(
    batch: int, channels: int, size: int, dtype: torch.dtype, *, backward: bool = False, scale_shift: bool = False
) -> KernelCase:
    """[batch, channels, size, size] channels-last; the parameters have the dtype of the samples."""
    shape = (batch, channels, size, size)

    def inputs(device: torch.device) -> Inputs:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device).to(dtype)

        made = {
            "x": (normal(*shape) + 0.5).to(memory_format=torch.channels_last),
            "weight": normal(channels),
            "bias": normal(channels),
        }
        if scale_shift:
            made["scale_shift"] = 0.3 * normal(batch, 2 * channels)
        if backward:
            made["grad_output"] = normal(*shape).to(memory_format=torch.channels_last)
        return made

    def formula(values: Inputs, noise: Tensor | None) -> Outputs:
        y = F.group_norm(values["x"], NUM_GROUPS, values["weight"], values["bias"], EPS)
        if scale_shift:
            scale, shift = values["scale_shift"][:, :, None, None].chunk(2, 1)
            y = y * (1 + scale) + shift
        return (F.silu(y),)

    leaves = ("x", "weight", "bias") if backward else ()

    def ours(values: Inputs) -> Callable[[], Outputs]:
        extra = {}
        if scale_shift:
            extra = dict(zip(("scale", "shift"), values["scale_shift"].chunk(2, 1)))

        def forward() -> Outputs:
            return (group_norm_silu(values["x"], NUM_GROUPS, values["weight"], values["bias"], EPS, **extra),)

        if not backward:
            return forward
        tensors = [values[name].requires_grad_() for name in leaves]
        with torch.enable_grad():
            (output,) = forward()
        return lambda: torch.autograd.grad(output, tensors, values["grad_output"], retain_graph=True)

    item, once = itemsize(dtype), one_pass(batch, channels, size, dtype, backward=backward)
    # x read once or twice and y written; backward x and the gradient read once or twice and the other gradient written
    tensors = (3 if once else 5) if backward else (2 if once else 3)
    kind = "backward" if backward else "scale-shift" if scale_shift else "forward"
    return KernelCase(
        name=f"group-norm-silu-{kind}-{size}x{size}x{channels}-b{batch}-{NAMES[dtype]}",
        elements=math.prod(shape),
        bytes_per_element=tensors * item,
        cost=COSTS.get((kind, channels, size, dtype)),
        inputs=inputs,
        ours=ours,
        formula=formula,
        tolerance=TOLERANCE[dtype],
        grad=leaves,
    )


def one_pass(batch: int, channels: int, size: int, dtype: torch.dtype, *, backward: bool = False) -> bool:
    """Whether the kernel reads such samples once only."""
    return choose_plan(batch, size * size, channels, NUM_GROUPS, itemsize(dtype), tensors=2 if backward else 1).one_pass
