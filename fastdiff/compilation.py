"""torch.compile with the engine's settings, that may fail: without a working C++ compiler, the eager result."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.host_memory import keep_host_memory
from fastdiff.model_arguments import tensors_of

MODES = ("default", "max-autotune")
COMPILE_CHOICES = (True, False, "max-autotune", "repeated_blocks")
# Dynamo gives up on a function after 8 shapes; blocks that repeat through a network easily have more.
RECOMPILE_LIMIT = 64


def compile_options(device: torch.device | str, *, mode: str = "default", training: bool = False) -> dict[str, Any]:
    """Keyword arguments of torch.compile for a network on a device.

    Static shapes always: Inductor plans channels-last layouts for them only. On a GPU convolutions stay with cuDNN
    (Inductor's templates are no gain on Hopper, and take minutes to tune), and Inductor captures no CUDA graphs: the
    sampler and the training step capture their own, around more than the network.
    mode: "max-autotune" also lets Inductor time the candidates of each matrix product and pointwise kernel.
    training: without the settings that pay only where a graph is replayed very often.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    options: dict[str, Any] = {}
    if torch.device(device).type == "cuda":
        options = {"max_autotune_conv_backends": "ATEN", "triton.cudagraphs": False}
        if mode == "max-autotune":
            options |= {"max_autotune": True, "coordinate_descent_tuning": not training}
    return {"dynamic": False, "options": options}


class CompiledOrEager:
    """Calls torch.compile(function, dynamic=False) or, if its first call fails to compile, the function itself.

    Each new combination of the tensors' shapes, strides and dtypes compiles anew. An error of the function itself (a
    wrong argument, say) is raised as it is: it comes up in the eager call too. `compile_seconds`: what the calls that
    compiled took so far, a run of the function each included; Inductor keeps what it compiled on disk, so that a second
    process needs less.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.compile_seconds = 0.0
        self._eager = function
        self._compiled = torch.compile(function, **{"dynamic": False, **options})
        self._chosen: dict[Hashable, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = _call_key(args, kwargs)
        chosen = self._chosen.get(key)
        if chosen is not None:
            return chosen(*args, **kwargs)
        with self._lock:
            began = time.perf_counter()
            try:
                with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                    result = self._compiled(*args, **kwargs)
            except Exception as error:  # a compiler may raise anything
                result = self._eager(*args, **kwargs)
                self._compiled = self._chosen[key] = self._eager
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                warnings.warn(f"torch.compile failed, so the model runs uncompiled: {reason}", stacklevel=2)
            else:
                self._chosen[key] = self._compiled
                self.compile_seconds += time.perf_counter() - began
            return result


def _call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What two calls have in common that need no new compilation: tensors, also nested ones, modules and modes."""
    tensors = tensors_of({"args": args, "kwargs": kwargs})
    return (
        tuple((path, x.shape, x.stride(), x.dtype, x.device) for path, x in tensors.items()),
        tuple(id(x) for x in args if isinstance(x, nn.Module)),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")),
    )


@contextlib.contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """While entered, and if enabled, cuDNN may time its algorithms for each new shape of a convolution."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class CudnnBenchmarked:
    """Calls a compiled model while cuDNN may time its algorithms for each new shape of a convolution."""

    def __init__(self, compiled: CompiledOrEager) -> None:
        self._compiled = compiled

    @property
    def compile_seconds(self) -> float:
        """As of CompiledOrEager."""
        return self._compiled.compile_seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with cudnn_benchmark(True):
            return self._compiled(*args, **kwargs)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model says it is built of, by the names of their classes in `model._repeated_blocks`.

    Raises ValueError where it names none.
    """
    names: Sequence[str] = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f'compile must be True or False for {type(model).__name__}, which has no "repeated_blocks"')
    return blocks


class BlockwiseCompiled:
    """A model whose repeated blocks are compiled, one function for all of a class, and the rest is eager.

    The first call takes a fraction of the time that compiling a large model whole takes. The model given is not
    altered: its modules are copied as they are now, its weights are not. Raises ValueError where it names no repeated
    blocks.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        kinds: set[Any] = set(map(type, repeated_blocks(model)))
        self._original = model
        self._twin = _sharing_copy(model, {})
        self._compiled = {kind: CompiledOrEager(kind.forward, **options) for kind in kinds}
        for block in self._twin.modules():
            if type(block) in kinds:
                block.forward = functools.partial(self._compiled[type(block)], block)

    @property
    def compile_seconds(self) -> float:
        """As of CompiledOrEager, of all classes."""
        return sum(one.compile_seconds for one in self._compiled.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._twin.training != self._original.training:
            self._twin.train(self._original.training)
        return self._twin(*args, **kwargs)


def _sharing_copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The tree of modules anew, around the same dictionaries of parameters and buffers."""
    if id(module) not in made:
        twin = made[id(module)] = copy.copy(module)
        twin.__dict__["_modules"] = {
            name: None if child is None else _sharing_copy(child, made) for name, child in module._modules.items()
        }
        # the shallow copy of a module has dictionaries of its own; a weight that is replaced must be seen here too
        for name in ("_parameters", "_buffers"):
            twin.__dict__[name] = module.__dict__[name]
    return made[id(module)]


class CompiledByDevice:
    """Calls a model compiled for inference, once for each kind of device that its first tensor lies on.

    A model may move between two calls, and a plain function does not say where it runs.
    """

    def __init__(self, model: Callable[..., Any], choice: bool | str) -> None:
        self._model, self._choice = model, choice
        self._compiled: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def compile_seconds(self) -> float:
        """As of CompiledOrEager, on all devices."""
        return sum(one.compile_seconds for one in self._compiled.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        kind = next((tensor.device.type for tensor in tensors), "cpu")
        if kind not in self._compiled:
            with self._lock:
                if kind not in self._compiled:
                    self._compiled[kind] = _compiled_for(kind, self._model, self._choice)
        return self._compiled[kind](*args, **kwargs)


def compiled(model: Callable[..., Any], choice: bool | str) -> CompiledByDevice:
    """`model` compiled for inference as one of COMPILE_CHOICES but False says.

    "max-autotune": with Inductor's and cuDNN's timing of candidates. "repeated_blocks": block by block. The first call
    on a CPU makes the process keep its freed memory (`keep_host_memory`). Raises ValueError where the model has no
    blocks that repeat.
    """
    if choice == "repeated_blocks":
        if not isinstance(model, nn.Module):
            raise ValueError(f'compile="repeated_blocks" needs an nn.Module, got {type(model).__name__}')
        repeated_blocks(model)
    return CompiledByDevice(model, choice)


def _compiled_for(kind: str, model: Callable[..., Any], choice: bool | str) -> Any:
    if kind == "cpu":
        keep_host_memory()
    if choice == "repeated_blocks":
        assert isinstance(model, nn.Module)
        return BlockwiseCompiled(model, **compile_options(kind))
    if choice == "max-autotune":
        whole = CompiledOrEager(model, **compile_options(kind, mode="max-autotune"))
        return CudnnBenchmarked(whole) if kind == "cuda" else whole
    return CompiledOrEager(model, **compile_options(kind))
