"""Rows of the section "sampling": whole walks, by all contenders where there is a goal, by a few along an axis."""

from __future__ import annotations

import torch

from benchmarks import ablation
from benchmarks.contenders import contenders
from benchmarks.latent_rows import latent_rows
from benchmarks.model_row import model_row
from benchmarks.suite import Row
from benchmarks.workloads import Workload

# who is followed along an axis
SCALING = ("fastdiff", "textbook-fp32", "diffusers-reduce-overhead")
SCALING_WORKLOADS = (
    *(Workload(model="cifar10", batch=batch) for batch in (4, 16, 64)),
    *(Workload(model="cifar10", batch=1, steps=steps) for steps in (10, 100, 250)),
    *(Workload(model="cifar10", batch=16, resolution=resolution) for resolution in (64, 128)),
)


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Those that every contender runs."""
    if quick:
        return [Workload(model="tiny", batch=2)]
    if device.type != "cuda":
        return [Workload(model="small", batch=8)]
    cifar10, unet64 = (Workload(model=model, batch=1) for model in ("cifar10", "unet64"))
    return [cifar10, cifar10.with_batch(256), unet64, unet64.with_batch(64)]


def rows(device: torch.device, *, quick: bool) -> list[Row]:
    """In the order of priority."""
    everyone = [*contenders(device), *ablation.contenders(device)]
    full = workloads(device, quick=quick)
    made = [model_row("sampling", workload, contender, device) for workload in full for contender in everyone]
    if device.type != "cuda":
        return made
    if quick:
        return made + latent_rows("sd-tiny", 2, device)
    made += [row for batch in (1, 8) for row in latent_rows("sd15", batch, device)]
    followed = [contender for contender in everyone if contender.name in SCALING]
    return made + [
        model_row("sampling", workload, contender, device) for workload in SCALING_WORKLOADS for contender in followed
    ]
