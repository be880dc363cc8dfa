"""Eight threads call kernels, a compiled step and a sampler, none of which has run before; prints what went wrong.

Run in a process of its own with an empty compiler cache: python -m soak.thread_program CALLS
"""

from __future__ import annotations

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

THREADS = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Work:
    """The same calls for every seed; a sampler, its tables and the compiled step are shared by all threads."""

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

    def __call__(self, seed: int) -> list[Tensor]:
        x, keys = self.x, torch.tensor([[seed, 0, 1], [seed, 1, 1]], device=DEVICE)
        row = torch.tensor([seed % 4], device=DEVICE)
        results = [
            noise.normal((2, 3, 4, 4), seed=seed, device=DEVICE),
            q_sample(x, keys[:, 1], self.table, seed=seed),
            dropout(x, 0.3, keys, seed % 7),
            group_norm_silu(x + seed, 4, self.weight, self.bias, 1e-5),
        ]
        with torch.no_grad():
            results += solver_step(x, x * 2, self.floats, row, remember=seed % 2 == 0, return_x0=True)
            if seed % 10 == 0:
                results.append(self.sampler.sample((1, 1, 4, 4), seed=seed).clone())
        return results


def main(calls: int) -> int:
    compiled_ref.ENABLED, compiles = False, compiled_ref.ENABLED
    expected = [Work()(seed) for seed in range(20)]
    compiled_ref.ENABLED = compiles
    work, wrong = Work(), []
    ready = threading.Barrier(THREADS)

    def repeat(thread: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if DEVICE.type == "cuda" else torch.no_grad()
        ready.wait()
        try:
            with stream:
                for call in range(calls):
                    seed = (call + 3 * thread) % 20
                    for k, (got, want) in enumerate(zip(work(seed), expected[seed], strict=True)):
                        # what Inductor compiles rounds otherwise: sums of three terms, 3 * 6e-8 of their size
                        if not torch.allclose(got.float(), want.float(), rtol=1e-5, atol=1e-5):
                            wrong.append(f"thread {thread}, call {call}: result {k} of seed {seed}")
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
