"""An exponential moving average of a model's weights: what sampling uses."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fastdiff.shards import local

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """`ema.model` is a copy of the model whose parameters follow the trained ones slowly.

    The decay after n updates is min(decay, (1 + n) / (10 + n)): without that warm-up (TensorFlow's
    ExponentialMovingAverage, `num_updates`) the random initial weights would dominate the first 1 / (1 - decay) steps.
    """

    def __init__(self, model: Model, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def weight(self, updates: int) -> float:
        """The share of the model in the average that follows after `updates` updates: 1 - decay."""
        return 1 - min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, model: Model, weight: Tensor) -> None:
        """Move towards `model` by `weight`, a float32 scalar on its device; buffers are copied.

        Of a model in shards, as the average must be too, each process moves its own.
        """
        averages = [local(value) for value in self.model.parameters()]
        current = [local(value) for value in model.parameters()]
        (descend_ if weight.is_cuda else lerp_)(averages, current, weight)
        for average, buffer in zip(self.model.buffers(), model.buffers()):
            average.copy_(buffer)


def lerp_(averages: list[Tensor], current: list[Tensor], weight: Tensor) -> None:
    """averages += weight * (current - averages), in place."""
    torch._foreach_lerp_(averages, current, [weight] * len(averages))


def descend_(averages: list[Tensor], current: list[Tensor], weight: Tensor) -> None:
    """The same to a rounding, a few launches and one pass over memory on a GPU.

    There lerp takes a weight on the device for one tensor at a time only. A step of gradient descent on
    |averages|^2 / 2 - averages * current with `weight` as its rate is the same, and that one is fused.
    """
    sgd(
        averages,
        current,  # maximised: their sign is turned
        [None] * len(averages),
        fused=True,
        foreach=False,
        has_sparse_grad=False,
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,  # type: ignore[arg-type]  # only torch 2.15 says that it may be a tensor
        dampening=0.0,
        nesterov=False,
        maximize=True,
    )
