"""Rows of the section "unet": one evaluation of the network, which is nearly all of a step."""

from __future__ import annotations

import torch

from benchmarks.contenders import contenders
from benchmarks.model_row import model_row
from benchmarks.sampling_rows import SCALING, workloads
from benchmarks.suite import Row
from benchmarks.workloads import Workload

SCALING_WORKLOADS = (
    *(Workload(model="cifar10", batch=batch) for batch in (4, 16, 64)),
    *(Workload(model="unet64", batch=16, resolution=resolution) for resolution in (32, 128)),
)


def rows(device: torch.device, *, quick: bool) -> list[Row]:
    """In the order of priority."""
    everyone = contenders(device)
    full = workloads(device, quick=quick)
    made = [model_row("unet", workload, contender, device) for workload in full for contender in everyone]
    if quick or device.type != "cuda":
        return made
    followed = [contender for contender in everyone if contender.name in SCALING]
    return made + [
        model_row("unet", workload, contender, device) for workload in SCALING_WORKLOADS for contender in followed
    ]
