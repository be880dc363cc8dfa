"""`fastdiff verify`: every kernel and every reference against float64 formulas, on the hardware at hand.

A result is right if it is no further from the formula than float32 arithmetic can take it (`verify_formulas.Rounded`)
plus half a unit in the last place of the dtype it is stored in. The check checks itself: a coefficient that is off by
ten times what goes unnoticed must be reported.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.kernels import dispatch
from fastdiff.verify_cases import DTYPES, LAYOUTS, Case, cases
from fastdiff.verify_dropout import dropout_cases
from fastdiff.verify_formulas import SUBNORMAL, Array, Rounded
from fastdiff.verify_group_norm import group_norm_cases
from fastdiff.verify_sampler import packaged_model_is_finite, walk_errors
from fastdiff.verify_solver_step import solver_step_cases
from fastdiff.verify_uniform import uniform_cases

# Half a unit in the last place of a number of size 1, and half the distance of subnormal numbers.
STORAGE = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}
INTERPRETER = "Triton's interpreter"


@dataclass(frozen=True)
class Path:
    """A way that a kernel can go: a device, and Triton there or the plain-PyTorch reference."""

    name: str
    device: str
    triton: bool

    @contextlib.contextmanager
    def taken(self) -> Iterator[torch.device]:
        """Sends every kernel this way; not for use beside other threads."""
        before = dispatch.HAS_TRITON, dispatch.INTERPRET
        if not self.triton:
            dispatch.HAS_TRITON, dispatch.INTERPRET = False, False
        try:
            yield torch.device(self.device)
        finally:
            dispatch.HAS_TRITON, dispatch.INTERPRET = before


@dataclass
class Check:
    """One line of the report: the worst of `count` results, by error / bound. status: "ok", "FAIL" or "not run"."""

    kernel: str
    path: str
    dtype: str
    layout: str
    status: str = "ok"
    count: int = 0
    error: float = 0.0
    bound: float = 0.0
    note: str = ""

    def add(self, error: float, bound: float, name: str) -> None:
        """Take in one result; NaN is an error that no bound covers."""
        self.count += 1
        failed = not error <= bound
        worse = not error * self.bound <= self.error * bound or self.count == 1
        if failed and self.status == "ok":
            self.status = "FAIL"
            self.note = name
        if worse:
            self.error, self.bound = error, bound


@dataclass
class Report:
    """All checks, and what could not be checked and why."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing failed, and something ran."""
        statuses = [check.status for check in self.checks]
        return "FAIL" not in statuses and "ok" in statuses

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; an error that is no finite number is None."""
        checks = [asdict(check) for check in self.checks]
        for check in checks:
            check["error"] = check["error"] if np.isfinite(check["error"]) else None
        return {"ok": self.ok, "notes": self.notes, "checks": checks}

    def describe(self) -> str:
        """The table."""
        lines = [("kernel", "path", "dtype", "layout", "checks", "worst error", "bound", "")]
        for check in self.checks:
            ran = check.status != "not run"
            figures = (str(check.count), f"{check.error:.1e}", f"{check.bound:.1e}") if ran else ("-", "-", "-")
            status = check.status + (f": {check.note}" if check.note else "")
            lines.append((check.kernel, check.path, check.dtype, check.layout, *figures, status))
        widths = [max(len(line[column]) for line in lines) for column in range(7)]
        rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, [*widths, 0])).rstrip() for line in lines]
        failed = sum(check.status == "FAIL" for check in self.checks)
        verdict = "all ok" if self.ok else f"{failed} of {len(self.checks)} lines failed" if failed else "nothing ran"
        return "\n".join([*self.notes, *rows, verdict])


def verify(*, only: str | None = None, paths: Sequence[Path] | None = None) -> Report:
    """Run all checks, or those whose "kernel dtype layout feature" contains `only`, on all paths of this machine.

    Raises ValueError where `only` is in no name.
    """
    report = Report()
    every = itertools.chain(cases(), uniform_cases(), dropout_cases(), solver_step_cases(), group_norm_cases())
    chosen = [case for case in every if only is None or only in case.name]
    whole = "sampler packaged model"
    if not chosen and (only or "") not in whole:
        raise ValueError(f"only must be part of a check's name such as 'p_sample float16 strided clip', got {only!r}")
    paths = available_paths(report) if paths is None else paths
    for path in paths:
        with path.taken() as device:
            _check_cases(report, chosen, path, device)
            _check_itself(report, chosen, path, device)
    if any(case.kernel == "normal" for case in chosen) and len(paths) > 1:
        report.checks.append(_equal_bits([case for case in chosen if case.kernel == "normal"], paths))
    if (only or "") in whole:
        _check_sampler(report, paths)
    return report


def available_paths(report: Report) -> list[Path]:
    """The paths of this machine; what is missing is written into the report's notes."""
    paths = [Path("reference, CPU", "cpu", False)]
    if torch.cuda.is_available():
        paths.insert(0, Path("reference, GPU", "cuda", False))
    if not dispatch.HAS_TRITON:
        report.notes.append("Triton is not installed: only the references ran")
    elif torch.cuda.is_available():
        paths.insert(0, Path("Triton, GPU", "cuda", True))
    elif dispatch.INTERPRET:
        report.notes.append(
            f"no GPU: the kernels ran in {INTERPRETER}, which rounds bfloat16 wrongly, so that is not run there"
        )
        paths.insert(0, Path(INTERPRETER, "cpu", True))
    else:
        report.notes.append("no GPU, and TRITON_INTERPRET is not 1: only the references ran")
    return paths


