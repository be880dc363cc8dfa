"""A plain-PyTorch reference, compiled by Inductor for the CPU without the guards that torch.compile checks on a call.

A façade's step takes some 100 microseconds on a CPU, of which torch.compile would spend 50 in comparing arguments. Here
the caller's arguments are of known kinds, so that their kinds make the key of a dictionary of compiled graphs with
symbolic sizes.
"""

import os
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

# Any sizes but 0 and 1, which tracing would take as constants; large, or Inductor would not use several threads.
_GROUPS, _ELEMENTS = 4, 65536


class CompiledRef:
    """Calls `function`, compiled for its combination of argument kinds; eager where that cannot be.

    Positional arguments are tensors ([G, n], [G], or columns [G or 1, n_columns, 1]), lists of them, None, bools and
    dtypes; results are a list of tensors. With FASTDIFF_COMPILE_STEP=0 in the environment, or after a
    compilation failed (one warning says why), the function itself runs.
    """

    def __init__(self, function: Callable[..., list[Tensor]]) -> None:
        self._function = function
        self._graphs: dict[Hashable, Callable[..., list[Tensor]]] = {}
        self._lock = threading.Lock()
        self._failed = False

    def __call__(self, *arguments: Any) -> list[Tensor]:
        if self._failed or os.environ.get("FASTDIFF_COMPILE_STEP") == "0":
            return self._function(*arguments)
        key, tensors = _describe(arguments)
        graph = self._graphs.get(key)
        if graph is None:
            with self._lock:
                graph = self._graphs.get(key) or self._compile(arguments, tensors)
                if graph is None:
                    return self._function(*arguments)
                self._graphs[key] = graph
        return graph(*tensors)

    def _compile(self, arguments: tuple[Any, ...], tensors: list[Tensor]) -> Callable[..., list[Tensor]] | None:
        try:
            return _compile(self._function, arguments, tensors)
        except Exception as error:  # a compiler may raise anything
            self._failed = True
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            warnings.warn(f"Inductor cannot compile for this CPU, so solver steps run eagerly: {reason}", stacklevel=4)
            return None


def _describe(arguments: tuple[Any, ...]) -> tuple[Hashable, list[Tensor]]:
    """What a graph depends on, and the tensors it takes."""
    kinds: list[Hashable] = []
    tensors: list[Tensor] = []
    for argument in arguments:
        items = argument if type(argument) is list else (argument,)
        kinds.append(len(items))
        for item in items:
            if not isinstance(item, Tensor):
                kinds.append(item)
                continue
            tensors.append(item)
            shape = item.shape
            # a single group broadcasts, and half of a wider tensor has a wider stride
            wider = item.stride(0) != shape[1] if len(shape) == 2 else shape[1:]
            kinds += (item.dtype, len(shape), shape[0] == 1, wider)
    return tuple(kinds), tensors


def _example(tensor: Tensor) -> Tensor:
    """A small tensor of the same kind."""
    groups = 1 if tensor.shape[0] == 1 else _GROUPS
    if tensor.ndim != 2:
        return torch.zeros(groups, *tensor.shape[1:], dtype=tensor.dtype)
    width = _ELEMENTS if tensor.stride(0) == tensor.shape[1] else 2 * _ELEMENTS
    return torch.zeros(groups, width, dtype=tensor.dtype)[:, :_ELEMENTS]


def _compile(
    function: Callable[..., list[Tensor]], arguments: tuple[Any, ...], tensors: list[Tensor]
) -> Callable[..., list[Tensor]]:
    def of_tensors(*inputs: Tensor) -> list[Tensor]:
        rest = iter(inputs)

        def place(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return next(rest)
            return [next(rest) for _ in argument] if isinstance(argument, list) else argument

        return function(*[place(argument) for argument in arguments])

    examples = [_example(tensor) for tensor in tensors]
    with torch.no_grad():
        graph = make_fx(of_tensors, tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        # torch 2.11 cannot make a cache key of symbolic sizes and logs a traceback
        with torch._inductor.config.patch(fx_graph_cache=False):
            compiled = torch._inductor.compile(graph, inputs)
        # a graph that cannot be called is a failure of the compiler, not of the caller
        compiled(*examples)
    return compiled  # type: ignore[return-value]
