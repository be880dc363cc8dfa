"""The arithmetic of a contender: dtypes and the switches of cuDNN and cuBLAS, set for its run and put back after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What rounds in a contender.

    Attributes:
        dtype: of the model's weights and activations, or of its autocast.
        state_dtype: of the samples between two steps.
        tf32: whether products of float32 tensors may be rounded to TF32.
    """

    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    tf32: bool = False

    @property
    def matmul(self) -> str:
        """The name of its products in `benchmarks.ceilings`."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Only the TF32 that is asked for, and convolutions that cuDNN has timed, for every contender alike."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
        cudnn.allow_tf32 = matmul.allow_tf32 = self.tf32
        cudnn.benchmark = True
        try:
            yield
        finally:
            cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


FLOAT32 = Numerics()
TF32 = Numerics(tf32=True)
# a bf16 model whose samples stay float32 between two steps
BFLOAT16 = Numerics(dtype=torch.bfloat16)
# all of it in bf16, as a pipeline in half precision runs
BFLOAT16_STATE = Numerics(dtype=torch.bfloat16, state_dtype=torch.bfloat16)
