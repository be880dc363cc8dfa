"""Inductor's code for a GPU that is not there: traced with fake tensors, told an H200's properties, never compiled.

torch has no way in for this, so its device queries are replaced while it traces and generates (torch 2.11 to 2.15).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

DEVICE = torch.device("cuda:0")
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=150_000_000_000,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=62_914_560,
    gcnArchName="",
)
# Whether a matrix product gains by padding would be timed; workers would compile what is generated; a graph that the
# cache of a machine with a GPU has would not be generated.
WITHOUT_A_GPU = {"shape_padding": False, "compile_threads": 1, "fx_graph_cache": False}
CUDA_QUERIES: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_properties": lambda device=None: H200,
    "get_device_capability": lambda device=None: (H200.major, H200.minor),
    "get_device_name": lambda device=None: H200.name,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "get_rng_state": lambda *args: torch.empty(16, dtype=torch.uint8),
    "set_rng_state": lambda *args: None,
    "synchronize": lambda device=None: None,
    "_lazy_init": lambda: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
}


T = TypeVar("T")


class _Stop(BaseException):
    """Ends Inductor after code generation; no Exception, which it would wrap."""


def generate(
    call: Callable[..., Any],
    arguments: Callable[[], tuple[Any, ...]],
    read: Callable[[GraphLowering, str], T],
    **options: Any,
) -> tuple[list[T], int]:
    """What `read` makes of each graph of `call(*arguments())`, and the number of graph breaks between them.

    arguments: makes the arguments when fake tensors can be made on DEVICE. read: gets a graph as Inductor scheduled it
    and the source of the module that would launch its kernels. options: Inductor's.
    """
    graphs: list[T] = []

    def stop(graph: GraphLowering) -> Any:
        graphs.append(read(graph, graph.codegen()[0].value))
        raise _Stop

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        # an H200 for Inductor only: Dynamo asks the driver for more where it believes in one
        with _h200(), mock.patch.object(GraphLowering, "compile_to_module", stop), contextlib.suppress(_Stop):
            compile_fx(graph, inputs, config_patches={**options, **WITHOUT_A_GPU})
        # what is behind a graph break is traced too
        return graph.forward

    torch.compiler.reset()
    counters.clear()
    with _tracing_of_cuda(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.compile(call, dynamic=False, backend=backend)(*arguments())
    return graphs, sum(counters["graph_break"].values())


def on_device(model: nn.Module) -> nn.Module:
    """The model with fake weights on DEVICE in place of its own: build it on the meta device."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    return model


class _Driver:
    """What Inductor asks Triton's driver."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": H200.shared_memory_per_block_optin}
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size)

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def _h200() -> Iterator[None]:
    interface = device_interface.CudaInterface
    with contextlib.ExitStack() as patches:
        for name, answer in CUDA_QUERIES.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer))
            # the interface holds the functions themselves
            if name in vars(interface) and name != "is_available":
                patches.enter_context(mock.patch.object(interface, name, staticmethod(answer)))
        patches.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [H200]}))
        patches.enter_context(mock.patch.dict(device_interface.caching_worker_current_devices, {"cuda": 0}))
        patches.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        patches.enter_context(mock.patch.object(driver, "_active", _Driver()))
        _forget_devices()
        patches.callback(_forget_devices)
        yield


def _forget_devices() -> None:
    for function in (*vars(_triton).values(), DeviceProperties.create):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextlib.contextmanager
def _tracing_of_cuda() -> Iterator[None]:
    """Traced as on a GPU: convolutions by cuDNN in the layout of their arguments, attention by the flash kernel."""
    folder = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def deduce_on_cpu(self: Any, node: torch.fx.Node) -> Any:
        # it computes with one-element tensors
        kwargs = node.kwargs
        if kwargs.get("device") == DEVICE:
            node.kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = kwargs

    with (
        mock.patch.object(torch._C, "_select_conv_backend", return_value=torch._C._ConvBackend.Cudnn),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _convolution_layout),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _flash_attention),
        mock.patch.object(folder, "_deduce_value", deduce_on_cpu),
    ):
        yield


def _convolution_layout(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    # by strides, so that a 1x1 weight can be of either format
    channels_last = torch.channels_last in map(suggest_memory_format, (x, weight))
    return torch.channels_last if channels_last else torch.contiguous_format


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or enable_gqa:
        raise ValueError("only attention without a mask and grouped heads is traced")
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
