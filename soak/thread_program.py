"""Eight threads call kernels, a compiled step and a sampler, none of which has run before; prints what went wrong.

Run in a process of its own with an empty compiler cache: python -m soak.thread_program CALLS
"""

from __future__ import annotations

import contextlib
import sys
import threading

import torch
from torch import Tensor, nn

from fastdiff import NoiseSchedule, Sampler, noise
from fastdiff.kernels import compiled_ref
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET
from fastdiff.kernels.dropout import dropout
from fastdiff.kernels.group_norm import group_norm_silu
from fastdiff.kernels.q_sample import q_sample
from fastdiff.kernels.solver_step import solver_step

THREADS, KINDS, SEEDS = 8, 6, 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Work:
    """Calls by number; a sampler, its tables and the compiled step are shared by all threads."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(2, 8, 6, 5).to(DEVICE, memory_format=torch.channels_last)
        self.weight, self.bias = torch.randn(8, device=DEVICE), torch.randn(8, device=DEVICE)
        self.floats = torch.randn(4, HISTORY_OFFSET, device=DEVICE)
        self.floats[:, FLOAT_COLUMNS.index("lim")] = torch.inf
        self.table = NoiseSchedule.cosine(20).training_table("epsilon").to(DEVICE)
        conv = nn.Conv2d(1, 1, 3, padding=1, device=DEVICE)
        self.sampler = Sampler(
            lambda x, t: conv(x), NoiseSchedule.cosine(20), solver="dpmpp_2m", num_inference_steps=3, device=DEVICE
        )

    def __call__(self, number: int) -> list[Tensor]:
        """The call of this number, of which there are `KINDS` times `SEEDS` different ones."""
        seed, x = number // KINDS % SEEDS, self.x
        kind = number % KINDS
        if kind == 0:
            return [noise.normal((2, 3, 4, 4), seed=seed, device=DEVICE)]
        if kind == 1:
            return [q_sample(x, torch.tensor([seed, 0], device=DEVICE), self.table, seed=seed)]
        if kind == 2:
            keys = torch.tensor([[seed, 0, 1], [seed, 1, 1]], device=DEVICE)
            return [dropout(x, 0.3, keys, seed)]
        if kind == 3:
            return [group_norm_silu(x + seed, 4, self.weight, self.bias, 1e-5)]
        if kind == 4:
            row = torch.tensor([seed % 4], device=DEVICE)
            return solver_step(x, x * 2, self.floats, row, remember=seed % 2 == 0, return_x0=True)
        return [self.sampler.sample((1, 1, 4, 4), seed=seed).clone()]


@torch.no_grad()
def main(calls: int) -> int:
    compiled_ref.ENABLED, compiles = False, compiled_ref.ENABLED
    alone = Work()
    expected = [alone(number) for number in range(KINDS * SEEDS)]
    compiled_ref.ENABLED = compiles
    work, wrong = Work(), []
    ready = threading.Barrier(THREADS)

    def repeat(thread: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if DEVICE.type == "cuda" else contextlib.nullcontext()
        ready.wait()
        try:
            with stream, torch.no_grad():
                for call in range(calls):
                    number = (call + 7 * thread) % len(expected)
                    for k, (got, want) in enumerate(zip(work(number), expected[number], strict=True)):
                        # what Inductor compiles rounds otherwise: sums of three terms, 3 * 6e-8 of their size
                        if not torch.allclose(got.float(), want.float(), rtol=1e-5, atol=1e-5):
                            wrong.append(f"thread {thread}, call {call}: result {k} of number {number}")
        except Exception as error:
            wrong.append(f"thread {thread}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=repeat, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(wrong[:5]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
