"""Ctrl-C and SIGTERM as a wish that a loop fulfils between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interruption:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second one acts as usual.

    Outside the main thread, where Python handles no signals, nothing changes.
    """

    def __enter__(self) -> Interruption:
        self.requested = False
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
