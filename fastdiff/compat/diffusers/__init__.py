"""diffusers' interface on the fused engine: schedulers that subclass diffusers' own, and one call for a whole pipeline.

    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)

Each `Fast*Scheduler` keeps its original's configuration, timesteps and outputs, and takes a step in one fused pass.
Whole walks agree with the original's to 1e-5 relative in float32. Where a step magnifies rounding (two or three steps
in all, orders above 2 with many steps), both are further than that from float64, the fused one mostly less. A timestep
that is not listed is refused, as by the original, but among timesteps [B] it makes its sample NaN.

`accelerate` makes a pipeline fast and `restore` takes it back; `load_diffusers_unet` turns a UNet2DModel into a
`fastdiff.UNet`, `to_diffusers_unet` and `save_diffusers_unet` go the other way. Names are imported
when they are first used. diffusers' pipeline loader asks this module for `SchedulerMixin`.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("diffusers") is None:
    raise ImportError("fastdiff.compat.diffusers needs diffusers: pip install fastdiff[diffusers]")

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from fastdiff.compat.diffusers.ddim import FastDDIMInverseScheduler, FastDDIMScheduler
    from fastdiff.compat.diffusers.ddpm import FastDDPMScheduler
    from fastdiff.compat.diffusers.deis import FastDEISMultistepScheduler
    from fastdiff.compat.diffusers.dpm_multistep import (
        FastDPMSolverMultistepScheduler,
        FastEDMDPMSolverMultistepScheduler,
    )
    from fastdiff.compat.diffusers.dpm_singlestep import FastDPMSolverSinglestepScheduler
    from fastdiff.compat.diffusers.edm import FastEDMEulerScheduler
    from fastdiff.compat.diffusers.euler import FastEulerAncestralDiscreteScheduler, FastEulerDiscreteScheduler
    from fastdiff.compat.diffusers.flow_match import FastFlowMatchEulerDiscreteScheduler
    from fastdiff.compat.diffusers.heun import FastHeunDiscreteScheduler
    from fastdiff.compat.diffusers.kdpm2 import FastKDPM2AncestralDiscreteScheduler, FastKDPM2DiscreteScheduler
    from fastdiff.compat.diffusers.lcm import FastLCMScheduler
    from fastdiff.compat.diffusers.lms import FastLMSDiscreteScheduler
    from fastdiff.compat.diffusers.pipeline import accelerate, restore
    from fastdiff.compat.diffusers.pndm import FastPNDMScheduler
    from fastdiff.compat.diffusers.tcd import FastTCDScheduler
    from fastdiff.compat.diffusers.unet import load_diffusers_unet, save_diffusers_unet, to_diffusers_unet
    from fastdiff.compat.diffusers.unipc import FastUniPCMultistepScheduler

_HOMES = {
    "FastDDIMInverseScheduler": "fastdiff.compat.diffusers.ddim",
    "FastDDIMScheduler": "fastdiff.compat.diffusers.ddim",
    "FastDDPMScheduler": "fastdiff.compat.diffusers.ddpm",
    "FastDEISMultistepScheduler": "fastdiff.compat.diffusers.deis",
    "FastDPMSolverMultistepScheduler": "fastdiff.compat.diffusers.dpm_multistep",
    "FastDPMSolverSinglestepScheduler": "fastdiff.compat.diffusers.dpm_singlestep",
    "FastEDMDPMSolverMultistepScheduler": "fastdiff.compat.diffusers.dpm_multistep",
    "FastEDMEulerScheduler": "fastdiff.compat.diffusers.edm",
    "FastEulerAncestralDiscreteScheduler": "fastdiff.compat.diffusers.euler",
    "FastEulerDiscreteScheduler": "fastdiff.compat.diffusers.euler",
    "FastFlowMatchEulerDiscreteScheduler": "fastdiff.compat.diffusers.flow_match",
    "FastHeunDiscreteScheduler": "fastdiff.compat.diffusers.heun",
    "FastKDPM2AncestralDiscreteScheduler": "fastdiff.compat.diffusers.kdpm2",
    "FastKDPM2DiscreteScheduler": "fastdiff.compat.diffusers.kdpm2",
    "FastLCMScheduler": "fastdiff.compat.diffusers.lcm",
    "FastLMSDiscreteScheduler": "fastdiff.compat.diffusers.lms",
    "FastPNDMScheduler": "fastdiff.compat.diffusers.pndm",
    "FastTCDScheduler": "fastdiff.compat.diffusers.tcd",
    "FastUniPCMultistepScheduler": "fastdiff.compat.diffusers.unipc",
    "SchedulerMixin": "diffusers",
    "accelerate": "fastdiff.compat.diffusers.pipeline",
    "load_diffusers_unet": "fastdiff.compat.diffusers.unet",
    "restore": "fastdiff.compat.diffusers.pipeline",
    "save_diffusers_unet": "fastdiff.compat.diffusers.unet",
    "to_diffusers_unet": "fastdiff.compat.diffusers.unet",
}

__all__ = [
    "FastDDIMInverseScheduler",
    "FastDDIMScheduler",
    "FastDDPMScheduler",
    "FastDEISMultistepScheduler",
    "FastDPMSolverMultistepScheduler",
    "FastDPMSolverSinglestepScheduler",
    "FastEDMDPMSolverMultistepScheduler",
    "FastEDMEulerScheduler",
    "FastEulerAncestralDiscreteScheduler",
    "FastEulerDiscreteScheduler",
    "FastFlowMatchEulerDiscreteScheduler",
    "FastHeunDiscreteScheduler",
    "FastKDPM2AncestralDiscreteScheduler",
    "FastKDPM2DiscreteScheduler",
    "FastLCMScheduler",
    "FastLMSDiscreteScheduler",
    "FastPNDMScheduler",
    "FastTCDScheduler",
    "FastUniPCMultistepScheduler",
    "SchedulerMixin",
    "accelerate",
    "load_diffusers_unet",
    "restore",
    "save_diffusers_unet",
    "to_diffusers_unet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff.compat.diffusers' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
