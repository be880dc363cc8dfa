"""Continuous batching: requests with their own solvers, step counts, guidance and seeds share the model's calls.

A request joins at any step and leaves after its last row; the others neither wait for it nor change. Each is at its own
row of its own table: the `p_sample` kernel reads a row per sample. The states of all lie densely at the front of one
buffer; where a request leaves, the last one takes its place.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor

from fastdiff.compilation import COMPILE_CHOICES
from fastdiff.device import existing_device
from fastdiff.engine_model import BucketedModel
from fastdiff.engine_places import Places
from fastdiff.engine_request import JoinedTables, Packed, Request, RequestTables
from fastdiff.kernels.p_sample import p_sample_
from fastdiff.model_arguments import model_inputs, without_tensors
from fastdiff.prediction import PredictionType
from fastdiff.schedule import NoiseSchedule

Method = TypeVar("Method", bound=Callable[..., Any])


class Finished(NamedTuple):
    """A request's number, as `Engine.add` gave it, and its sample, float32 [C, *spatial]."""

    id: int
    sample: Tensor


@dataclass(eq=False)
class _Running:
    """A request that waits or is under way, and the row that it is at."""

    id: int
    request: Request
    packed: Packed
    cond: dict[str, Tensor]
    uncond: dict[str, Tensor]
    row: int = 0

    @property
    def places(self) -> int:
        return 2 if self.packed.table.guided else 1

    @property
    def evaluates(self) -> bool:
        return self.packed.evaluates[self.row]

    @property
    def guided(self) -> bool:
        """At this row."""
        return self.packed.guided[self.row]


