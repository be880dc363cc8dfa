"""Real processes to kill: those of a function, which start in milliseconds, and those of a command."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
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
