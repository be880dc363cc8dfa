"""Rows of the section "unet": one evaluation of the network, which is nearly all of a step."""

from __future__ import annotations

import torch

from benchmarks.contenders import contenders
from benchmarks.model_row import model_row
from benchmarks.suite import Row
from benchmarks.workloads import Workload

# what the sampling rows do not say already: the network in both precisions, and who is to be beaten
COMPARED = ("fastdiff", "textbook-fp32", "textbook-bf16", "diffusers-reduce-overhead")
WORKLOADS = (
    *(Workload(model="cifar10", batch=batch) for batch in (1, 256, 16)),
    *(Workload(model="unet64", batch=batch) for batch in (1, 64)),
    *(Workload(model="unet64", batch=16, resolution=resolution) for resolution in (32, 128)),
)


def rows(device: torch.device, *, quick: bool) -> list[Row]:
    """In the order of priority."""
    if quick or device.type != "cuda":
        workload = Workload(model="tiny", batch=2) if quick else Workload(model="small", batch=8)
        return [model_row("unet", workload, contender, device) for contender in contenders(device)]
    compared = [contender for contender in contenders(device) if contender.name in COMPARED]
    return [model_row("unet", workload, contender, device) for workload in WORKLOADS for contender in compared]
