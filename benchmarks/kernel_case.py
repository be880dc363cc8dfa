"""One kernel at one size: its inputs, plain PyTorch, torch.compile of that, ours; checked, then timed in turns."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.measurement import interleave, synchronize
from benchmarks.suite import Context, Figures
from fastdiff.cuda_graph import capture

CONTENDERS = ("fastdiff", "eager", "compiled")
SECONDS, QUICK_SECONDS = 0.5, 0.1
# A timed call uses each of several sets of inputs once, so that small tensors are worth a measurement and come from
# memory. What the sets take together, and how many there are at most.
ROTATED_BYTES, MAX_SETS = 512 * 2**20, 32
# of the mean and the variance of noise that a contender draws by itself
STANDARD_ERRORS = 6
RESULTS = Path(__file__).parent / "results"

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Formula = Callable[[Inputs, "Tensor | None"], Outputs]


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """A kernel's work and who does it.

    Attributes:
        name: stable, of [a-z0-9-].
        elements: that the figures per element count.
        bytes_per_element: read and written at least, each tensor once.
        cost: name of the case in tests/kernels/static_check.py whose binary does this, None for none.
        inputs: a new set on a device.
        ours: the call of ours for a set, made ahead of timing.
        formula: the same in plain PyTorch; given its noise, or drawing it by itself where `draws`.
        noise: what ours uses, for the formula to be compared with it; None where the case has none.
        draws: the contenders draw noise of their own when timed.
        noise_scale: standard deviation [B, 1, ...] of the noise in the first output, where `draws`.
        tolerance: largest accepted difference from the formula in float64, relative to its largest value.
        grad: the formula is timed backwards: gradients by its first inputs named here.
    """

    name: str
    elements: int
    bytes_per_element: float
    cost: str | None = None
    inputs: Callable[[torch.device], Inputs]
    ours: Callable[[Inputs], Callable[[], Outputs]]
    formula: Formula
    noise: Callable[[Inputs], Tensor] | None = None
    draws: bool = False
    noise_scale: Callable[[Inputs], Tensor] | None = None
    tolerance: float
    grad: tuple[str, ...] = ()


def relative_error(outputs: Outputs, expected: Outputs) -> float:
    """Largest absolute difference over the largest expected value, the worst of the outputs; NaN counts as infinite."""
    if len(outputs) != len(expected):
        raise AssertionError(f"{len(outputs)} outputs instead of {len(expected)}")
    errors = []
    for one, other in zip(outputs, expected):
        error = float((one.double() - other.double()).abs().max() / other.double().abs().max())
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)


def instructions_per_element(cost: str | None, capability: str) -> float | None:
    """SASS instructions of the newest committed kernel-cost file, of this capability ("sm_90") or else of sm_90."""
    files = sorted(RESULTS.glob("kernel-cost_*.json"))
    if cost is None or not files:
        return None
    targets = json.loads(files[-1].read_text())["costs"].get(cost, {})
    return targets.get(capability, targets.get("sm_90", {})).get("instructions")


def floors(case: KernelCase, ceilings: Ceilings, instructions: float | None) -> Figures:
    """The least time by bytes and by instructions, and what they follow from."""
    figures: Figures = {
        "bytes": case.bytes_per_element * case.elements,
        "bytes_per_element": case.bytes_per_element,
        "byte_floor_ms": ceilings.copy_ms(case.bytes_per_element * case.elements),
    }
    if instructions is not None:
        figures["instructions_per_element"] = instructions
        issue = ceilings.issue_ms(instructions * case.elements)
        if issue is not None:
            figures["issue_floor_ms"] = issue
    return figures


def timed_formula(case: KernelCase, formula: Formula) -> Callable[[Inputs], Callable[[], Outputs]]:
    """The call of plain PyTorch for a set of inputs: forward with its own noise, or backward through a kept graph."""

    def prepare(inputs: Inputs) -> Callable[[], Outputs]:
        if not case.grad:
            noise = None if case.noise is None or case.draws else case.noise(inputs)
            return lambda: formula(inputs, noise)
        leaves = [inputs[name].requires_grad_() for name in case.grad]
        with torch.enable_grad():
            (output,) = formula(inputs, None)
        return lambda: torch.autograd.grad(output, leaves, inputs["grad_output"], retain_graph=True)

    return prepare


def expected(case: KernelCase, inputs: Inputs) -> Outputs:
    """The formula in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    noise = None if case.noise is None else case.noise(inputs).double()
    if not case.grad:
        return case.formula(wide, noise)
    return timed_formula(case, case.formula)({name: value.detach() for name, value in wide.items()})()


