"""guided-diffusion's interface on the fused engine.

    from fastdiff.compat.guided_diffusion import gaussian_diffusion as gd
    from fastdiff.compat.guided_diffusion.respace import SpacedDiffusion, space_timesteps

in place of `guided_diffusion`. The modules `gaussian_diffusion`, `respace` and `losses` hold what they hold there;
everything is also here. Models, training scripts and schedule samplers are not part of it.
"""

from fastdiff.compat.guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from fastdiff.compat.guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from fastdiff.compat.guided_diffusion.respace import SpacedDiffusion, space_timesteps

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "normal_kl",
    "space_timesteps",
]
