"""An engine in a thread of its own: requests from any thread become futures, and to cancel one frees its place."""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import Future, InvalidStateError

import torch
from torch import Tensor

from fastdiff.engine import Engine
from fastdiff.engine_request import Request


class EngineThread:
    """Steps an engine while there is work. The engine must be left to it.

        thread = EngineThread(Engine(model, schedule, (3, 32, 32)))
        future = thread.submit(Request(num_inference_steps=20, seed=7))
        sample = future.result()  # in a coroutine: await asyncio.wrap_future(future)

    A future gives the sample, float32 [C, *spatial] on the engine's device, or raises what `Engine.add` did. One that
    is cancelled, also by a coroutine that is, leaves the engine before its next step. An error of a step ends the
    thread: all requests under way get it, and later ones are refused. Where the model has never taken a call before,
    only these requests get it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[Request, Future[Tensor]] | None] = queue.SimpleQueue()
        self._futures: dict[int, Future[Tensor]] = {}
        self._previous: torch.cuda.Event | None = None
        self._ended: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="fastdiff engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Requests that have a place in the model's batch."""
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return self._engine.num_waiting + self._inbox.qsize()

    def submit(self, request: Request) -> Future[Tensor]:
        """Queue a request. Raises RuntimeError after the thread's end."""
        future: Future[Tensor] = Future()
        with self._lock:
            self.check()
            self._inbox.put((request, future))
        return future

    def check(self) -> None:
        """Raises RuntimeError after the thread's end, with its reason."""
        if self._ended is not None:
            raise RuntimeError(self._ended)

    def close(self) -> None:
        """End the thread after the step that it is in; requests that are not done are cancelled."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        error: Exception | None = None
        try:
            while self._admit():
                self._abort_cancelled()
                try:
                    finished = self._engine.step()
                except Exception as raised:
                    if self._engine.model_answered:
                        raise
                    self._refuse_all(raised)
                    continue
                for id, sample in finished:
                    _resolve(self._futures.pop(id), sample)
                self._keep_pace()
        except Exception as raised:
            error = raised
        with self._lock:
            # from here on nothing comes in
            self._ended = "the engine is closed" if error is None else f"the engine has stopped: {error}"
        unread = [self._inbox.get() for _ in range(self._inbox.qsize())]
        for future in [*self._futures.values(), *(entry[1] for entry in unread if entry is not None)]:
            if error is None:
                future.cancel()
            else:
                _resolve(future, RuntimeError(self._ended))

    def _admit(self) -> bool:
        """Give the engine what came in, and wait for something where it has nothing to do; False at the end."""
        for _ in range(max(self._inbox.qsize(), not self._engine.busy)):
            entry = self._inbox.get()
            if entry is None:
                return False
            request, future = entry
            try:
                self._futures[self._engine.add(request)] = future
            except Exception as error:
                _resolve(future, error)
        return True

    def _abort_cancelled(self) -> None:
        for id in [id for id, future in self._futures.items() if future.cancelled()]:
            self._engine.abort(id)
            del self._futures[id]

    def _refuse_all(self, error: Exception) -> None:
        """The first call of the model failed: what was asked of it did not fit."""
        for id, future in self._futures.items():
            self._engine.abort(id)
            _resolve(future, error)
        self._futures.clear()

    def _keep_pace(self) -> None:
        """Be one step ahead of a GPU, no more: who comes next would have to wait for all that is enqueued."""
        if self._engine.device.type == "cuda":
            if self._previous is not None:
                self._previous.synchronize()
            self._previous = torch.cuda.current_stream(self._engine.device).record_event()


def _resolve(future: Future[Tensor], result: Tensor | Exception) -> None:
    """Unless it is cancelled, which may happen at any moment."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