def check(case: KernelCase, name: str, call: Callable[[], Outputs], inputs: Inputs, reference: Outputs) -> float | None:
    """The error of a contender, None where only the moments of its own noise can be compared. Raises AssertionError."""
    if name != "fastdiff" and case.draws:
        assert case.noise_scale is not None
        still = case.formula(inputs, torch.zeros((), device=inputs["x"].device))[0].double()
        noise = (call()[0].double() - still) / case.noise_scale(inputs).double()
        n = noise.numel()
        # a standard normal: the mean has the variance 1/n, the mean square 2/n
        deviation = max(abs(float(noise.mean())) * n**0.5, abs(float(noise.square().mean()) - 1) * (n / 2) ** 0.5)
        if not deviation <= STANDARD_ERRORS:
            raise AssertionError(f"noise of {name} is {deviation:.1f} standard errors off a standard normal")
        return None
    error = relative_error(call(), reference)
    if not error <= case.tolerance:
        raise AssertionError(f"{name} differs from the formula by {error:.2e}, accepted {case.tolerance:.2e}")
    return error


def measure_case(case: KernelCase, context: Context) -> dict[str, Figures | Exception]:
    """Figures of each contender by name, or what kept it from being timed."""
    device = context.device
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    torch._dynamo.reset()
    # a kept graph is gone through again and again, and what is captured must not touch the default stream
    with torch.no_grad(), torch._functorch.config.patch(donated_buffer=False), _side_stream(device):
        sets = _sets(case, device)
        reference = expected(case, sets[0])
        for name in CONTENDERS:
            try:
                figures: Figures = {"tolerance": case.tolerance}
                prepare = prepare_contender(case, name)
                started = time.perf_counter()
                # in-place work must not change what the others are checked with
                inputs = {key: value.clone() for key, value in sets[0].items()}
                first = prepare(inputs)
                first()
                synchronize(device)
                if name == "compiled":
                    figures["compile_s"] = time.perf_counter() - started
                inputs = {key: value.detach().clone() for key, value in sets[0].items()}
                error = check(case, name, prepare(inputs), sets[0], reference)
                if error is not None:
                    figures["error"] = error
                calls[name], note = _repeated([prepare(inputs) for inputs in sets], device)
                figures["note"] = "own noise, moments checked; " * (error is None) + note
                found[name] = figures
            except Exception as failure:  # one contender's: the others are timed all the same
                found[name] = failure
        seconds = QUICK_SECONDS if context.quick else SECONDS
        measured = interleave(calls, device, seconds=seconds, divide=len(sets), probe=context.probe)
    # without a GPU the kernels do not run, and their instructions say nothing
    instructions = instructions_per_element(case.cost, _capability(device)) if device.type == "cuda" else None
    least = floors(case, context.ceilings, instructions)
    for name, measurement in measured.items():
        figures = found[name]
        figures.update(measurement.figures())  # type: ignore[typeddict-item]
        figures.update(least)
        figures["of_copy"] = least["byte_floor_ms"] / measurement.median_ms
    return found


def _side_stream(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


def prepare_contender(case: KernelCase, name: str) -> Callable[[Inputs], Callable[[], Outputs]]:
    """What makes the call of a contender ("fastdiff" | "eager" | "compiled") for a set of inputs."""
    if name == "fastdiff":
        return case.ours
    formula = case.formula if name == "eager" else torch.compile(case.formula, dynamic=False)
    return timed_formula(case, formula)


def _sets(case: KernelCase, device: torch.device) -> list[Inputs]:
    first = case.inputs(device)
    if device.type != "cuda":
        return [first]
    size = sum(value.numel() * value.element_size() for value in first.values())
    return [first] + [case.inputs(device) for _ in range(min(MAX_SETS, math.ceil(ROTATED_BYTES / size)) - 1)]


def _repeated(calls: list[Callable[[], Outputs]], device: torch.device) -> tuple[Callable[[], object], str]:
    """One call that does all, as a CUDA graph where it can be captured; how it is run."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run, ""
    try:
        return capture(run, lambda: None, device, None)[0], "CUDA graph"
    except RuntimeError as error:
        return run, f"launched one by one: {str(error).splitlines()[0][:100]}"


def _capability(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
