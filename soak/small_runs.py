"""Training runs of a small model that the trials interrupt, poison and compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from fastdiff import checkpoint
from fastdiff.train import TrainConfig, TrainResult, train
from fastdiff.train_log import TrainLog
from fastdiff.unet import UNet, UNetConfig
from soak.trial import require

SMALL = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    model_channels=16,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_num_groups=8,
    num_classes=10,
    dropout=0.2,
)
STEPS = 12


def options(output: Path, **changes: object) -> TrainConfig:
    """Batches of 12 of the digits on the CPU, which straddle the epochs; nothing but checkpoints is written."""
    defaults: dict[str, object] = {
        "output": str(output),
        "steps": STEPS,
        "batch_size": 12,
        "warmup_steps": 3,
        "log_every": 1,
        "checkpoint_every": STEPS,
        "sample_every": 0,
        "progress": False,
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **changes})  # type: ignore[arg-type]


def run(config: TrainConfig, on_step: Callable[[int, UNet], None] | None = None) -> TrainResult:
    """The run, without its loss curve, which takes longer to draw than all steps."""
    with mock.patch.object(TrainLog, "plot"):
        return train(config, model_config=None if config.resume else SMALL, on_step=on_step)


def losses_of(output: Path) -> dict[int, float]:
    """The loss of each step that a run has logged."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def require_equal(left: dict[str, Tensor], right: dict[str, Tensor], what: str) -> None:
    """The same names with the same bits."""
    require(left.keys() == right.keys(), f"{what} have other names")
    different = [name for name in left if not torch.equal(left[name], right[name])]
    require(not different, f"{what} differ in {len(different)} of {len(left)} tensors, {different[:1]} among them")


def require_same_checkpoint(left: Path, right: Path) -> None:
    """Averaged weights, weights, optimizer and step are the same bits."""
    averages, tensors, state = checkpoint.load_train_state(left)
    other_averages, other_tensors, other_state = checkpoint.load_train_state(right)
    require(state["step"] == other_state["step"], f"{left} is of step {state['step']}, {right} {other_state['step']}")
    require_equal(averages, other_averages, f"the averages of step {state['step']}")
    require_equal(tensors, other_tensors, f"weights and optimizer of step {state['step']}")
