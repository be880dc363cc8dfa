"""What Inductor would launch on an H200 for one call of a U-Net: python -m benchmarks.inductor_census

Needs no GPU: the code is generated for one, counted, and thrown away. Bytes count each tensor once per kernel that
reads or writes it, so a kernel that reads its input twice moves more. They are no times.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode

from benchmarks.absent_gpu import DEVICE, generate, on_device
from benchmarks.latent_pipeline import LATENT_MODELS
from fastdiff.compat.diffusers.fused_modules import fuse_norms
from fastdiff.compat.diffusers.pipeline import set_layout
from fastdiff.compat.diffusers.unet_config import diffusers_config
from fastdiff.compilation import compile_options
from fastdiff.environment import environment
from fastdiff.kernels import group_norm
from fastdiff.unet import PRESETS, UNet

KINDS = ("generated", "convolution", "matmul", "attention", "fastdiff", "other")
# operations of a kernel that changes no value
MOVING = {"load", "store", "output", "get_index", "index_expr", "constant", "to_dtype", "masked", "where", "lt", "ge"}
# operations that only say how a tensor is read
VIEWS = {"view", "_unsafe_view", "permute", "t", "transpose", "expand", "unsqueeze", "squeeze", "unbind", "split"}
WORKLOADS = ("cifar10-b256", "sd15-b1", "cifar10-b1")
# in a sampler's step, what timesteps decide is there already (`UNet.time_modulation`)
IN_SAMPLER = "fastdiff in a sampler's step"
VARIANTS = (IN_SAMPLER, "fastdiff", "fastdiff, norms by Inductor", "diffusers", "diffusers, fused norms")


@dataclass(frozen=True)
class Kernel:
    """One launch. `copies`: operations in it that change no value; `copied`: the bytes that those write."""

    kind: str
    operations: str
    bytes: int
    copies: int
    copied: int
    only_copies: bool


def read_kernels(graph: GraphLowering, source: str) -> list[Kernel]:
    """The kernels of a graph that Inductor has scheduled, as `absent_gpu.generate` hands it over."""
    kernels = [kernel for node in graph.scheduler.nodes if (kernel := _kernel(node)) is not None]
    launched = len(re.findall(r"^\s*triton_\w+\.run\(", source, re.M))
    if launched != sum(kernel.kind == "generated" for kernel in kernels):
        raise RuntimeError(f"the module launches {launched} generated kernels, which its nodes do not account for")
    return kernels


def census(call: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]]) -> dict[str, Any]:
    """Launches and bytes of one call by kind, its copies, its generated kernels by what they compute."""
    options = compile_options(DEVICE)["options"]
    graphs, graph_breaks = generate(call, arguments, read_kernels, **options)
    kernels = [kernel for graph in graphs for kernel in graph]
    generated: dict[str, dict[str, int]] = {}
    for kernel in kernels:
        if kernel.kind == "generated":
            total = generated.setdefault(kernel.operations, {"launches": 0, "bytes": 0})
            total["launches"] += 1
            total["bytes"] += kernel.bytes
    return {
        "graphs": len(graphs),
        "graph_breaks": graph_breaks,
        "launches": {kind: sum(kernel.kind == kind for kernel in kernels) for kind in KINDS},
        "bytes": {kind: sum(kernel.bytes for kernel in kernels if kernel.kind == kind) for kind in KINDS},
        "copies": {
            "kernels": sum(kernel.only_copies for kernel in kernels),
            "within_others": sum(kernel.copies for kernel in kernels if not kernel.only_copies),
            "bytes_written": sum(kernel.copied for kernel in kernels),
        },
        "generated": dict(sorted(generated.items(), key=lambda item: -item[1]["bytes"])),
        "kernels": [asdict(kernel) for kernel in kernels],
    }


def census_of_unet(variant: str, workload: str) -> dict[str, Any]:
    """The census of a U-Net's call in bfloat16; workload: a model and the images in a call, as in "cifar10-b256".

    The model is a preset of fastdiff.UNet, for diffusers the same configuration, or a latent model of the benchmarks,
    which only diffusers has and whose guided call takes each image twice.
    """
    name, batch = workload.split("-b")
    model, inputs = _latent(name, 2 * int(batch)) if name in LATENT_MODELS else _pixel(variant, name, int(batch))
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    if variant == "diffusers, fused norms":
        # as `accelerate` does
        set_layout(model, channels_last=True)
        fuse_norms(model)

    def arguments() -> tuple[Tensor, ...]:
        on_device(model)
        return inputs()

    with contextlib.ExitStack() as patches:
        if variant == "fastdiff, norms by Inductor":
            patches.enter_context(mock.patch.object(group_norm, "use_triton", _never))
        call = model if isinstance(model, UNet) else lambda *inputs: model(*inputs, return_dict=False)
        return census(call, arguments)


def _pixel(variant: str, name: str, batch: int) -> tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]:
    config = PRESETS[name]
    with torch.device("meta"):
        model = UNet(config) if "fastdiff" in variant else UNet2DModel(**diffusers_config(config))

    def inputs() -> tuple[Any, ...]:
        given = (_images(batch, config.in_channels, config.sample_size), _timesteps(batch))
        if variant != IN_SAMPLER:
            return given
        channels = model.modulation_channels
        modulation = torch.empty(1, channels, dtype=torch.bfloat16, device=DEVICE).expand(batch, channels)
        return (*given, None, None, None, modulation)

    return model, inputs


def _latent(name: str, batch: int) -> tuple[nn.Module, Callable[[], tuple[Tensor, ...]]]:
    spec = LATENT_MODELS[name]
    with torch.device("meta"):
        model = UNet2DConditionModel(**spec.options)
    shape = (batch, spec.tokens, spec.options["cross_attention_dim"])
    return model, lambda: (
        _images(batch, 4, spec.options["sample_size"]),
        _timesteps(batch),
        torch.empty(shape, dtype=torch.bfloat16, device=DEVICE),
    )


def _images(batch: int, channels: int, size: int) -> Tensor:
    images = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device=DEVICE)
    return images.contiguous(memory_format=torch.channels_last)


def _timesteps(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int64, device=DEVICE)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each variant."""
    head = ["U-Net", "graph breaks", "launches", *KINDS, "copies (kernels / within others)", "MB by generated kernels"]
    lines = ["| " + " | ".join([*head, "MB in all"]) + " |", "|---" * (len(head) + 1) + "|"]
    for name, row in rows.items():
        launches, size, copies = row["launches"], row["bytes"], row["copies"]
        cells = [name, row["graph_breaks"], sum(launches.values()), *(launches[kind] for kind in KINDS)]
        cells += [f"{copies['kernels']} / {copies['within_others']}", _megabytes([size["generated"]])]
        lines.append("| " + " | ".join(map(str, [*cells, _megabytes(size.values())])) + " |")
    return "\n".join(lines)


