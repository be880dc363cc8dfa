"""keep_host_memory: what page faults a loop of allocations costs, counted in processes of their own."""

import os
import subprocess
import sys

import pytest

# 16 MiB, written once, 50 times over: 4,096 pages of 4 KiB each time, or fewer where pages are larger
FAULTS = """
import resource, torch
from fastdiff.host_memory import keep_host_memory
kept = keep_host_memory()
def touch():
    for _ in range(50):
        torch.empty(16 * 2**20, dtype=torch.uint8).fill_(1)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(**variables: str) -> tuple[bool, int]:
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    return kept == "True", int(faults)


def test_freed_memory_is_taken_again_without_page_faults() -> None:
    kept, faults = _faults(FASTDIFF_KEEP_HOST_MEMORY="1")
    if not kept:
        pytest.skip("malloc is not glibc's")
    assert faults < 100


def test_variable_leaves_malloc_alone() -> None:
    # two blocks of 32 MiB in turn make glibc raise its threshold itself, so no count is asserted
    kept, _ = _faults(FASTDIFF_KEEP_HOST_MEMORY="0")
    assert not kept
