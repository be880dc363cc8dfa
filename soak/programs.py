"""Threads from a cold cache, graphs that are replayed, compilers that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from fastdiff import NoiseSchedule, Sampler, cuda_graph
from soak.children import environment
from soak.trial import Attempt, require, trial

ROOT = Path(__file__).parents[1]


def program(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A module of this package in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=600,
    )


@trial(
    promise="Threads and streams",
    tried="8 threads from a cold cache, of 1,000 calls each in one program, of 250 in the others",
    short=1,
    full=4,
)
def threads(folder: Path) -> Iterator[Attempt]:
    def attempt(number: int) -> None:
        caches = {name: str(folder / f"{name}-{number}") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        # not in the short form, which makes attempt 0 only
        calls = "1000" if number == 1 else "250"
        done = program("soak.thread_program", calls, FASTDIFF_COMPILE_STEP="1", **caches)
        require(done.returncode == 0, done.stdout.strip() or done.stderr[-500:])

    yield attempt


REPLAY = "replayed call of a sampler"
if not torch.cuda.is_available():
    REPLAY = "call of a sampler as if replayed: static buffers only, nothing captured"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x) * (t.view(-1, 1, 1, 1) + 1).log()


@trial(promise="CUDA graphs", tried=REPLAY, short=25, full=1000)
def replays(folder: Path) -> Iterator[Attempt]:
    """Without a GPU the static buffers and their reuse: what would be replayed runs as it is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Small().to(device)

    def capture(step, reset, device, pool):
        for _ in range(cuda_graph.WARMUP_CALLS):
            reset()
            step()
        return step, None

    def captures(self: Sampler, device: torch.device) -> bool:
        return self.cuda_graph is not False

    def sampler(cuda_graph: bool | str) -> Sampler:
        return Sampler(
            model, NoiseSchedule.cosine(20), solver="ddpm", num_inference_steps=4, cuda_graph=cuda_graph, device=device
        )

    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(mock.patch.object(cuda_graph, "capture", capture))
            stack.enter_context(
                mock.patch.object(Sampler, "_captures", lambda self, device: self.cuda_graph is not False)
            )
        replaying, eager = sampler("auto"), sampler(False)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attempt(number: int) -> None:
            got = replaying.sample((2, 1, 6, 6), seed=number)
            expected = eager.sample((2, 1, 6, 6), seed=number).clone()
            # one kernel of cuDNN or another may add in another order
            require(torch.allclose(got, expected, rtol=1e-4, atol=1e-5), f"seed {number} differs from the eager call")
            for before, as_it_was in kept:
                require(torch.equal(before, as_it_was), f"seed {number} wrote into the result of the call before")
                require(not torch.equal(before, got), f"seed {number} drew the noise of the call before")
            kept[:] = [(got, got.clone())]

        yield attempt


CASES = [
    (what, changes)
    for what in ("sampler", "step", "training")
    for changes in (
        {"CXX": "/bin/false"},
        {"CXX": "/no/such/compiler"},
        {"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache"},
    )
]


@trial(promise="The compiler may fail", tried="program without a working compiler", short=1, full=len(CASES))
def broken_compiler(folder: Path) -> Iterator[Attempt]:
    def attempt(number: int) -> None:
        what, changes = CASES[number % len(CASES)]
        changes = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{number}"), "FASTDIFF_COMPILE_STEP": "1", **changes}
        done = program("soak.compiler_program", what, str(folder / str(number)), **changes)
        require(done.returncode == 0, f"{what} with {changes}: {done.stderr[-500:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        require(result["equal"], f"{what} with {changes}: the result is not the eager one")
        require(len(result["told"]) == 1, f"{what} with {changes} said {result['told']}")

    yield attempt
