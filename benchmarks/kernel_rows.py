"""Rows of the section "kernels": every kernel, plain PyTorch and torch.compile of the same formula."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.group_norm_cases import SHAPES, group_norm_case
from benchmarks.kernel_case import CONTENDERS, KernelCase, measure_case
from benchmarks.kernel_inputs import bf16, fp16, fp32, uint8
from benchmarks.noising_cases import mse_case, normal_case, q_sample_case
from benchmarks.suite import Context, Figures, Row
from benchmarks.update_cases import p_sample_case, solver_step_case

# 50 million elements: far beyond every cache
GPU_SHAPE, CPU_SHAPE, QUICK_SHAPE = (256, 3, 256, 256), (8, 3, 64, 64), (2, 3, 16, 16)
EXPECTED_S = {"cuda": 12.0, "cpu": 20.0}


def cases(device: torch.device, *, quick: bool) -> list[KernelCase]:
    """In the order of priority: what has a goal first."""
    if quick:
        shape = QUICK_SHAPE
        return [q_sample_case(shape, fp32, fp32), p_sample_case(shape, fp32), group_norm_case(2, 64, 8, fp32)]
    if device.type != "cuda":
        shape = CPU_SHAPE
        return [
            q_sample_case(shape, fp32, fp32),
            q_sample_case(shape, fp32, fp32, noise_given=True),
            p_sample_case(shape, fp32),
            p_sample_case(shape, fp32, noise_kind="none"),
            mse_case(shape, fp32),
            group_norm_case(8, 128, 32, fp32),
            group_norm_case(8, 128, 32, fp32, backward=True),
        ]
    shape = GPU_SHAPE
    return [
        *(q_sample_case(shape, dtype, dtype, noise_given=given) for given in (False, True) for dtype in (fp32, bf16)),
        *(p_sample_case(shape, dtype) for dtype in (fp32, bf16)),
        *(group_norm_case(256, *size, bf16) for size in SHAPES),
        *(group_norm_case(256, *size, bf16, backward=True) for size in SHAPES),
        q_sample_case(shape, uint8, bf16),
        p_sample_case(shape, bf16, guided=True),
        p_sample_case(shape, fp32, noise_kind="none"),
        p_sample_case(shape, bf16, noise_kind="none"),
        p_sample_case(shape, fp32, noise_kind="given"),
        *(mse_case(shape, dtype) for dtype in (fp32, bf16)),
        normal_case(shape),
        solver_step_case(shape, fp32),
        solver_step_case(shape, fp16, extended=True),
        group_norm_case(8, 320, 64, bf16, scale_shift=True),
        *(group_norm_case(batch, *size, bf16) for batch in (8, 1) for size in SHAPES),
        *(group_norm_case(batch, *size, bf16, backward=True) for batch in (8, 1) for size in SHAPES),
        group_norm_case(256, 128, 32, fp32),
    ]


def _run(case: KernelCase, contender: str) -> Callable[[Context], Figures]:
    def run(context: Context) -> Figures:
        # all contenders are timed in turns, so the first row that is asked for measures them all
        if case.name not in context.cache:
            context.cache[case.name] = measure_case(case, context)
        found = context.cache[case.name][contender]
        if isinstance(found, Exception):
            raise found
        return found

    return run


def rows(device: torch.device, *, quick: bool) -> list[Row]:
    """Three rows a case; the first of them takes the time of all."""
    return [
        Row(
            key=f"kernels/{case.name}/{contender}",
            expected_s=(3.0 if quick else EXPECTED_S[device.type]) if contender == CONTENDERS[0] else 0.0,
            run=_run(case, contender),
        )
        for case in cases(device, quick=quick)
        for contender in CONTENDERS
    ]
