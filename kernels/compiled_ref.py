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
from torch import Tensor

# Read once: asking the environment takes a microsecond of every call.
ENABLED = os.environ.get("FASTDIFF_COMPILE_STEP") != "0"
# Any sizes but 0 and 1, which tracing would take as constants; large, or Inductor would not use several threads.
_GROUPS, _LENGTH = 4, 4096


Graph = Callable[[list[Tensor]], list[Tensor]]


class CompiledRef:
    """Calls `function`, compiled for its combination of argument kinds; eager where that cannot be.

    Positional arguments are tensors ([G, n, lanes], columns [G or 1, n_columns], [G]), lists of them, None, bools and
    dtypes; results are a list of tensors. With FASTDIFF_COMPILE_STEP=0 in the environment, or after a compilation
    failed (one warning says why), the function itself runs.
    """

    def __init__(self, function: Callable[..., list[Tensor]]) -> None:
        self._function = function
        self._graphs: dict[Hashable, Graph] = {}
        self._lock = threading.Lock()
        self._failed = False

    def __call__(self, *arguments: Any) -> list[Tensor]:
        if self._failed or not ENABLED:
            return self._function(*arguments)
        key, tensors = _describe(arguments)
        graph = self._graphs.get(key)
        if graph is None:
            with self._lock:
                graph = self._graphs.get(key) or self._compile(arguments, tensors)
                if graph is None:
                    return self._function(*arguments)
                self._graphs[key] = graph
        return graph(tensors)

    def _compile(self, arguments: tuple[Any, ...], tensors: list[Tensor]) -> Graph | None:
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
            last = (shape[2], item.stride(0) != shape[1] * shape[2]) if len(shape) == 3 else shape[1:]
            kinds += (item.dtype, shape[0] == 1, last)
    return tuple(kinds), tensors


def _example(tensor: Tensor) -> Tensor:
    """A tensor of the same kind."""
    groups = 1 if tensor.shape[0] == 1 else _GROUPS
    if tensor.ndim < 3:
        return torch.zeros(groups, *tensor.shape[1:], dtype=tensor.dtype)
    _, length, lanes = tensor.shape
    example = torch.zeros(
        groups, _LENGTH if tensor.stride(0) == length * lanes else 2 * _LENGTH, lanes, dtype=tensor.dtype
    )
    return example[:, :_LENGTH]


def _compile(function: Callable[..., list[Tensor]], arguments: tuple[Any, ...], tensors: list[Tensor]) -> Graph:
    """A graph of the tensors of a call, for any sizes."""
    from torch._inductor import compile as inductor_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    def of_tensors(*inputs: Tensor) -> list[Tensor]:
        rest = iter(inputs)

        def place(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return next(rest)
            return [next(rest) for _ in argument] if isinstance(argument, list) else argument

        return function(*[place(argument) for argument in arguments])

    examples = [_example(tensor) for tensor in tensors]
    with torch.no_grad():
        try:
            graph = _without_wrapper(of_tensors, examples)
            graph(list(examples))
        except Exception:  # not public interfaces: they may change with any version of torch
            module = make_fx(of_tensors, tracing_mode="symbolic")(*examples)
            inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
            compiled: Any = inductor_compile(module, inputs)

            def graph(tensors: list[Tensor]) -> list[Tensor]:
                return compiled(*tensors)

            # a graph that cannot be called is a failure of the compiler, not of the caller
            graph(examples)
    return graph


def _without_wrapper(function: Callable[..., list[Tensor]], examples: list[Tensor]) -> Graph:
    """Inductor without AOTAutograd, whose wrapper takes as long as a small step: nothing here mutates or aliases.

    Only the number of groups and of vectors vary. With the number of lanes, too, each vector would be asked whether it
    is the last one, by a division that takes longer than the vector.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def stand_in(example: Tensor) -> Tensor:
        sizes = [DimDynamic.STATIC if size == 1 else DimDynamic.DYNAMIC for size in example.shape]
        if example.ndim > 1:
            sizes[-1] = DimDynamic.STATIC
        return mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    inputs = [stand_in(example) for example in examples]
    module = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
    # torch 2.11 cannot make a cache key of symbolic sizes and logs a traceback
    with tracing(TracingContext(mode)), config.patch(fx_graph_cache=False):
        return compile_fx_inner(module, inputs)
