"""Captured steps: static buffers and the CUDA graphs that advance them, kept and reused between calls."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch

Buffers = TypeVar("Buffers")
MAX_ENTRIES = 8
WARMUP_CALLS = 2


def capture(
    step: Callable[[], None], reset: Callable[[], None], device: torch.device, pool: Any
) -> tuple[Callable[[], None], Any]:
    """Warm `step` up on a side stream, capture it, and return (what replays it, its memory pool).

    `step` may read and write static tensors only; `reset` puts them into a state it can start from.
    Raises RuntimeError if it does something that cannot be captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            reset()
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads of the process may go on using the device while this one captures
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay, graph.pool()


class Entry(Generic[Buffers]):
    """Static buffers and what advances them; `lock` guards both for the whole of a call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buffers: Buffers | None = None
        self.steps: Mapping[Hashable, Callable[[], None]] = {}

    def prepare(
        self,
        buffers: Buffers,
        steps: Mapping[Hashable, Callable[[], None]],
        reset: Callable[[], None],
        device: torch.device,
    ) -> None:
        """Capture each kind of step on the buffers; where one cannot be, all run eagerly, with one warning."""
        replays, pool = {}, None
        try:
            for kind, step in steps.items():
                replays[kind], pool = capture(step, reset, device, pool)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"the step cannot be captured in a CUDA graph, so it runs eagerly: {reason}", stacklevel=4)
            replays = dict(steps)
        self.buffers, self.steps = buffers, replays


class GraphCache(Generic[Buffers]):
    """At most MAX_ENTRIES entries; the least recently used one is dropped. Safe from several threads."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Entry[Buffers]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, key: Hashable) -> Entry[Buffers]:
        """The entry of this key, new and unprepared if there was none."""
        with self._lock:
            entry = self._entries.setdefault(key, Entry())
            self._entries.move_to_end(key)
            while len(self._entries) > MAX_ENTRIES:
                self._entries.popitem(last=False)
            return entry
