"""What each lever gives: from the textbook to the engine, one step at a time, as rows of the same workload."""

from __future__ import annotations

import torch

from benchmarks.contenders import Contender, Engine
from benchmarks.numerics import BFLOAT16, FLOAT32

# lever -> contender that has it and all before it
CHAIN = {
    "fp32": "textbook-fp32",
    "bf16": "textbook-bf16",
    "channels-last": "ablation-channels-last",
    "fused norm": "ablation-fused-norm",
    "compile": "ablation-compile",
    "graph": "fastdiff",
}
# no bf16 there, no kernel of the norm but Inductor's, and no graphs
CPU_CHAIN = {"fp32": "textbook-fp32", "channels-last": "ablation-channels-last", "compile": "fastdiff"}


def contenders(device: torch.device) -> list[Contender]:
    """Those of the chain that are no contenders of their own, and two other ways to compile the engine."""
    if device.type != "cuda":
        return [Engine(name="ablation-channels-last", title="the engine's U-Net and step, eager", numerics=FLOAT32)]
    return [
        Engine(
            name="ablation-channels-last",
            title="the engine's U-Net and step, eager, channels-last, PyTorch's norm",
            numerics=BFLOAT16,
            graph=False,
            fused_norm=False,
        ),
        Engine(name="ablation-fused-norm", title="… with the fused norm", numerics=BFLOAT16, graph=False),
        Engine(name="ablation-compile", title="… compiled", numerics=BFLOAT16, graph=False, compiling=1),
        Engine(
            name="ablation-inductor-norm",
            title="fastdiff with the norm that Inductor fuses",
            numerics=BFLOAT16,
            compiling=1,
            fused_norm=False,
        ),
        Engine(
            name="ablation-max-autotune",
            title="fastdiff with compile='max-autotune'",
            numerics=BFLOAT16,
            compiling=2,
            mode="max-autotune",
        ),
    ]
