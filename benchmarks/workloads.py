"""What is measured: named U-Nets with random weights, the batches they draw, and the walk that every contender takes.

The walk is DDIM with eta 0 (Song et al. 2021) on the linear schedule of Ho et al. 2020 with trailing timesteps: the
reference loop, diffusers' DDIMScheduler and the engine all compute it, step for step. x_0 is not clipped: random
weights denoise nothing, so a clipped walk would be chaotic, and no rounding comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.reference_unet import ReferenceUNet
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet_config import PRESETS, UNetConfig

NUM_TRAIN_TIMESTEPS = 1000
WEIGHTS_SEED, NOISE_SEED = 0, 1
# brings the output of the random network to the variance of the noise that it stands for
OUTPUT_GAIN = 3.0
# how far the norms' weights and biases are from one and zero
NORM_SPREAD = 0.1


@dataclass(frozen=True, kw_only=True)
class Model:
    """A U-Net to measure.

    Attributes:
        steps: of a walk, unless a workload says another number; it divides 1000.
        gflops: billions of floating-point operations of one evaluation of one image.
    """

    config: UNetConfig
    steps: int
    gflops: float
    description: str


MODELS = {
    "cifar10": Model(
        config=PRESETS["cifar10"],
        steps=50,
        gflops=12.4,
        description="DDPM CIFAR-10 U-Net, 35.7 M parameters, 32x32",
    ),
    "unet64": Model(
        config=UNetConfig(
            sample_size=64,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(16, 8),
            num_head_channels=64,
        ),
        steps=50,
        gflops=79.4,
        description="64x64 U-Net, 115.9 M parameters, channels 128-256-384-512",
    ),
    "small": Model(
        config=UNetConfig(
            sample_size=32, model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(8,)
        ),
        steps=20,
        gflops=2.0,
        description="small U-Net, 4.4 M parameters, 32x32, channels 64-128-128",
    ),
    "tiny": Model(
        config=UNetConfig(
            sample_size=16,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(8,),
            norm_num_groups=8,
        ),
        steps=5,
        gflops=0.13,
        description="tiny U-Net, 0.7 M parameters, 16x16: a look that takes seconds",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of one model.

    Attributes:
        model: a key of MODELS.
        batch: images at a time.
        steps: of a walk; None: the model's number.
        resolution: height and width; None: the model's sample_size.
    """

    model: str
    batch: int
    steps: int | None = None
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if NUM_TRAIN_TIMESTEPS % self.num_steps:
            # there DDIMScheduler's step to the next timestep is not the distance to the next one of its list
            raise ValueError(f"steps must divide {NUM_TRAIN_TIMESTEPS}, got {self.steps}")

    @property
    def name(self) -> str:
        """The model, the batch and whatever is not the model's own: "cifar10-b256", "cifar10-b16-s100"."""
        name = f"{self.model}-b{self.batch}"
        if self.steps is not None:
            name += f"-s{self.steps}"
        return name if self.resolution is None else f"{name}-r{self.resolution}"

    @property
    def config(self) -> UNetConfig:
        """The U-Net's configuration."""
        return MODELS[self.model].config

    @property
    def num_steps(self) -> int:
        """Rows of the walk."""
        return self.steps or MODELS[self.model].steps

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, C, H, W] of the samples."""
        size = self.resolution or self.config.sample_size
        return self.batch, self.config.in_channels, size, size

    def with_batch(self, batch: int) -> Workload:
        """The same with another batch."""
        return replace(self, batch=batch)


def random_weights(config: UNetConfig) -> dict[str, Tensor]:
    """Float32 weights on the CPU, the same for every contender.

    None is zero, also where training starts at zero: otherwise whole branches would drop out of the comparison.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(WEIGHTS_SEED)
        model = ReferenceUNet(config)
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.add_(NORM_SPREAD * torch.randn_like(module.weight))
                module.bias.add_(NORM_SPREAD * torch.randn_like(module.bias))
        model.conv_out.weight.mul_(OUTPUT_GAIN)
    return model.state_dict()


def initial_noise(workload: Workload, device: torch.device) -> Tensor:
    """Float32 unit normals of the workload's shape; a smaller batch gets the first ones of a larger batch."""
    generators = (torch.Generator().manual_seed(NOISE_SEED + index) for index in range(workload.batch))
    return torch.stack([torch.randn(workload.shape[1:], generator=one) for one in generators]).to(device)


def schedule() -> NoiseSchedule:
    """The process of every workload."""
    return NoiseSchedule.linear(NUM_TRAIN_TIMESTEPS)


def timesteps(steps: int) -> list[int]:
    """Trailing timesteps from 999 down (Lin et al. 2024, table 2)."""
    return list(range(NUM_TRAIN_TIMESTEPS - 1, -1, -NUM_TRAIN_TIMESTEPS // steps))


def reference_walk(model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """The textbook's walk from `noise` [B, C, H, W], in its dtype, with a model called as model(x, t) with t [B]."""
    walk = timesteps(steps)
    bars = schedule().alphas_cumprod

    def call(x: Tensor, t: float) -> Tensor:
        return model(x, torch.full((len(x),), int(t), device=x.device))

    return reference.ddim(call, noise, timesteps=walk, alphas_cumprod=[float(bars[t]) for t in walk])
