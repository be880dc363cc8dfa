"""Who is compared in latent diffusion: diffusers' pipeline, eager and at its best, and the same one accelerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.numerics import BFLOAT16_STATE, FLOAT32, Numerics

if TYPE_CHECKING:
    # imports diffusers, which may be missing where the rows are only listed
    from benchmarks.latent_pipeline import LatentTask


@dataclass(frozen=True, kw_only=True)
class LatentContender:
    """One way to run the pipeline; attributes as of `benchmarks.contenders.Contender`.

    mode: of torch.compile, fullgraph, for diffusers; None: eager. accelerated: by `fastdiff.compat.diffusers`.
    """

    name: str
    title: str
    numerics: Numerics
    compiling: float = 0.0
    mode: str | None = None
    accelerated: bool = False

    def walk(self, task: LatentTask) -> Callable[[int], Tensor]:
        """Samples once, called with the number of steps."""
        from fastdiff.compat.diffusers import accelerate

        pipe = task.pipeline(self.numerics.dtype)
        if self.accelerated:
            accelerate(pipe, compile=bool(self.compiling), cuda_graph=task.device.type == "cuda")
        elif self.mode is not None:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.unet.fuse_qkv_projections()
            pipe.unet = torch.compile(pipe.unet, mode=self.mode, fullgraph=True)
        latents, embeddings = task.inputs(self.numerics.state_dtype)
        if self.mode is not None or self.accelerated:
            latents = latents.contiguous(memory_format=torch.channels_last)
        return lambda steps: pipe(latents, embeddings, steps)


def latent_contenders(device: torch.device) -> list[LatentContender]:
    """All of them on this kind of device, in the order of priority."""
    if device.type != "cuda":
        return [
            LatentContender(name="fastdiff", title="accelerate", numerics=FLOAT32, accelerated=True, compiling=1),
            LatentContender(name="diffusers", title="diffusers, eager", numerics=FLOAT32),
        ]
    peer = "diffusers, bf16, channels-last, fused projections, compiled"
    return [
        LatentContender(
            name="fastdiff",
            title="accelerate, bf16, compiled, CUDA graph",
            numerics=BFLOAT16_STATE,
            accelerated=True,
            compiling=1,
        ),
        LatentContender(
            name="diffusers-reduce-overhead",
            title=f"{peer} (reduce-overhead), CUDA graphs",
            numerics=BFLOAT16_STATE,
            compiling=1,
            mode="reduce-overhead",
        ),
        LatentContender(name="diffusers-bf16", title="diffusers, eager bf16", numerics=BFLOAT16_STATE),
        LatentContender(name="textbook-fp32", title="diffusers, eager fp32", numerics=FLOAT32),
        LatentContender(
            name="diffusers-best",
            title=f"{peer} (max-autotune), CUDA graphs",
            numerics=BFLOAT16_STATE,
            compiling=3,
            mode="max-autotune",
        ),
    ]
