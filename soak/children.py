"""Real processes to kill: those of a function, which start in milliseconds, and those of a command."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Forked from a clean process that has imported torch: 40 ms each, and nothing of this process in them.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["fastdiff.checkpoint"])


class Child:
    """A process that runs function(reports, *arguments); it reports over `reports.send`."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self._receiver, sender = _SERVER.Pipe(duplex=False)
        self._process = _SERVER.Process(target=function, args=(sender, *arguments), daemon=True)
        self._process.start()
        # the child's copy alone is left, so that its end is the end of the reports
        sender.close()

    def first(self, seconds: float = 120) -> Any:
        """Wait for the first report; EOFError where the process ends without one, TimeoutError after so long."""
        if not self._receiver.poll(seconds):
            raise TimeoutError(f"a child reported nothing in {seconds} s")
        return self._receiver.recv()

    def kill(self) -> list[Any]:
        """SIGKILL, and what it has reported since."""
        self._process.kill()
        return self.end()

    def end(self) -> list[Any]:
        """Wait for its end; what it has reported since."""
        reports = list(_until_end(self._receiver))
        self._process.join()
        self._receiver.close()
        return reports

    @property
    def exit_code(self) -> int | None:
        """-9 after SIGKILL."""
        return self._process.exitcode


def _until_end(receiver: Connection):
    while True:
        try:
            yield receiver.recv()
        except EOFError:
            return


def command(*words: str, processes: int | None = None, torchrun: Sequence[str] = ()) -> list[str]:
    """That of `fastdiff *words`, on so many processes of torchrun."""
    if processes is None:
        return [sys.executable, "-m", "fastdiff", *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # without the dashes torchrun would take --num for an abbreviation of its own options
    return [*launcher, *torchrun, "-m", "fastdiff", "--", *words]


def environment(**changes: str) -> dict[str, str]:
    """For a process of its own: this one's, without the interpreter and with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", **changes}


def launch(words: Sequence[str], **changes: str) -> subprocess.Popen[str]:
    """Start a command, in a group of its own; what it prints comes out of `stdout`."""
    return subprocess.Popen(
        words,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    """Whether it runs; one that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def stop(running: subprocess.Popen[str], *, seconds: float = 30) -> None:
    """SIGKILL to a command that is still there and to all that it has started; wait until they are gone.

    torchrun's workers are in sessions of their own: a signal to its group does not reach them, and they would go on
    without it. TimeoutError where one is still there after so many seconds.
    """
    if running.poll() is not None:
        return
    # no worker more is started while they are looked for
    running.send_signal(signal.SIGSTOP)
    pids = [running.pid, *descendants(running.pid)]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{seconds} s after SIGKILL the processes {left} are still there")
        time.sleep(0.005)
