"""A kernel that does nothing but independent multiply-adds in registers: its rate is that of issuing instructions.

On NVIDIA GPUs a scheduler issues one instruction of 32 lanes a cycle, and multiply-adds run at that rate, so no kernel
executes its instructions faster than this one executes its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

BLOCK_SIZE, NUM_WARPS = 256, 4
CHAINS, UNROLLED, ITERATIONS = 8, 16, 512
# waves of programs on every multiprocessor, so that the last one costs little
PROGRAMS_PER_PROCESSOR = 64

if AVAILABLE:

    @triton.jit
    def multiply_add_kernel(x_ptr, out_ptr, n_iterations, UNROLLED: tl.constexpr, BLOCK_SIZE: tl.constexpr):
        """CHAINS * UNROLLED * n_iterations multiply-adds for each of BLOCK_SIZE elements."""
        i = tl.arange(0, BLOCK_SIZE)
        # from memory, so that the compiler cannot fold the chains
        a, b = tl.load(x_ptr), tl.load(x_ptr + 1)
        x0 = tl.load(x_ptr + i)
        x1, x2, x3, x4, x5, x6, x7 = x0 + 1, x0 + 2, x0 + 3, x0 + 4, x0 + 5, x0 + 6, x0 + 7
        for _ in range(n_iterations):
            for _ in tl.static_range(UNROLLED):
                x0, x1, x2, x3 = x0 * a + b, x1 * a + b, x2 * a + b, x3 * a + b
                x4, x5, x6, x7 = x4 * a + b, x5 * a + b, x6 * a + b, x7 * a + b
        total = x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
        tl.store(out_ptr + tl.program_id(0) * BLOCK_SIZE + i, total)


def workload(device: torch.device) -> tuple[Callable[[], object], int]:
    """(A launch that fills the device, how many multiply-adds of single lanes it executes)."""
    programs = PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    # a and b near 1: the chains stay finite
    x = 1 + 1e-7 * torch.randn(BLOCK_SIZE, device=device)
    out = torch.empty(programs * BLOCK_SIZE, device=device)

    def launch() -> None:
        with torch.cuda.device(device):
            multiply_add_kernel[(programs,)](
                x,
                out,
                ITERATIONS,
                UNROLLED=UNROLLED,
                BLOCK_SIZE=BLOCK_SIZE,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )

    return launch, programs * BLOCK_SIZE * CHAINS * UNROLLED * ITERATIONS
