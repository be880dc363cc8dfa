"""Random inputs of the kernel cases, and how exact their results must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernel_case import Inputs
from fastdiff.kernels.philox import STREAMS, normal

SEED, DRAW = 7, 3
fp32, bf16, fp16, uint8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
NAMES = {fp32: "fp32", bf16: "bf16", fp16: "fp16", uint8: "uint8"}
# Relative to the largest value. A formula of at most eight operations rounds eight times by half a unit in the last
# place, and no intermediate value is over twice the largest: 8 units. PyTorch rounds every operation to the tensors'
# dtype, ours only the result.
TOLERANCE = {fp32: 8 * 2.0**-23, bf16: 8 * 2.0**-8, fp16: 8 * 2.0**-11}


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty(0, dtype=dtype).element_size()


def normal_like(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normals [B, C, H, W], channels-last."""
    value = torch.randn(tuple(shape), device=device).to(dtype)
    return value.to(memory_format=torch.channels_last)


def per_sample(batch: int, device: torch.device) -> Inputs:
    """The counters of the noise contract, int64 [batch] each."""
    return {
        "seed": torch.full((batch,), SEED, dtype=torch.int64, device=device),
        "sample": torch.arange(batch, device=device),
        "draw": torch.full((batch,), DRAW, dtype=torch.int64, device=device),
    }


def contract_noise(stream: str) -> Callable[[Inputs], Tensor]:
    """What the kernels make of the inputs' seed, sample indices and draw."""

    def make(inputs: Inputs) -> Tensor:
        counters = inputs["seed"], inputs["sample"], inputs["draw"]
        return normal(*counters, STREAMS[stream], tuple(inputs["x"].shape))

    return make