def details(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: for each variant, its generated kernels by what they compute."""
    parts = []
    for name, row in rows.items():
        lines = [f"## {name}", "", "| generated kernels | launches | MB |", "|---|---|---|"]
        for operations, total in row["generated"].items():
            lines.append(f"| {operations} | {total['launches']} | {_megabytes([total['bytes']])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _megabytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e6:.1f}"


def _kernel(node: BaseSchedulerNode) -> Kernel | None:
    """None for what launches nothing: views, the parts of an operation's output."""
    size = node.get_read_write_buffers_sizes()
    if node.is_extern():
        if isinstance(node.node, ir.MultiOutput):
            return None
        name = str(node.node.python_kernel_name)
        return Kernel(_kind(name), name, size, 0, 0, False)
    bodies = [part for part in node.get_nodes() if getattr(part, "_body", None) is not None]
    if not bodies:
        return None
    copies = [part for part in bodies if set(part._body.op_counts) <= MOVING]
    copied = sum(part.get_write_buffer_sizes() for part in copies)
    return Kernel("generated", _operations(bodies), size, len(copies), copied, len(copies) == len(bodies))


def _kind(name: str) -> str:
    if "fastdiff." in name:
        return "fastdiff"
    known = {"convolution": "convolution", "mm": "matmul", "scaled_dot_product": "attention"}
    return next((kind for part, kind in known.items() if part in name), "other")


def _operations(parts: list[BaseSchedulerNode]) -> str:
    names: collections.Counter[str] = collections.Counter()
    for part in parts:
        for origin in part.node.get_origins():
            names[getattr(origin.target, "_opname", str(origin.target))] += 1
    return ", ".join(sorted(set(names) - VIEWS)) or "view"


def _never(tensor: Tensor) -> bool:
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the page")
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), help="models and the images in a call")
    options = parser.parse_args()
    rows = {}
    for workload in options.workload:
        for variant in VARIANTS:
            if "fastdiff" in variant and workload.startswith(tuple(LATENT_MODELS)):
                continue
            name = f"{workload}, {variant}"
            print(name, flush=True)
            rows[name] = census_of_unet(variant, workload)
            del rows[name]["kernels"]  # a page for each
            _write(options.out, rows)
    print(table(rows))


def _write(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    day = datetime.date.today().isoformat()
    command = shlex.join(["python", "-m", "benchmarks.inductor_census", *sys.argv[1:]])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"inductor-census_sm90_{day}"
    report = {"command": command, "date": day, "environment": environment(), "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    versions = f"torch {report['environment']['torch']}, triton {report['environment']['triton']}"
    about = f"`{command}`, {day}, {versions}, no GPU: one call of a U-Net, bfloat16, channels-last."
    note = "Bytes count each tensor once per kernel that touches it; the copies are among the generated kernels."
    page = f"# What Inductor would launch on an H200\n\n{about} {note}\n\n{table(rows)}\n\n{details(rows)}\n"
    path.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
