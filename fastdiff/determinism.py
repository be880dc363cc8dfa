"""PyTorch's switches for the same bits in every run on the same hardware."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """While entered, and if enabled, PyTorch uses deterministic algorithms, and raises RuntimeError where it has none.

    cuBLAS needs CUBLAS_WORKSPACE_CONFIG for it, which is set if it is not: too late for a process that has multiplied
    matrices on a GPU before.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # a kernel launch for every tensor that is made
    memory.fill_uninitialized_memory = False
    cudnn = torch.backends.cudnn
    chosen = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = chosen
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