def compare(got: Tensor, expected: Rounded) -> tuple[float, float]:
    """Error and bound of the element where error / bound is largest; a NaN or infinity is an infinite error."""
    value = got.detach().double().cpu().numpy()
    error, bound = np.abs(value - expected.value), bound_of(expected, got.dtype)
    if value.shape != expected.value.shape or not np.isfinite(value).all():
        return np.inf, float(bound.max())
    worst = np.unravel_index(np.argmax(error / bound), error.shape)
    return float(error[worst]), float(bound[worst])


def bound_of(expected: Rounded, dtype: torch.dtype) -> Array:
    """How far a result stored in dtype may be from the formula."""
    unit, subnormal = STORAGE.get(dtype, (0.0, SUBNORMAL))
    return expected.error + unit * expected.size + subnormal


def _check_cases(report: Report, chosen: Sequence[Case], path: Path, device: torch.device) -> None:
    lines: dict[tuple[str, str, str], Check] = {}
    for case in chosen:
        key = case.kernel, case.dtype, case.layout
        line = lines.setdefault(key, Check(case.kernel, path.name, case.dtype, case.layout))
        if path.name == INTERPRETER and case.dtype == "bfloat16":
            line.status, line.note = "not run", "the interpreter rounds bfloat16 wrongly"
            continue
        outputs = case.run(device, 0.0)
        for name, got in outputs.items():
            line.add(*compare(got, case.expected[name]), f"{name} of {case.feature}")
    report.checks += lines.values()


def _check_itself(report: Report, chosen: Sequence[Case], path: Path, device: torch.device) -> None:
    """A coefficient off by ten times what may go unnoticed, in the first float32 case of each kernel that has one."""
    for kernel in dict.fromkeys(case.kernel for case in chosen if case.nudged):
        case = next((case for case in chosen if case.kernel == kernel and case.dtype == "float32"), None)
        if case is None:
            continue
        expected = case.expected[case.nudged]
        reach = np.abs(case.expected["d"].value)
        coefficient_bound = float((bound_of(expected, DTYPES[case.dtype]) / np.maximum(reach, 1e-300)).min())
        if not reach.any():
            continue
        error, bound = compare(case.run(device, 10 * coefficient_bound)[case.nudged], expected)
        check = Check(kernel, path.name, case.dtype, case.layout, count=1, error=error, bound=bound)
        noticed = error > bound
        check.status = "ok" if noticed else "FAIL"
        check.note = f"a coefficient off by 10 bounds is {'reported' if noticed else 'not reported'}"
        report.checks.append(check)


def _equal_bits(chosen: Sequence[Case], paths: Sequence[Path]) -> Check:
    """The noise contract: every path makes the same bits."""
    check = Check("normal", " = ".join(path.name for path in paths), "float32", "all")
    for case in chosen:
        results = []
        for path in paths:
            with path.taken() as device:
                results.append(case.run(device, 0.0)["noise"].cpu().contiguous().view(torch.int32))
        different = sum(int((result != results[0]).sum()) for result in results[1:])
        check.add(float(different), 0.0, f"{different} values differ for {case.feature}")
    return check


def _check_sampler(report: Report, paths: Sequence[Path]) -> None:
    """The five solvers through Sampler against textbook loops, and the packaged model, on the fastest path."""
    path = next((path for path in paths if path.name != INTERPRETER), paths[0])
    with path.taken() as device:
        for solver, got, expected in walk_errors(device):
            check = Check(f"sampler {solver}", path.name, "float32", LAYOUTS[0])
            check.add(*compare(got, expected), "")
            report.checks.append(check)
        check = Check("packaged model", path.name, "float32", LAYOUTS[0], count=1)
        finite = packaged_model_is_finite(device)
        check.status = {True: "ok", False: "FAIL", None: "not run"}[finite]
        check.note = {True: "", False: "samples are not finite", None: "it is not installed"}[finite]
        report.checks.append(check)
