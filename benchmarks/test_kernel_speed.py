"""Micro-benchmarks of the kernels with pytest-benchmark: pytest benchmarks/ --benchmark-json FILE

The cases are those of `python -m benchmarks kernels`, one call a round, host work included; nothing here is compiled.
The suite's own rows flush caches, hide launches and know the floors; these are for watching a kernel while it changes.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_case import KernelCase, check, expected, prepare_contender
from benchmarks.kernel_rows import cases
from benchmarks.measurement import synchronize

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("contender", ["fastdiff", "eager"])
@pytest.mark.parametrize("case", cases(DEVICE, quick=False), ids=lambda case: case.name)
@torch.no_grad()
def test_kernel(benchmark, case: KernelCase, contender: str) -> None:
    inputs = case.inputs(DEVICE)
    prepare = prepare_contender(case, contender)
    # a call may write in place, so the check has tensors of its own
    checked = prepare({name: value.clone() for name, value in inputs.items()})
    error = check(case, contender, checked, inputs, expected(case, inputs))
    call = prepare(inputs)

    def finished() -> None:
        call()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info.update(error=error, bytes=case.bytes_per_element * case.elements)
    benchmark(finished)
