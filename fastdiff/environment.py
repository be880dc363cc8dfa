"""Versions and hardware, for a bug report: what `fastdiff env` prints."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.kernels import dispatch

OPTIONAL_PACKAGES = (
    *("torchvision", "scikit-learn", "torch-fidelity", "matplotlib", "diffusers", "scipy"),
    *("pytest", "pytest-benchmark"),
)
REQUIRED_PACKAGES = ("numpy", "safetensors", "tqdm", "pillow", "tyro")


def environment() -> dict[str, Any]:
    """JSON-serialisable; None stands for what is not there."""
    return {
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") or _version("pytorch-triton-rocm"),
        "triton_interpreter": dispatch.INTERPRET,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cpu": _cpu_model(),
        "cores": _available_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "os": platform.platform(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in (*REQUIRED_PACKAGES, *OPTIONAL_PACKAGES)},
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Those of fastdiff, Python, torch and the named packages, for a result."""
    own = {"fastdiff": fastdiff.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return {**own, **{name: _version(name) for name in packages}}


def describe(report: dict[str, Any]) -> str:
    """The report of `environment` as aligned lines."""
    lines = []
    for name, value in report.items():
        if name == "gpus":
            value = [f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['capability']}" for gpu in value]
            lines += [(f"gpu {index}", text) for index, text in enumerate(value)] or [("gpu", "none")]
        elif name == "packages":
            lines += [(package, version or "not installed") for package, version in value.items()]
        elif isinstance(value, bool):
            lines.append((name.replace("_", " "), "yes" if value else "no"))
        else:
            lines.append((name.replace("_", " "), "none" if value is None else str(value)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def device_name(device: torch.device) -> str:
    """The GPU, or the CPU with the number of threads that torch computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": architecture or f"sm_{properties.major}{properties.minor}",
    }


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    return text.splitlines()[0].removeprefix("NVRM version:").strip()


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
