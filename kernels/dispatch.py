"""Where the kernels run: Triton on GPUs (and in Triton's interpreter), the plain-PyTorch references elsewhere.

Each public function of this package branches once, on the device of its tensors: `use_triton` sends them to the
`torch.library` custom op that launches the kernel, otherwise the `*_ref` of the same file runs, which torch.compile
traces and fuses. The ops are opaque to torch.compile on purpose: Inductor of torch 2.11 recompiles a kernel that it can
see without the `enable_fp_fusion=False` of its launch, and the noise would then differ in its last bits.
"""

import contextlib
import os

import torch
from torch import Tensor


class _Absent:
    """Stands in for a missing Triton, so that kernel files import: what it decorates can be defined, never launched."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, function):
        return function


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = _Absent()  # type: ignore[assignment]
    HAS_TRITON = False

# @triton.jit reads the variable when it decorates, so a later change of the environment has no effect either.
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

# Contracting a multiply and an add into one rounding would change the bits of the noise; Triton's default for this
# option is not the same in all versions, so every launch states it.
LAUNCH_OPTIONS: dict[str, bool] = {} if INTERPRET else {"enable_fp_fusion": False}


def use_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel runs: CUDA and ROCm tensors, and any tensor under TRITON_INTERPRET=1."""
    return HAS_TRITON and (tensor.is_cuda or INTERPRET)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make the tensor's device the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
