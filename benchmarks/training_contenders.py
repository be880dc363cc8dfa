"""Who is compared in training: the textbook's step, diffusers' model compiled, and the engine's step.

A step is the same work for all: draw a batch of uint8 images that lie on the device, timesteps and noise; noise the
images, evaluate the U-Net, mean squared error, gradient, clipping, AdamW, moving average of the weights.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import require
from benchmarks.numerics import BFLOAT16, FLOAT32, TF32, Numerics
from benchmarks.training_task import ContractDraws, TorchDraws, TrainingTask
from benchmarks.workloads import schedule
from fastdiff.activation_memory import ActivationMemory
from fastdiff.data import Dataset
from fastdiff.ema import EMA
from fastdiff.loss import DiffusionLoss
from fastdiff.reference_unet import ReferenceUNet
from fastdiff.train_config import TrainConfig
from fastdiff.train_step import TrainStep
from fastdiff.unet import UNet

# steps that are compared before anything is timed: the second one depends on the first one's update
CHECKED_STEPS = 2


class Training(ABC):
    """A model being trained. `advance(step)` does step `step`; the first CHECKED_STEPS draw what the engine draws."""

    activation_bytes: int | None = None

    @abstractmethod
    def advance(self, step: int) -> None:
        """One optimizer step and the moving average after it."""

    @abstractmethod
    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The trained weights and their average, by the names of a UNet."""


class PlainTraining(Training):
    """The textbook's step around a network.

    model: as it was built; network: what is called, the same or its compiled form, under autocast to numerics.dtype
    where the weights are float32. fused: fused AdamW and a moving average of all weights at once, instead of the
    optimizer's default and a loop.
    """

    def __init__(
        self,
        task: TrainingTask,
        numerics: Numerics,
        model: nn.Module,
        network: Callable[..., Any],
        *,
        fused: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.task, self.numerics, self.options = task, numerics, task.options
        self.model, self.network, self.fused, self.memory_format = model, network, fused, memory_format
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = EMA(nn.Module(), self.options.ema_decay)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            fused=True if fused else None,
        )
        self.alphas_cumprod = torch.tensor(schedule().alphas_cumprod, device=task.device)
        self.contract, self.torch = ContractDraws(task), TorchDraws(task)
        # the hooks that see a CPU's activations would compile a compiled network anew
        self.measurable = task.device.type == "cuda" or network is model

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: that of the arithmetic, except under autocast."""
        return torch.float32 if self.numerics.dtype == torch.bfloat16 else self.numerics.dtype

    def advance(self, step: int) -> None:
        """Called with 0, 1, 2, ..."""
        draw = (self.contract if step < CHECKED_STEPS else self.torch)(step)
        bars = self.alphas_cumprod[draw.timesteps].to(self.dtype)[:, None, None, None]
        x_start, eps = draw.images.to(self.dtype) / 127.5 - 1, draw.noise.to(self.dtype)
        x_t = bars.sqrt() * x_start + (1 - bars).sqrt() * eps
        x_t = x_t.contiguous(memory_format=self.memory_format)
        if step < CHECKED_STEPS and self.measurable:
            with ActivationMemory(self.model, self.task.device) as memory:
                loss = self._loss(x_t, draw.timesteps, eps)
            self.activation_bytes = memory.bytes
        else:
            loss = self._loss(x_t, draw.timesteps, eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._move_average(self.decay.weight(step))

    def _loss(self, x_t: Tensor, timesteps: Tensor, eps: Tensor) -> Tensor:
        autocast = torch.autocast(self.task.device.type, torch.bfloat16, enabled=self.numerics.dtype == torch.bfloat16)
        with autocast:
            output = self.network(x_t, timesteps)
        output = output if isinstance(output, Tensor) else output[0]
        return F.mse_loss(output.to(self.dtype), eps)

    @torch.no_grad()
    def _move_average(self, weight: float) -> None:
        averages: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(self.model.parameters())
        if self.fused:
            torch._foreach_lerp_(averages, current, weight)
            return
        for average, parameter in zip(averages, current):
            average.mul_(1 - weight).add_(parameter, alpha=weight)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By the names of a UNet."""
        return named_as_ours(self.model), named_as_ours(self.average)


