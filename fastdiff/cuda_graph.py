"""Captured steps: static buffers and the CUDA graphs that advance them, kept and reused between calls."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Buffers = TypeVar("Buffers")
MAX_ENTRIES = 8
WARMUP_CALLS = 2

# A capture begins with a synchronisation of the device, which would break one that another thread has under way.
_capturing = threading.Lock()
# A graph whose capture failed is still known to torch's allocator, which would follow a dangling pointer to it.
_failed: list[torch.cuda.CUDAGraph] = []


def capture(
    step: Callable[[], None], reset: Callable[[], None], device: torch.device, pool: Any
) -> tuple[Callable[[], None], Any]:
    """Warm `step` up on a side stream, capture it, and return (what replays it, its memory pool).

    `step` may read and write static tensors only; `reset` puts them into a state it can start from.
    Raises RuntimeError if it does something that cannot be captured.
    """
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    # the outer context restores the caller's stream: torch.cuda.graph does not where its capture fails
    with _capturing, torch.cuda.stream(current):
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARMUP_CALLS):
                reset()
                step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads of the process may go on using the device while this one captures
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                step()
        except BaseException:
            graph.reset()
            _failed.append(graph)
            raise
    return graph.replay, graph.pool()


class BakedIn:
    """What a captured call of a model has baked in of it: where its weights lie, its modes, how many hooks it has.

    The tree of modules is walked once, so that asking costs little: swapping a module goes unnoticed, replacing or
    moving a weight does not. Of a callable that is no module nothing is known.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self._slots = [
            (tensors, name)
            for module in self._modules
            for tensors in (module._parameters, module._buffers)
            for name in tensors
        ]
        self._hooks = [
            hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    def state(self) -> Hashable:
        """Equal to that of an earlier call if and only if a graph captured then is still right."""
        weights = [tensors[name] for tensors, name in self._slots]
        return (
            tuple((weight.data_ptr(), weight.dtype) for weight in weights if weight is not None),
            tuple(map(len, self._hooks)),
            tuple(module.training for module in self._modules),
        )


class StreamLock:
    """A lock over device memory: what its next holder enqueues, on whatever stream, runs after what the last one did.

    `device` is set once it is known; until then it is an ordinary lock.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self._lock = threading.Lock()
        self._released: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._released is not None:
            torch.cuda.current_stream(self.device).wait_event(self._released)

    def __exit__(self, *_: object) -> None:
        try:
            if self.device is not None and self.device.type == "cuda":
                self._released = torch.cuda.current_stream(self.device).record_event()
        finally:
            self._lock.release()


class Entry(Generic[Buffers]):
    """Static buffers and what advances them; `lock` guards both for the whole of a call."""

    def __init__(self) -> None:
        self.lock = StreamLock()
        self.buffers: Buffers | None = None
        self.steps: Mapping[Hashable, Callable[[], None]] = {}
        self._captured: Mapping[Hashable, Callable[[], None]] = {}

    def prepare(
        self,
        buffers: Buffers,
        steps: Mapping[Hashable, Callable[[], None]],
        reset: Callable[[], None],
        device: torch.device,
    ) -> None:
        """Capture each kind of step on the buffers; where one cannot be, all run eagerly, with one warning."""
        self.lock.device = device
        replays, pool = {}, None
        try:
            for kind, step in steps.items():
                replays[kind], pool = capture(step, reset, device, pool)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"the step cannot be captured in a CUDA graph, so it runs eagerly: {reason}", stacklevel=4)
            replays = dict(steps)
        # a graph reads by address: what the steps hold, the packed table for one, must live as long as it does
        self.buffers, self.steps, self._captured = buffers, replays, steps


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
