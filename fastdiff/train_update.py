"""What a gradient does to a model: clipping, AdamW, and the moving average that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastdiff.ema import EMA
from fastdiff.shards import assign, whole
from fastdiff.train_config import TrainConfig
from fastdiff.unet import UNet

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class Update:
    """Moves a model by the gradients that its weights hold, and its moving average with it.

    From the first gradient on that is not finite, nothing moves any more: weights, optimizer state and average stay as
    they were before. The host learns of it from the norms when it reads them.

    Of `config` the learning rate and its schedule, weight_decay and max_grad_norm are used. All that differs from call
    to call lies in tensors on the device.
    """

    def __init__(self, model: UNet, ema: EMA[UNet], config: TrainConfig) -> None:
        self.model, self.ema, self.config = model, ema, config
        device = model.conv_in.weight.device
        # The fused step reads a learning rate on a GPU as float32, one on the CPU as float64.
        rate_dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._learning_rate = torch.zeros((), dtype=rate_dtype, device=device)
        self._average_weight = torch.zeros((), device=device)
        # 1, and 0 from the first gradient on that is not finite
        self._going = torch.ones((), device=device)
        self._stopped = torch.zeros((), device=device)
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self._learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        # what torch.amp tells a fused optimizer: where it is 1, leave everything as it is
        self._optimizer.found_inf = self._stopped  # type: ignore[attr-defined]
        for parameter in model.parameters():
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def prepare(self, step: int) -> None:
        """Write down what the next call needs to know of step `step`, counted from 0."""
        self._learning_rate.fill_(learning_rate(self.config, step))
        self._average_weight.fill_(self.ema.weight(step))

    def __call__(self) -> Tensor:
        """The norm of the gradient before clipping, a float32 scalar on the device. The gradients are gone then."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm or math.inf)
        norm = whole(norm)
        self._going.mul_(norm < math.inf)
        torch.logical_not(self._going, out=self._stopped)
        self._optimizer.step()
        self.drop_gradients()
        self.ema.update(self.model, self._average_weight * self._going)
        return norm

    def drop_gradients(self) -> None:
        """Free them."""
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The weights and the optimizer's state, by the names of a checkpoint; of a model in shards this one's."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self._optimizer.state[parameter]
            tensors |= {f"optimizer.{key}.{name}": state[key] for key in OPTIMIZER_STATE}
        return tensors

    def load_state(self, averages: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take over whole averaged weights and all that `state` names, in place."""
        for name, target in self.ema.model.state_dict().items():
            assign(target, averages[name])
        for name, target in self.state().items():
            assign(target, tensors[name])


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