class EngineTraining(Training):
    """fastdiff.train_step."""

    def __init__(self, task: TrainingTask, numerics: Numerics, options: TrainConfig) -> None:
        model = UNet(task.config)
        model.load_state_dict(task.weights)
        dataset = Dataset(name="random", images=task.images)
        objective = DiffusionLoss(schedule=schedule(), seed=options.seed, dtype=numerics.dtype, device=task.device)
        self.step = TrainStep(model.to(task.device), objective, dataset, options)

    def advance(self, step: int) -> None:
        """Called with 0, 1, 2, ..."""
        self.step(step)
        self.activation_bytes = self.step.activation_bytes

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By the names of a UNet."""
        return dict(self.step.model.state_dict()), dict(self.step.ema.model.state_dict())


@dataclass(frozen=True, kw_only=True)
class Trainer(ABC):
    """One way to train. Attributes as of `benchmarks.contenders.Contender`."""

    name: str
    title: str
    numerics: Numerics
    compiling: float = 0.0

    @abstractmethod
    def begin(self, task: TrainingTask) -> Training:
        """A fresh model. Raises Skip where a package is missing."""


@dataclass(frozen=True, kw_only=True)
class TextbookTrainer(Trainer):
    """ReferenceUNet with AdamW as it comes and a moving average weight by weight."""

    def begin(self, task: TrainingTask) -> Training:
        """In float64, to be the reference, or in float32, autocast to bf16 or not."""
        model = ReferenceUNet(task.config)
        model.load_state_dict(task.weights)
        dtype = torch.float64 if self.numerics.dtype == torch.float64 else torch.float32
        model.to(task.device, dtype).train()
        return PlainTraining(task, self.numerics, model, model)


@dataclass(frozen=True, kw_only=True)
class DiffusersTrainer(Trainer):
    """UNet2DModel, channels-last, with fused AdamW; mode: of torch.compile; None: eager."""

    mode: str | None = None

    def begin(self, task: TrainingTask) -> Training:
        """Float32 weights, autocast where the arithmetic is bf16."""
        require("diffusers")
        import diffusers

        from fastdiff.compat.diffusers.unet import to_diffusers_unet

        diffusers.utils.logging.set_verbosity_error()
        ours = UNet(task.config)
        ours.load_state_dict(task.weights)
        layout = torch.channels_last
        model: Any = to_diffusers_unet(ours).to(task.device).to(memory_format=layout).train()
        network = model if self.mode is None else torch.compile(model, mode=self.mode, fullgraph=True)

        def call(x: Tensor, t: Tensor) -> Tensor:
            # the graphs of its mode may reuse the last step's memory
            torch.compiler.cudagraph_mark_step_begin()
            return network(x, t, return_dict=False)[0]

        return PlainTraining(
            task, self.numerics, model, model if self.mode is None else call, fused=True, memory_format=layout
        )


@dataclass(frozen=True, kw_only=True)
class EngineTrainer(Trainer):
    """The engine's step; graph: captured as one CUDA graph on a GPU."""

    graph: bool = True

    def begin(self, task: TrainingTask) -> Training:
        """Float32 weights, autocast where the arithmetic is bf16."""
        options = replace(task.options, compile=bool(self.compiling), cuda_graph="auto" if self.graph else False)
        return EngineTraining(task, self.numerics, options)


def named_as_ours(model: Any) -> dict[str, Tensor]:
    """The weights of a ReferenceUNet or a UNet2DModel by the names of a UNet."""
    if isinstance(model, ReferenceUNet):
        return dict(model.state_dict())
    from fastdiff.compat.diffusers.unet import load_diffusers_unet

    return dict(load_diffusers_unet(model).state_dict())


def trainers(device: torch.device) -> list[Trainer]:
    """All of them on this kind of device, in the order of priority."""
    if device.type != "cuda":
        return [
            EngineTrainer(name="fastdiff", title="fastdiff", numerics=FLOAT32, compiling=2),
            TextbookTrainer(name="textbook-fp32", title="textbook, eager", numerics=FLOAT32),
            DiffusersTrainer(name="diffusers", title="diffusers, eager, channels-last, fused AdamW", numerics=FLOAT32),
            DiffusersTrainer(
                name="diffusers-best",
                title="diffusers, compiled, channels-last, fused AdamW",
                numerics=FLOAT32,
                compiling=2,
                mode="default",
            ),
        ]
    peer = "diffusers, bf16, channels-last, fused AdamW, compiled"
    return [
        EngineTrainer(name="fastdiff", title="fastdiff, bf16", numerics=BFLOAT16, compiling=2),
        TextbookTrainer(name="textbook-fp32", title="textbook, eager fp32", numerics=FLOAT32),
        DiffusersTrainer(
            name="diffusers-default", title=f"{peer} (default)", numerics=BFLOAT16, compiling=2, mode="default"
        ),
        DiffusersTrainer(
            name="diffusers-reduce-overhead",
            title=f"{peer} (reduce-overhead), CUDA graphs",
            numerics=BFLOAT16,
            compiling=2,
            mode="reduce-overhead",
        ),
        TextbookTrainer(name="textbook-bf16", title="textbook, eager, autocast to bf16", numerics=BFLOAT16),
        TextbookTrainer(name="textbook-tf32", title="textbook, eager fp32 with TF32", numerics=TF32),
        EngineTrainer(name="ablation-fused-norm", title="fastdiff, eager", numerics=BFLOAT16, graph=False),
        EngineTrainer(
            name="ablation-compile", title="fastdiff, compiled, no graph", numerics=BFLOAT16, compiling=2, graph=False
        ),
    ]
