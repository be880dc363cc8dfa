"""A model's forward replayed as CUDA graphs, one for each layout of its arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdiff.cuda_graph import GraphCache
from fastdiff.model_arguments import is_plain, tensors_of, with_tensors, without_tensors

# the kind of device that has graphs
GRAPH_DEVICE = "cuda"


@dataclass
class Call:
    """The static tensors a captured call reads, by path, and what it returned."""

    inputs: dict[str, Tensor]
    output: Any = None


class CapturedForward:
    """Calls `forward`; for a model on a CUDA device, in eval mode and without gradients, by replaying a CUDA graph.

    A graph serves one layout of the arguments (shapes, strides, dtypes, plain constants) and one place of the weights;
    tensors are copied in, and the output is a copy that the next call leaves alone. Anything else that forward depends
    on is as it was when the graph was captured.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self._model = model
        self._forward = forward
        self._graphs: GraphCache[Call] = GraphCache()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self._model.parameters()).device
        arguments = {"args": args, "kwargs": kwargs}
        constants = without_tensors(arguments)
        if device.type != GRAPH_DEVICE or self._model.training or torch.is_grad_enabled() or not is_plain(constants):
            return self._forward(*args, **kwargs)
        tensors = tensors_of(arguments)
        entry = self._graphs.entry(self._key(tensors, constants, device))
        with entry.lock:
            if entry.buffers is None:
                # A timestep may come on the host: on the device the graph can read it.
                call = Call({path: value.to(device, copy=True) for path, value in tensors.items()})
                static = with_tensors(constants, call.inputs)

                def step() -> None:
                    call.output = self._forward(*static["args"], **static["kwargs"])

                entry.prepare(call, {"forward": step}, lambda: None, device)
            assert entry.buffers is not None
            for path, value in tensors.items():
                entry.buffers.inputs[path].copy_(value)
            entry.steps["forward"]()
            return tree_map_only(Tensor, torch.clone, entry.buffers.output)

    def _key(self, tensors: dict[str, Tensor], constants: Any, device: torch.device) -> Hashable:
        weights = itertools.chain(self._model.parameters(), self._model.buffers())
        return (
            device,
            tuple((path, value.shape, value.stride(), value.dtype) for path, value in tensors.items()),
            repr(constants),
            tuple((weight.data_ptr(), weight.dtype) for weight in weights),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        )
