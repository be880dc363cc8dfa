"""Floating-point operations of a call, counted, and how many a second the device does in a matrix product, measured.

Convolutions, matrix products and attention are counted, a multiply-add as two; elementwise work is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

MATMUL_REPEATS = 10
# Rows and columns: large enough for the full rate, small enough for a fraction of a second.
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def count_flops(call: Callable[[], object]) -> int:
    """Operations of one run of `call`, of its backward pass too if it runs one.

    What torch.compile made runs eagerly meanwhile. Pass a call that replays no CUDA graph: a replay shows no operator.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
    with torch.compiler.set_stance("force_eager"), counter:
        call()
    return counter.get_total_flops()


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product: the median of ten, after two to warm up.

    For float32 on a GPU it is TF32 where cuDNN may use it (torch.backends.cudnn.allow_tf32), as convolutions then do.
    """
    device = torch.device(device)
    size = MATMUL_SIZE[device.type]
    # Values as a network has them: a GPU multiplies zeros faster, because it draws less power.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        seconds = [_seconds(lambda: a @ b, device) for _ in range(2 + MATMUL_REPEATS)][2:]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / statistics.median(seconds)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """The CPU's fused attention, which the counter of torch 2.11 does not know."""

    def forward(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return {operator: formula for operator, formula in formulas.items() if operator not in flop_registry}
