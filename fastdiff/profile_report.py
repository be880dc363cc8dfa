"""A profile as a table, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastdiff.environment import environment
from fastdiff.kernel_classes import CLASSES
from fastdiff.profile import Profile

# Kernels and operators that are listed by name.
LISTED_KERNELS = 20
NAME_LENGTH = 90
COLUMNS = ("class", "ms/step", "share", "launches/step")


@dataclass(frozen=True, kw_only=True)
class Report:
    """A profiled call and the work it did.

    title: what was profiled. images, steps: of one call. flops: counted operations of one call, forward and backward.
    matmul_flops_per_s: measured rate of a matrix product in `matmul_dtype`, the ceiling that MFU refers to.
    activation_bytes: what a training step keeps from its forward for its backward pass, None where it is not known.
    """

    title: str
    device: str
    images: int
    steps: int
    parameters: int
    profile: Profile
    flops: int
    matmul_flops_per_s: float
    matmul_dtype: str
    activation_bytes: int | None = None

    @property
    def images_per_s(self) -> float:
        """Images by wall time, compilation and warm-up apart."""
        return 1000 * self.images / self.profile.ms

    @property
    def flops_per_s(self) -> float:
        """Counted operations by wall time."""
        return 1000 * self.flops / self.profile.ms

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation: the share of the measured matrix-product rate (Chowdhery et al. 2022, appendix B)."""
        return self.flops_per_s / self.matmul_flops_per_s

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: all figures of the profile, those that follow from them, and the environment."""
        derived = {name: getattr(self, name) for name in ("images_per_s", "flops_per_s", "mfu")}
        return {**asdict(self), **derived, "environment": environment()}

    def table(self) -> list[tuple[str, ...]]:
        """Rows of the table by kernel class: COLUMNS, one row a class, the sum."""
        profile = self.profile
        rows = [
            (kind, f"{share.ms / self.steps:.3f}", f"{share.share:.1%}", f"{share.launches / self.steps:.1f}")
            for kind, share in profile.classes.items()
        ]
        total = ("all", f"{profile.busy_ms / self.steps:.3f}", "100.0%", f"{profile.launches / self.steps:.1f}")
        return [COLUMNS, *rows, total]

    def figures(self) -> list[tuple[str, str]]:
        """What is said beside the table: names and values."""
        profile, per_step = self.profile, f"{self.profile.ms / self.steps:.3f} ms"
        on_gpu = profile.peak_memory_bytes is not None
        busy = profile.busy_ms / profile.ms if on_gpu else None
        rate = f"{self.matmul_flops_per_s / 1e9:,.1f} GFLOP/s of a {self.matmul_dtype} matrix product, measured"
        lines = [
            ("images/s", f"{self.images_per_s:,.1f}"),
            ("time of a step", per_step + (f", kernels busy for {busy:.0%} of it" if busy is not None else "")),
            ("FLOPs of a step", f"{self.flops / self.steps / 1e9:,.3f} GFLOP, {self.flops_per_s / 1e9:,.1f} GFLOP/s"),
            ("MFU", f"{self.mfu:.1%} of {rate}"),
            ("launches of a step", f"{profile.launches / self.steps:.1f}" + ("" if on_gpu else " operators")),
        ]
        if on_gpu:
            lines += [
                ("launched by the host", f"{profile.host_launches / self.steps:.1f} a step, a graph being one"),
                ("host synchronisations", f"{profile.synchronisations / self.steps:.2f} a step"),
                ("peak memory", f"{_mib(profile.peak_memory_bytes)}, reserved {_mib(profile.reserved_memory_bytes)}"),
            ]
        lines.append(("working memory", f"{_mib(profile.working_memory_bytes)} at most beyond weights and inputs"))
        if self.activation_bytes is not None:
            lines.append(("activation memory", f"{_mib(self.activation_bytes)} kept for the backward pass"))
        lines.append(("parameters", f"{self.parameters:,}"))
        return lines

    def describe(self) -> str:
        """For a terminal: figures, then the table with what each class holds."""
        width = max(len(name) for name, _ in self.figures())
        lines = [f"{self.title}, {self.device}", *(f"{name:<{width}}  {value}" for name, value in self.figures()), ""]
        table = [(*row, CLASSES.get(row[0], "")) for row in self.table()]
        widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
        for kind, *numbers, holds in table:
            aligned = [f"{number:>{size}}" for number, size in zip(numbers, widths[1:])]
            lines.append("  ".join([f"{kind:<{widths[0]}}", *aligned, holds]).rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        """The same as a page, with the longest kernels by name."""
        profile = self.profile
        lines = [f"# {self.title}", "", f"{self.device}; {profile.repeats} calls of {self.steps} steps", ""]
        lines += [f"- {name}: {value}" for name, value in self.figures()]
        lines += ["", *_markdown_table([(*row, CLASSES.get(row[0], "")) for row in self.table()], "holds")]
        lines += ["", f"## The {LISTED_KERNELS} that take longest", ""]
        header = (*COLUMNS, "name")
        listed = [
            (k.kind, f"{k.ms / self.steps:.3f}", f"{k.share:.1%}", f"{k.launches / self.steps:.1f}", _short(k.name))
            for k in profile.kernels[:LISTED_KERNELS]
        ]
        return "\n".join([*lines, *_markdown_table([header, *listed], "name"), ""])

    def write(self, folder: Path) -> None:
        """profile.json and profile.md in the folder."""
        (folder / "profile.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        (folder / "profile.md").write_text(self.markdown())


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f} MiB"


def _short(name: str) -> str:
    name = name.replace("|", "/")
    return f"`{name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + '...'}`"


def _markdown_table(rows: list[tuple[str, ...]], last: str) -> list[str]:
    header = [*rows[0][:-1], last]
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows[1:]]
    return [f"| {' | '.join(line)} |" for line in lines]
