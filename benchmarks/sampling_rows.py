"""Rows of the section "sampling": whole walks, by all contenders where there is a goal, by a few along an axis."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks import ablation
from benchmarks.contenders import Contender, contenders
from benchmarks.latent_rows import latent_rows
from benchmarks.model_row import model_row
from benchmarks.suite import Row
from benchmarks.workloads import Workload

# both sides of the goals
GOAL_SIDES = ("fastdiff", "textbook-fp32", "diffusers-reduce-overhead", "diffusers-best")
# who is followed along an axis
SCALING = GOAL_SIDES[:3]
SCALING_WORKLOADS = (
    *(Workload(model="cifar10", batch=batch) for batch in (16, 64)),
    *(Workload(model="cifar10", batch=1, steps=steps) for steps in (10, 100)),
    *(Workload(model="cifar10", batch=16, resolution=resolution) for resolution in (64, 128)),
)


def rows(device: torch.device, *, quick: bool) -> list[Row]:
    """In the order of priority."""
    everyone = [*contenders(device), *ablation.contenders(device)]
    # what compiles for minutes stays behind
    everyone.sort(key=lambda contender: contender.compiling > 1)
    if quick or device.type != "cuda":
        workload = Workload(model="tiny", batch=2) if quick else Workload(model="small", batch=8)
        made = _rows([workload], everyone, device)
        return made + latent_rows("sd-tiny", 2, device) if device.type == "cuda" else made
    sides = [contender for contender in everyone if contender.name in GOAL_SIDES]
    followed = [contender for contender in everyone if contender.name in SCALING]
    cifar10, unet64 = (Workload(model=model, batch=1) for model in ("cifar10", "unet64"))
    return [
        *_rows([cifar10, cifar10.with_batch(256)], everyone, device),
        *latent_rows("sd15", 1, device),
        *latent_rows("sd15", 8, device),
        *_rows([unet64, unet64.with_batch(64)], sides, device),
        *_rows(SCALING_WORKLOADS, followed, device),
    ]


def _rows(workloads: Iterable[Workload], contenders: list[Contender], device: torch.device) -> list[Row]:
    return [model_row("sampling", workload, contender, device) for workload in workloads for contender in contenders]
