"""How the processes of a training run share a network: alone, as replicas (DDP), or in shards (FSDP2).

Each process computes the gradient of its share of the batch; before the weights move, the gradients are averaged. With
`gradient_scale` in the loss their average is the gradient of the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastdiff.processes import Processes
from fastdiff.shards import whole
from fastdiff.unet import UNet


class Alone:
    """One process. `network`: what to call in training.

    dtype: what the network computes in; other than float32 by autocast, which keeps each weight that it has cast.
    """

    gradient_scale = 1.0

    def __init__(self, model: UNet, dtype: torch.dtype) -> None:
        self.model = model
        self.network: Callable[..., Tensor] = model
        self._device, self._dtype = model.conv_in.weight.device, dtype

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """What the network runs in."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def adding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a piece of the batch; the gradients are averaged in the `last` one."""
        return contextlib.nullcontext()


class Replicas(Alone):
    """A copy of the network in every process; DDP keeps them alike. A U-Net has no buffers."""

    network: DistributedDataParallel

    def __init__(self, model: UNet, dtype: torch.dtype, processes: Processes) -> None:
        super().__init__(model, dtype)
        self.gradient_scale = float(processes.size)
        self.network = DistributedDataParallel(
            model,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def adding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.network.no_sync()


class Shards(Alone):
    """Each process holds a part of every weight, and has the whole of a block's while it computes it (FSDP2).

    `averages`, a model like the other, is shared out as well, and can then not be called. In place of autocast, which
    would keep all weights whole in `dtype`, the parts are cast before they are put together. Gradients are averaged in
    float32.
    """

    def __init__(self, model: UNet, averages: UNet, dtype: torch.dtype, processes: Processes) -> None:
        super().__init__(model, dtype)
        self.gradient_scale = float(processes.size)
        mesh = init_device_mesh(self._device.type, (processes.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            # bfloat16 would round timesteps above 256
            cast_forward_inputs=False,
        )
        for each in (model, averages):
            # FSDP2 takes weights in no other layout
            each.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            # Not layer by layer: a block asks its layers for their modulation before it calls them.
            units: list[nn.Module] = [*each.down_blocks, *each.up_blocks, each]
            for unit in units:
                fully_shard(unit, mesh=mesh, mp_policy=policy)
        ends: list[Any] = [model.conv_in, model.conv_out]
        for conv in ends:
            _use_channels_last(conv)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def adding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]  # fully_shard gives it this method
        return contextlib.nullcontext()


def _use_channels_last(conv: nn.Conv2d) -> None:
    """Let a conv of few channels compute with a channels-last copy of its weight.

    The layout of such a weight decides that of the output, and how PyTorch sums its gradient. For convs of many
    channels the layout of x decides, and a copy of the weight would be kept for the backward pass.
    """
    forward = conv._conv_forward

    def channels_last_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return forward(x, weight.clone(memory_format=torch.channels_last), bias)

    conv._conv_forward = channels_last_forward  # type: ignore[method-assign, assignment]


def share(model: UNet, averages: UNet, dtype: torch.dtype, processes: Processes, *, fsdp: bool) -> Alone:
    """The way that fits the number of processes; with fsdp `model` and `averages` are changed in place."""
    if processes.size == 1:
        return Alone(model, dtype)
    return Shards(model, averages, dtype, processes) if fsdp else Replicas(model, dtype, processes)


@torch.no_grad()
def gathered(model: UNet, *, keep: bool) -> UNet | None:
    """`model`, or of one in shards a whole copy in eval mode, None unless `keep`; all processes must ask at once."""
    parts = model.state_dict()
    if not any(isinstance(value, DTensor) for value in parts.values()):
        return model
    with torch.device("meta"):
        copy = UNet(model.config)
    copy = copy.to_empty(device=model.conv_in.weight.device).eval().requires_grad_(False) if keep else copy
    for name, target in copy.state_dict().items():
        value = whole(parts[name])
        if keep:
            target.copy_(value)
    return copy if keep else None
