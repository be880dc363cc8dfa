"""Ctrl-C, SIGTERM and SIGUSR1 as a wish that a loop fulfils between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

# Batch systems are often told to send SIGUSR1 some minutes before the time is up. Windows has none.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `requested`; a second Ctrl-C acts as usual.

    The other two may come twice for one wish, from a batch system and once more through torchrun, and change nothing
    then. Outside the main thread, where Python handles no signals, nothing changes.

    Under torchrun send SIGTERM to torchrun itself, on every machine; SIGUSR1 would kill it. A training run stops and
    saves as a whole even if only one of its processes, or one machine's torchrun, is told to; but the torchruns that
    were not told take this for a failure: with --max-restarts they start the run again, which goes on where it was, and
    wait for a machine that has left.
    """

    def __enter__(self) -> Interruption:
        self.requested = False
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self.handlers[number])
