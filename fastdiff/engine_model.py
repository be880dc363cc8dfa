"""A model called with batches of a few fixed sizes, so that each size is compiled and captured once."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.compilation import compiled
from fastdiff.cuda_graph import BakedIn, capture
from fastdiff.kernels.layout import empty
from fastdiff.model_arguments import with_tensors


class BucketedModel:
    """Calls `model(x, t, **arguments)`, captured or compiled with a batch padded to the next of `sizes`.

    Padding pays where a size costs seconds at first; a model that runs eagerly is called with the batch as it is.

    Args:
        sizes: batch sizes, ascending.
        shape: [C, *spatial] of one sample.
        dtype: of the model's input; autocast_dtype: None for no autocast.
        compile: as in `fastdiff.Sampler`.
        captures: replay each size as a CUDA graph; all are captured anew where the model's weights lie elsewhere than
            before, its mode has changed or it has other hooks.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        sizes: Sequence[int],
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        autocast_dtype: torch.dtype | None,
        compile: bool | str,
        captures: bool,
    ) -> None:
        self.sizes, self.shape, self.device = tuple(sizes), shape, device
        self.dtype, self.autocast_dtype = dtype, autocast_dtype
        self._model = compiled(model, compile) if compile else model
        self._captures, self._compiles = captures, bool(compile)
        self._baked_in = BakedIn(model)
        self._state: Hashable = None
        self._calls: dict[Hashable, _Bucket] = {}

    def __call__(self, x: Tensor, t: Tensor, tensors: Mapping[str, Tensor], arguments: dict[str, Any]) -> Tensor:
        """The output [N, C or 2C, *spatial] for x [N, C, *spatial], t [N] and tensors [N, ...]; N <= sizes[-1].

        arguments: the model's keyword arguments, with a `TensorAt` for each tensor. The next call may overwrite the
        output.
        """
        if not (self._captures or self._compiles):
            return self._evaluate(x, t, tensors, arguments)
        if self._captures and (state := self._baked_in.state()) != self._state:
            self._calls.clear()
            self._state = state
        size = next(size for size in self.sizes if size >= len(x))
        bucket = self._calls.get((size, t.dtype))
        if bucket is None:
            bucket = self._calls[size, t.dtype] = self._bucket(size, t, tensors, arguments)
        bucket.x[: len(x)].copy_(x)
        bucket.t[: len(x)].copy_(t)
        for path, value in tensors.items():
            bucket.tensors[path][: len(x)].copy_(value)
        return bucket.run()[: len(x)]

    def _bucket(self, size: int, t: Tensor, tensors: Mapping[str, Tensor], arguments: dict[str, Any]) -> _Bucket:
        """Static tensors; what pads a batch is a sample of zeros at first, and later one of an earlier call."""
        x = empty((size, *self.shape), self.dtype, self.device, channels_last=True).zero_()
        statics = {path: value.new_zeros((size, *value.shape[1:])) for path, value in tensors.items()}
        bucket = _Bucket(x, t.new_zeros(size), statics)

        def call() -> None:
            bucket.output = self._evaluate(bucket.x, bucket.t, bucket.tensors, arguments)

        bucket.replay = call
        if self._captures:
            try:
                bucket.replay, _ = capture(call, lambda: None, self.device, None)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                message = f"the model cannot be captured in a CUDA graph, so it runs eagerly: {reason}"
                warnings.warn(message, stacklevel=4)
                bucket.replay = call
                self._captures = False
        return bucket

    def _evaluate(self, x: Tensor, t: Tensor, tensors: Mapping[str, Tensor], arguments: dict[str, Any]) -> Tensor:
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.autocast_dtype is not None:
            # the cache of cast weights ends with the context, and a captured graph would go on reading it
            context = torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=False)
        with context:
            output = self._model(x, t, **with_tensors(arguments, tensors))
        return _checked(output, x)


class _Bucket:
    """The static tensors of one batch size and what runs the model on them."""

    def __init__(self, x: Tensor, t: Tensor, tensors: dict[str, Tensor]) -> None:
        self.x, self.t, self.tensors = x, t, tensors
        self.output: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    def run(self) -> Tensor:
        assert self.replay is not None
        self.replay()
        assert self.output is not None
        return self.output


def _checked(output: Any, x: Tensor) -> Tensor:
    output = output if isinstance(output, Tensor) else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor or an object with one as .sample, got {type(output).__name__}")
    size = math.prod(x.shape)
    if output.shape[0] != x.shape[0] or output.shape[2:] != x.shape[2:] or output.numel() not in (size, 2 * size):
        raise ValueError(f"model must return a tensor of shape {list(x.shape)}, got {list(output.shape)}")
    return output
