"""A diffusers pipeline made fast in one line, with the same image for the same seed; random weights stand for yours."""

from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from fastdiff.compat.diffusers import accelerate

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=16,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)
pipe: Any = DDIMPipeline(unet, DDIMScheduler())  # or DDIMPipeline.from_pretrained(...)
pipe.set_progress_bar_config(disable=True)


def draw() -> torch.Tensor:
    """Two images in [0, 1] of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, generator=generator, num_inference_steps=10, eta=0.5, output_type="np").images
    return torch.from_numpy(images)


before = draw()
accelerate(pipe)
levels = (255 * (draw() - before)).abs().max()
print(f"{type(pipe.scheduler).__name__}: largest difference {levels:.2g} of 255 levels")
