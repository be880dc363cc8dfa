"""One training iteration as an object: batch, flips, noise, forward, backward, clipping, AdamW, moving average.

All that differs from step to step (which images, of which epochs, the learning rate, the weight of the average) lies in
tensors on the device that are written before the iteration starts. The iteration itself reads nothing of the host, so
on a GPU it is captured once, whole, and then replayed.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastdiff.activation_memory import ActivationMemory
from fastdiff.compilation import CompiledOrEager, compile_options, cudnn_benchmark
from fastdiff.cuda_graph import capture
from fastdiff.data import BatchOrder, Dataset, random_flip
from fastdiff.ema import EMA
from fastdiff.loss import DiffusionLoss
from fastdiff.train_config import TrainConfig
from fastdiff.train_setup import conditions
from fastdiff.unet import UNet

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
# The first call also allocates what libraries keep for good; the second one shows the activations alone.
MEASURED_CALLS = 2


class TrainStep:
    """Advances a model by one optimizer step a call, and its moving average with it.

    `model` is put into training mode and changed in place; `dataset` (uint8), model and objective are on one device.
    Of `config` the options of the step are used: batch_size, gradient_accumulation_steps, horizontal_flip, the learning
    rate and its schedule, weight_decay, max_grad_norm, ema_decay, seed, compile, cuda_graph, task.

    Attributes:
        ema: the moving average; `ema.model` is what to sample from.
        activation_bytes: what the forward pass of one piece of the batch keeps for its backward pass, the weights that
            autocast has cast included; None before the first step, and for a compiled model on a CPU.

    Raises ValueError for cuda_graph=True without a CUDA device.
    """

    def __init__(self, model: UNet, objective: DiffusionLoss, dataset: Dataset, config: TrainConfig) -> None:
        self.model, self.objective, self.dataset, self.config = model.train(), objective, dataset, config
        self.device = device = dataset.images.device
        if config.cuda_graph is True and device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device, got {device}")
        self._captures = device.type == "cuda" and config.cuda_graph is not False
        self._advance: Callable[[], None] | None = None
        self.activation_bytes: int | None = None
        self._measurable = device.type == "cuda" or not config.compile
        self._measured = 0
        self.ema = EMA(model, config.ema_decay)
        self._network = (
            CompiledOrEager(model, **compile_options(device, training=True)) if config.compile else self.model
        )
        self._condition = conditions(config)
        self._order = BatchOrder(config.seed, len(dataset), config.batch_size, device=device)
        self._indices, self._epochs = torch.zeros(2, config.batch_size, dtype=torch.int64, device=device)
        # The fused step reads a learning rate on a GPU as float32, one on the CPU as float64.
        rate_dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._learning_rate = torch.zeros((), dtype=rate_dtype, device=device)
        self._average_weight = torch.zeros((), device=device)
        self._losses = torch.zeros(config.batch_size, device=device)
        self._gradient_norm = torch.zeros((), device=device)
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self._learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        for parameter in model.parameters():
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Do step `step`, counted from 0, without waiting for the device.

        Returns the weighted loss of each sample, float32 [batch_size], and the norm of the gradient before clipping, a
        float32 scalar. Both are on the device, and the next call overwrites them.
        """
        indices, epochs = self._order.batch(step)
        self._indices.copy_(indices)
        self._epochs.copy_(epochs)
        self._learning_rate.fill_(learning_rate(self.config, step))
        self._average_weight.fill_(self.ema.weight(step))
        if self._advance is None:
            self._advance = self._captured() if self._captures else self._iterate
        if self.model.config.dropout:
            # nn.Dropout draws from torch's generator: reseeding it by the step keeps a resumed run exact. A replayed
            # graph takes the generator's seed as it is now, too.
            torch.manual_seed(self.config.seed + step)
        self._advance()
        return self._losses, self._gradient_norm

    def autocast(self) -> contextlib.AbstractContextManager:
        """What the network runs in."""
        dtype = self.objective.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _captured(self) -> Callable[[], None]:
        """What replays the iteration, or the iteration itself where it cannot be captured; one warning says why."""
        state = [*self.state().values(), *self.ema.model.state_dict().values()]
        before = [value.clone() for value in state]

        def reset() -> None:
            for value, old in zip(state, before):
                value.copy_(old)

        try:
            replay, _ = capture(self._iterate, reset, self.device, None)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            message = f"the training step cannot be captured in a CUDA graph, so it runs eagerly: {reason}"
            warnings.warn(message, stacklevel=3)
            torch.cuda.synchronize(self.device)  # the warm-up may still be running on its own stream
            self._optimizer.zero_grad(set_to_none=True)
            replay = self._iterate
        reset()  # from the warm-up
        return replay

    def _iterate(self) -> None:
        config = self.config
        pieces = config.gradient_accumulation_steps
        losses = []
        # One autocast around all pieces: it keeps the weights that it has cast.
        with cudnn_benchmark(config.compile), self.autocast():
            for indices, epochs in zip(self._indices.chunk(pieces), self._epochs.chunk(pieces)):
                losses.append(self._accumulate(indices, epochs))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self._average_weight)
        self._losses.copy_(torch.cat(losses))
        self._gradient_norm.copy_(norm)

    def _accumulate(self, indices: Tensor, epochs: Tensor) -> Tensor:
        """The losses of one piece of the batch; its gradients are added to those of the pieces before it."""
        config = self.config
        images, labels = self.dataset.batch(indices)
        if config.horizontal_flip:
            images = random_flip(images, seed=config.seed, sample_indices=indices, epochs=epochs)
        measuring = self._measurable and self._measured < MEASURED_CALLS
        with ActivationMemory(self.model, self.device) if measuring else contextlib.nullcontext() as memory:
            loss, prediction, gradient = self.objective(
                self._network,
                images,
                labels,
                indices,
                epochs,
                condition=self._condition(images),
                grad_scale=1 / config.batch_size,
            )
        if memory is not None:
            self.activation_bytes = memory.bytes
            self._measured += 1
        with torch.autocast(self.device.type, enabled=False):
            prediction.backward(gradient=gradient)
        return loss

    def state(self) -> dict[str, Tensor]:
        """The weights and the optimizer's state, by the names of a checkpoint."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self._optimizer.state[parameter]
            tensors |= {f"optimizer.{key}.{name}": state[key] for key in OPTIMIZER_STATE}
        return tensors

    @torch.no_grad()
    def load_state(self, averages: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take over averaged weights and what `state` gave, in place."""
        self.ema.model.load_state_dict(averages)
        self.model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
        for name, parameter in self.model.named_parameters():
            for key in OPTIMIZER_STATE:
                self._optimizer.state[parameter][key].copy_(tensors[f"optimizer.{key}.{name}"])


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
