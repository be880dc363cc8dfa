"""The SLURM example is a script that bash can read; no test has a SLURM."""

import shutil
import subprocess
from pathlib import Path

import pytest

import fastdiff.examples

SCRIPT = Path(fastdiff.examples.__file__).with_name("slurm_train.sh")


def test_bash_reads_it():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    finished = subprocess.run([bash, "-n", str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_directives_come_before_the_first_command():
    """sbatch ignores those that come later."""
    lines = SCRIPT.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives
    assert max(directives) < first
