"""The SLURM example is a script that bash can read, and what it asks of SLURM; no test has a SLURM."""

import os
import shutil
import signal
import subprocess
import time
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


def test_before_the_time_is_up_the_steps_are_asked_to_stop_and_the_job_is_requeued(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    said = tmp_path / "said"
    commands = {
        "srun": f'echo "srun $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >>{said}\n'
        f"while [ ! -e {tmp_path}/stop ]; do sleep 0.05; done; echo saved >>{said}; exit 1",
        "scancel": f'echo "scancel $*" >>{said}; touch {tmp_path}/stop',
        "scontrol": f'[ "$1" = show ] || echo "scontrol $*" >>{said}; echo machine',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!{bash}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "machine", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    running = subprocess.Popen([bash, str(SCRIPT)], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not said.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(timeout=60) == 0
    finally:
        (tmp_path / "stop").touch()
        running.kill()
    assert said.read_text().splitlines() == ["srun 1", "scancel --signal=TERM 7", "saved", "scontrol requeue 7"]
