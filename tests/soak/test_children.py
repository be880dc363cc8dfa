"""Processes that the trials start end with them."""

import sys
import time

import pytest

from soak.children import descendants, is_alive, launch, stop

SLEEPER = "import time; time.sleep(600)"
# as torchrun does: its workers in sessions of their own, which a signal to its group does not reach
LAUNCHER = f"""
import subprocess, sys
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], start_new_session=True)
{SLEEPER}
"""


def test_stop_leaves_no_worker():
    running = launch([sys.executable, "-c", LAUNCHER])
    try:
        deadline = time.monotonic() + 60
        while len(workers := descendants(running.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(workers) == 2
        assert all(map(is_alive, workers))
    finally:
        stop(running)
    assert not any(map(is_alive, [running.pid, *workers]))
    # nobody holds the pipe: the output ends
    assert running.communicate(timeout=60)[0] == ""
    assert running.returncode == -9
    stop(running)


def test_stop_says_what_it_could_not_end(monkeypatch):
    monkeypatch.setattr("soak.children.is_alive", lambda pid: True)
    running = launch([sys.executable, "-c", SLEEPER])
    with pytest.raises(TimeoutError, match=f"the processes .{running.pid}. are still there"):
        stop(running, seconds=0.1)
    assert running.wait(timeout=60) == -9
