"""Without a GPU the kernel tests run the real kernels in Triton's interpreter; all other tests run the references."""

import os
import shutil
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: @triton.jit reads the variable when it decorates.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Solver steps run their reference eagerly but where a test asks for the compiled one: each variant takes seconds.
os.environ.setdefault("FASTDIFF_COMPILE_STEP", "0")

# In a SLURM job all tests would be of one launch, which may go on with what it has begun.
os.environ.pop("SLURM_JOB_ID", None)

from fastdiff.kernels import dispatch

KERNEL_TESTS = Path(__file__).parent / "kernels"


INTERPRET = dispatch.INTERPRET


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # before fixtures of any scope are made
    dispatch.INTERPRET = INTERPRET and KERNEL_TESTS in item.path.parents


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device the tests run on: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def needs_cxx() -> None:
    """Skips, by name, a test that compiles for the CPU where there is no C++ compiler."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        pytest.skip("needs a C++ compiler: torch.compile builds CPU kernels with it")
