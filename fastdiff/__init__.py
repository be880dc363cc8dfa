"""fastdiff: every sampler is a table, and one fused kernel executes any row of it.

The names a program needs, imported when they are first used, so that `import fastdiff` does not import PyTorch:

    NoiseSchedule       the forward process and its spacings
    Sampler             the sampling loop for any model, solver and device
    StepTable, Row      what a solver is to the sampler
    UNet, UNetConfig    the channels-last U-Net
    DiffusionLoss       the training objective
    load_model          a checkpoint's model, schedule and prediction type
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastdiff.checkpoint import load_model
    from fastdiff.engine import Engine
    from fastdiff.engine_request import Request
    from fastdiff.loss import DiffusionLoss
    from fastdiff.sampler import Sampler
    from fastdiff.schedule import NoiseSchedule
    from fastdiff.table import Row, StepTable
    from fastdiff.unet import UNet
    from fastdiff.unet_config import UNetConfig

_HOMES = {
    "DiffusionLoss": "loss",
    "Engine": "engine",
    "NoiseSchedule": "schedule",
    "Request": "engine_request",
    "Row": "table",
    "Sampler": "sampler",
    "StepTable": "table",
    "UNet": "unet",
    "UNetConfig": "unet_config",
    "load_model": "checkpoint",
}

__all__ = [
    "DiffusionLoss",
    "Engine",
    "NoiseSchedule",
    "Request",
    "Row",
    "Sampler",
    "StepTable",
    "UNet",
    "UNetConfig",
    "__version__",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdiff.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
