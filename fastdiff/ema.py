"""An exponential moving average of a model's weights: what sampling uses."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

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

    @torch.no_grad()
    def update(self, model: Model, updates: int) -> None:
        """Move towards `model` after `updates` earlier updates; buffers are copied."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(decay)(list(self.model.parameters()), list(model.parameters()), updates)
        for average, current in zip(self.model.buffers(), model.buffers()):
            average.copy_(current)
