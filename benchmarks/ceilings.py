"""What this device can do at most, measured: copy bandwidth, matrix products, and instructions issued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.measurement import measure

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 128 * 2**20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
MATMUL_DTYPES = {"cuda": ("float32", "tf32", "float16", "bfloat16"), "cpu": ("float32",)}
QUICK_SHARE = 8


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates of one device.

    Attributes:
        copy_bytes_per_s: device-to-device copy, bytes read plus bytes written.
        matmul_flops_per_s: a large product by its dtype; "tf32" are float32 tensors with TF32 on.
        instructions_per_s: issued for single lanes, so that instructions per element times elements over it is a time;
            None on a CPU.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]
    instructions_per_s: float | None = None

    def copy_ms(self, n_bytes: float) -> float:
        """What moving that many bytes takes."""
        return 1e3 * n_bytes / self.copy_bytes_per_s

    def matmul_ms(self, flops: float, dtype: str) -> float | None:
        """What that many floating-point operations take, None where the dtype's rate was not measured."""
        rate = self.matmul_flops_per_s.get(dtype)
        return None if rate is None else 1e3 * flops / rate

    def issue_ms(self, instructions: float) -> float | None:
        """What issuing that many instructions of single lanes takes, None where the rate was not measured."""
        return None if self.instructions_per_s is None else 1e3 * instructions / self.instructions_per_s

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Ceilings:
        return cls(**value)


def measure_ceilings(device: torch.device, *, quick: bool) -> Ceilings:
    """A few seconds. The sizes are far beyond the caches; random data, because zeros run faster."""
    share = QUICK_SHARE if quick else 1
    seconds = 0.2 if quick else 1.0
    kind = device.type
    n_bytes = COPY_BYTES[kind]
    if kind == "cuda":
        # two of them at once, on small cards too
        n_bytes = min(n_bytes, torch.cuda.get_device_properties(device).total_memory // 8)
    with torch.no_grad():
        copy = _copy_rate(n_bytes // share, device, seconds)
        size = MATMUL_SIZE[kind] // (2 if quick else 1)
        matmul = {name: _matmul_rate(name, size, device, seconds) for name in MATMUL_DTYPES[kind]}
    return Ceilings(
        copy_bytes_per_s=copy,
        matmul_flops_per_s=matmul,
        instructions_per_s=None if kind != "cuda" else _issue_rate(device, seconds),
    )


def _rate(call: Callable[[], object], work: float, device: torch.device, seconds: float) -> float:
    """Work per second in the median."""
    return 1e3 * work / measure(call, device, seconds=seconds).median_ms


def _copy_rate(n_bytes: int, device: torch.device, seconds: float) -> float:
    source = torch.randn(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * source.numel() * source.element_size(), device, seconds)


def _matmul_rate(name: str, size: int, device: torch.device, seconds: float) -> float:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return _rate(lambda: torch.mm(a, b, out=out), 2 * size**3, device, seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _issue_rate(device: torch.device, seconds: float) -> float | None:
    from benchmarks import issue_rate

    if not issue_rate.AVAILABLE:
        return None
    call, instructions = issue_rate.workload(device)
    return _rate(call, instructions, device, seconds)