def _outside_inference_mode(method: Method) -> Method:
    """Without autograd, but on ordinary tensors: those of inference mode could not be written outside it later."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return cast(Method, call)


class Engine:
    """Draws samples of one shape from one model for requests that come and go.

        engine = Engine(model, schedule, (3, 32, 32))
        id = engine.add(Request(num_inference_steps=20, seed=7))
        while engine.busy:
            for id, sample in engine.step():
                ...

    Args:
        model, schedule, prediction_type, dtype, device, compile, cuda_graph: as in `fastdiff.Sampler`.
        shape: [C, *spatial] of a sample.
        batch_sizes: the batches that a captured or compiled model is called with, ascending; a call is padded to the
            next one. The last is how many places there are: a guided request takes two, and requests wait in order of
            arrival.

    A sample equals that of a `Sampler` with the same seed but for what another batch size changes in the last bits of
    the model. t is int64 for the model while all requests under way have whole timesteps, else float32. An engine is
    for one thread (`fastdiff.engine_thread` gives it one). Between two steps the weights of an nn.Module may be changed
    or replaced, which captures its calls anew; swapping modules, or weights behind a function, needs a new engine.

    Raises ValueError, TypeError for arguments out of range.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        shape: Sequence[int],
        *,
        prediction_type: str = "epsilon",
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compile: bool | str = False,
        cuda_graph: bool | str = "auto",
    ) -> None:
        sizes = list(batch_sizes)
        if not sizes or any(type(size) is not int or size < 1 for size in sizes) or sizes != sorted(set(sizes)):
            raise ValueError(f"batch_sizes must be ascending integers of at least 1, got {batch_sizes!r}")
        if cuda_graph not in (True, False, "auto"):
            raise ValueError(f'cuda_graph must be True, False or "auto", got {cuda_graph!r}')
        if dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype must be None, float32, float16, bfloat16 or float64, got {dtype}")
        known = get_args(PredictionType)
        if prediction_type not in known:
            raise ValueError(f"prediction_type must be one of {', '.join(known)}, got {prediction_type!r}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        if len(shape) < 1 or any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"shape must be [C, *spatial] with sizes of at least 1, got {shape!r}")
        if compile not in COMPILE_CHOICES:
            raise ValueError(f"compile must be one of {', '.join(map(repr, COMPILE_CHOICES))}, got {compile!r}")
        first = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
        own = first.dtype if first is not None and first.is_floating_point() else torch.float32
        if device is None:
            device = first.device if first is not None else torch.device("cpu")
        self.device = existing_device(device)
        if dtype == torch.float32 and own != dtype:
            raise ValueError(f"dtype float32 is no autocast of a {own} model: convert the model with .float()")
        if cuda_graph is True and self.device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device, got {self.device}")
        self.model = model
        self.shape, self.capacity = tuple(shape), sizes[-1]
        self._call = BucketedModel(
            model,
            sizes=sizes,
            shape=self.shape,
            device=self.device,
            dtype=own,
            autocast_dtype=None if dtype in (None, own) else dtype,
            compile=compile,
            captures=self.device.type == "cuda" if cuda_graph == "auto" else bool(cuda_graph),
        )
        self._places = Places(self.capacity, self.shape, own, self.device)
        self._numbers = itertools.count()
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._tables = RequestTables(schedule, prediction_type, self.device)
        self._joined: JoinedTables | None = None
        self._done: list[Finished] = []
        self._answered = False

    @property
    def busy(self) -> bool:
        """True while a request waits or is under way, or a sample has not been returned."""
        return bool(self._waiting or self._running or self._done)

    @property
    def model_answered(self) -> bool:
        """Whether the model has taken a call: until then nothing says that arguments of the first request fit it."""
        return self._answered

    @property
    def num_waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have one."""
        return len(self._running)

    @_outside_inference_mode
    def add(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises ValueError, TypeError where its options have no walk, its arguments do not fit those of earlier requests,
        or it needs more places than there are.
        """
        for name in ("seed", "sample_index"):
            value = getattr(request, name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"{name} must be an integer in [0, 2^63), got {value!r}")
        packed = self._tables.table_of(request)
        table = packed.table
        inputs = model_inputs(
            self.model,
            1,
            self.device,
            request.model_kwargs,
            dict(request.uncond_kwargs),
            guided=table.guided,
            has_scale=request.guidance_scale is not None,
        )
        # the caller may go on using its tensors
        cond = {path[5:]: value.clone() for path, value in inputs.items() if path.startswith("cond.")}
        uncond = {path[7:]: value[:1].clone() for path, value in inputs.items() if path.startswith("guided.")}
        entry = _Running(next(self._numbers), request, packed, cond, uncond)
        if entry.places > self.capacity:
            raise ValueError(f"a guided request takes 2 places, batch_sizes end at {self.capacity}")
        if not (self._answered or self._waiting or self._running):
            self._places.forget_arguments()
        self._places.accept(without_tensors(request.model_kwargs), cond)
        self._waiting.append(entry)
        return entry.id

    def abort(self, id: int) -> bool:
        """Forget a request and free its place at once; False if it is not here (any more)."""
        for entry in self._waiting:
            if entry.id == id:
                self._waiting.remove(entry)
                return True
        for place, entry in enumerate(self._running):
            if entry.id == id:
                self._leave(place)
                return True
        return False

    @_outside_inference_mode
    def step(self) -> list[Finished]:
        """Admit what waits, call the model once for all that are under way, and return what is finished."""
        while self._waiting and self._taken() + self._waiting[0].places <= self.capacity:
            self._enter(self._waiting.popleft())
        self._run_rows_without_model()
        # a table may never evaluate the model; samples are kept here in case that others' call of it fails
        self._done += self._finished()
        if self._running:
            rows = self._rows(self._running)
            output, uncond = self._evaluate(rows)
            self._answered = True
            self._run_rows(slice(0, len(self._running)), rows, output, uncond)
            self._run_rows_without_model()
            self._done += self._finished()
        done, self._done = self._done, []
        return done

    def run(self, requests: Iterable[Request]) -> list[Tensor]:
        """Add requests, step until nothing is left to do, and return their samples in order.

        Raises RuntimeError where requests of others are here: nobody would get their samples. Of requests that `add`
        refuses none is left behind.
        """
        if self.busy:
            here = self.num_waiting + self.num_running
            raise RuntimeError(f"{here} requests are here already: step until they are done")
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self.add(request))
        except Exception:
            for id in ids:
                self.abort(id)
            raise
        done: dict[int, Tensor] = {}
        while self.busy:
            done.update(self.step())
        return [done[id] for id in ids]

    def _taken(self) -> int:
        return sum(entry.places for entry in self._running)

    def _enter(self, entry: _Running) -> None:
        """Give the request the first free place."""
        self._places.start(len(self._running), entry.request, entry.packed.table, entry.cond, entry.uncond)
        self._running.append(entry)
        self._joined = None

    def _leave(self, place: int) -> None:
        """Free a place: the last request moves there."""
        last = len(self._running) - 1
        if place != last:
            self._places.move(last, place)
            self._running[place] = self._running[last]
        self._running.pop()
        self._joined = None

    def _finished(self) -> list[Finished]:
        done = []
        for place in reversed(range(len(self._running))):
            entry = self._running[place]
            if entry.row == len(entry.packed.table):
                done.append(Finished(entry.id, self._places.x[place].clone()))
                self._leave(place)
        return done[::-1]

    def _evaluate(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's output for all under way, and the unconditional one where any row is guided."""
        count, places = len(self._running), self._places
        guided = [place for place, entry in enumerate(self._running) if entry.guided]
        t = self._tables_of_all().timesteps.index_select(0, rows)
        x, tensors = places.model_input[:count], {path: value[:count] for path, value in places.cond.items()}
        if guided:
            index = self._upload(guided, torch.int64)
            x = torch.cat([x, x.index_select(0, index)])
            t = torch.cat([t, t.index_select(0, index)])
            tensors = {path: torch.cat([v, places.uncond[path].index_select(0, index)]) for path, v in tensors.items()}
        assert places.arguments is not None
        output = self._call(x, t, tensors, places.arguments)
        channels = 2 * self.shape[0]
        if any(entry.packed.learns_variance for entry in self._running) and output.shape[1] != channels:
            raise ValueError(f"model must return {channels} channels for a learned variance, got {output.shape[1]}")
        if not guided:
            return output, None
        # where a row is not guided, both halves are the same: g = 1 then gives the output itself, bit for bit
        conditional = output[:count].clone()  # a view of the model's output may have other strides than its clone
        return conditional, conditional.clone().index_copy_(0, index, output[count:])

    def _run_rows_without_model(self) -> None:
        """Until every request is at a row that evaluates the model, or at its end."""
        while True:
            places = [
                place
                for place, entry in enumerate(self._running)
                if entry.row < len(entry.packed.table) and not entry.evaluates
            ]
            if not places:
                return
            for place in places:
                self._run_rows(slice(place, place + 1), self._rows([self._running[place]]), None, None)

    def _run_rows(self, part: slice, rows: Tensor, output: Tensor | None, uncond: Tensor | None) -> None:
        """Execute the row that each request of `part` is at."""
        tables, places, entries = self._tables_of_all(), self._places, self._running[part]
        draws = any(entry.packed.draws_noise for entry in entries)
        p_sample_(
            places.x[part],
            output,
            tables.rows,
            rows,
            model_output_uncond=uncond,
            history=places.history[: tables.n_slots, part] if tables.n_slots else None,
            seed=places.seeds[part] if draws else None,
            sample_indices=places.sample_indices[part] if draws else None,
            model_input_out=places.model_input[part],
        )
        for entry in entries:
            entry.row += 1

    def _rows(self, entries: Iterable[_Running]) -> Tensor:
        """int32: the rows that requests are at, in the table of all."""
        first = self._tables_of_all().first
        return self._upload([first[id(entry.packed)] + entry.row for entry in entries], torch.int32)

    def _tables_of_all(self) -> JoinedTables:
        if self._joined is None:
            self._joined = JoinedTables.of(entry.packed for entry in self._running)
            self._places.need_slots(self._joined.n_slots)
        return self._joined

    def _upload(self, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A small tensor on the device, without waiting for it."""
        value = torch.tensor(values, dtype=dtype)
        return value.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else value
