"""Code of k-diffusion with another import: the digits 0 to 9 by 20 steps of DPM-Solver++(2M), into a picture."""

import sys

import torch

import fastdiff.compat.k_diffusion as K
from fastdiff import load_model
from fastdiff.generate import packaged_model
from fastdiff.images import image_grid, save_png, to_uint8

loaded = load_model(packaged_model())
alphas_cumprod = torch.tensor(loaded.schedule.alphas_cumprod).float()
model = K.external.DiscreteVDDPMDenoiser(loaded.model, alphas_cumprod, quantize=True)

torch.manual_seed(0)
sigmas = K.sampling.get_sigmas_karras(20, sigma_min=float(model.sigma_min), sigma_max=80.0)
x = torch.randn(10, 1, 8, 8) * sigmas[0]
images = K.sampling.sample_dpmpp_2m(model, x, sigmas, extra_args={"class_labels": torch.arange(10)})
path = sys.argv[1] if len(sys.argv) > 1 else "digits.png"
save_png(image_grid(to_uint8(images), columns=10), path, scale=8)
print(f"wrote {path}")
