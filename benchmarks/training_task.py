"""What a training step works on: the images, the options, and what a step draws of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.workloads import NOISE_SEED, NUM_TRAIN_TIMESTEPS, Workload, random_weights, schedule
from fastdiff import noise as noise_contract
from fastdiff.data import BatchOrder
from fastdiff.loss import DiffusionLoss
from fastdiff.train_config import TrainConfig
from fastdiff.unet_config import UNetConfig

BATCHES_HELD = 8


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A workload on a device. weights: float32, on the CPU. images: uint8 [N, C, H, W], on the device."""

    workload: Workload
    device: torch.device
    weights: dict[str, Tensor]
    images: Tensor

    @classmethod
    def of(cls, workload: Workload, device: torch.device) -> TrainingTask:
        """Random weights, and random images for a few batches."""
        generator = torch.Generator().manual_seed(NOISE_SEED)
        shape = (BATCHES_HELD * workload.batch, *workload.shape[1:])
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        weights = random_weights(workload.config)
        return cls(workload=workload, device=device, weights=weights, images=images.to(device))

    @property
    def config(self) -> UNetConfig:
        """The workload's U-Net without dropout, which every contender would draw differently."""
        return replace(self.workload.config, dropout=0.0)

    @property
    def options(self) -> TrainConfig:
        """Of the step, for every contender."""
        return TrainConfig(
            batch_size=self.workload.batch,
            learning_rate=2e-4,
            lr_schedule="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            ema_decay=0.9999,
            prediction_type="epsilon",
            schedule="linear",
            label_dropout=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """images: uint8 [B, C, H, W]; timesteps: int64 [B]; noise: float32 [B, C, H, W]."""

    images: Tensor
    timesteps: Tensor
    noise: Tensor


class ContractDraws:
    """What the engine's step number `step` draws, for others to draw the same: for the check, not for the clock."""

    def __init__(self, task: TrainingTask) -> None:
        self._task = task
        self._order = BatchOrder(task.options.seed, len(task.images), task.workload.batch, device=task.device)
        self._objective = DiffusionLoss(schedule=schedule(), seed=task.options.seed, device=task.device)

    def __call__(self, step: int) -> Draw:
        indices, epochs = self._order.batch(step)
        eps = noise_contract.normal(
            self._task.workload.shape,
            seed=self._task.options.seed,
            sample_indices=indices,
            stream="train",
            draw=epochs,
        )
        images, timesteps = self._task.images[indices], self._objective.timesteps(indices, epochs)
        return Draw(images=images, timesteps=timesteps, noise=eps)


class TorchDraws:
    """The same kinds of values from torch's generator of the device."""

    def __init__(self, task: TrainingTask) -> None:
        self._task = task

    def __call__(self, step: int) -> Draw:
        images, device = self._task.images, self._task.device
        batch = self._task.workload.batch
        indices = torch.randint(len(images), (batch,), device=device)
        return Draw(
            images=images[indices],
            timesteps=torch.randint(NUM_TRAIN_TIMESTEPS, (batch,), device=device),
            noise=torch.randn(self._task.workload.shape, device=device),
        )
