"""Latent diffusion with guidance: diffusers' UNet2DConditionModel with random weights in the loop of a pipeline.

A pipeline without a text encoder and a decoder, which are the same for everyone: embeddings go in, latents come out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from benchmarks.model_row import ends
from benchmarks.workloads import NOISE_SEED, WEIGHTS_SEED

GUIDANCE_SCALE = 7.5
# Stable Diffusion's process
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True, kw_only=True)
class LatentModel:
    """options: of UNet2DConditionModel. tokens: length of the sequence that is attended to."""

    options: dict[str, Any]
    steps: int
    tokens: int
    description: str


LATENT_MODELS = {
    "sd15": LatentModel(
        options={
            "sample_size": 64,
            "cross_attention_dim": 768,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,
        },
        steps=50,
        tokens=77,
        description="U-Net of Stable Diffusion 1.5, 859.5 M random parameters, 64x64x4 latents, guidance 7.5",
    ),
    "sd-tiny": LatentModel(
        options={
            "sample_size": 8,
            "cross_attention_dim": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
        steps=4,
        tokens=5,
        description="the same layers, small enough for a test",
    ),
}


class LatentPipeline(DiffusionPipeline):
    """StableDiffusionPipeline's loop between the text encoder and the decoder, without its progress bar.

    The scheduler's step gets its timestep as an integer, so that the host does not wait for the device's.
    """

    unet: Any
    scheduler: Any

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents: Tensor, embeddings: Tensor, steps: int) -> Tensor:
        """Latents [B, 4, H, W] from unit normals; embeddings [2B, tokens, D], those without a prompt first."""
        self.scheduler.set_timesteps(steps, device=latents.device)
        host = self.scheduler.timesteps.tolist()
        x = latents * self.scheduler.init_noise_sigma
        for t, t_device in zip(host, self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([x, x]), t)
            output = self.unet(model_input, t_device, encoder_hidden_states=embeddings, return_dict=False)[0]
            unconditional, conditional = output.chunk(2)
            guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
            x = self.scheduler.step(guided, t, x, return_dict=False)[0]
        return x


@dataclass(frozen=True, kw_only=True)
class LatentTask:
    """A model of LATENT_MODELS, a batch and a device. only_ends: of the batch, the first and the last sample alone."""

    model: str
    batch: int
    device: torch.device
    only_ends: bool = False

    @property
    def spec(self) -> LatentModel:
        """Options and sizes."""
        return LATENT_MODELS[self.model]

    def unet(self, dtype: torch.dtype) -> Any:
        """With weights that are the same at every call, made on the device."""
        # a notice of casting at each model
        diffusers.utils.logging.set_verbosity_error()
        with random_numbers(WEIGHTS_SEED, self.device), self.device:
            model: Any = UNet2DConditionModel(**self.spec.options)
        return model.to(dtype=dtype).eval()

    def pipeline(self, dtype: torch.dtype) -> LatentPipeline:
        """Diffusers' own, as it comes."""
        return LatentPipeline(self.unet(dtype), DDIMScheduler(**SCHEDULER))

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Latents [B, 4, H, W] and embeddings [2B, tokens, D]."""
        options, generator = self.spec.options, torch.Generator().manual_seed(NOISE_SEED)
        size, width = options["sample_size"], options["cross_attention_dim"]
        embeddings = torch.randn(2, self.batch, self.spec.tokens, width, generator=generator)
        latents = torch.randn(self.batch, 4, size, size, generator=generator)
        if self.only_ends:
            latents, embeddings = ends(latents), torch.stack([ends(half) for half in embeddings])
        return latents.to(self.device, dtype), embeddings.flatten(0, 1).to(self.device, dtype)


@contextmanager
def random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators begin at `seed` and are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
