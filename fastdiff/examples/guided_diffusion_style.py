"""Code of guided-diffusion with another import: the digits 0 to 9 by 25 steps of DDIM, into a picture."""

import sys

import torch
from torch import Tensor

from fastdiff import load_model
from fastdiff.compat.guided_diffusion import gaussian_diffusion as gd
from fastdiff.compat.guided_diffusion.respace import SpacedDiffusion, space_timesteps
from fastdiff.generate import packaged_model
from fastdiff.images import image_grid, save_png, to_uint8

loaded = load_model(packaged_model())
alpha, sigma = (torch.tensor(table).float() for table in (loaded.schedule.alpha, loaded.schedule.sigma))


def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """x_0 of the packaged model, which predicts v = alpha * eps - sigma * x_0."""
    v = loaded.model(x, t, class_labels=y)
    return alpha[t].view(-1, 1, 1, 1) * x - sigma[t].view(-1, 1, 1, 1) * v


diffusion = SpacedDiffusion(
    use_timesteps=space_timesteps(1000, "ddim25"),
    betas=gd.get_named_beta_schedule("cosine", 1000),
    model_mean_type=gd.ModelMeanType.START_X,
    model_var_type=gd.ModelVarType.FIXED_SMALL,
    loss_type=gd.LossType.MSE,
)
torch.manual_seed(0)
images = diffusion.ddim_sample_loop(model, (10, 1, 8, 8), model_kwargs={"y": torch.arange(10)}, device="cpu")
path = sys.argv[1] if len(sys.argv) > 1 else "digits.png"
save_png(image_grid(to_uint8(images), columns=10), path, scale=8)
print(f"wrote {path}")
