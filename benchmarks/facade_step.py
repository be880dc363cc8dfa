"""A step of every façade against diffusers' own scheduler, side by side: python -m benchmarks.facade_step --out DIR

Both take the same walk with the same tensors, in turns, in one process; only `step` is timed. The noise of steps is
made beforehand for both, so that the caller's generator is in neither time. On a GPU a step's time ends when the device
is done, the host's own time is told apart, the original is also run through torch.compile, and a walk of the façade is
made that fails at the first synchronisation. Writes a JSON and a page.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff.compat.diffusers as compat
from fastdiff.environment import environment

SHAPES = ((16, 4, 64, 64), (64, 3, 32, 32))
TINY = (1, 4, 2, 2)
STEPS = 20
# the goals: times faster where the original takes several ops, and no slower than this where it takes few
MANY_OPS, FASTER, NO_SLOWER = 4, 1.5, 1 / 1.5
FASTER_GPU, FASTER_THAN_COMPILED = 5.0, 1.2
GPU_NOTE = f", and {FASTER_THAN_COMPILED} times faster than the original under torch.compile (second figure)"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scheduler as it is configured and stepped."""

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 1

    @property
    def name(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in (*self.config.items(), *self.options.items()))
        return self.scheduler.removesuffix("Scheduler") + (f" ({settings})" if settings else "")


CASES = (
    Case(scheduler="DDPMScheduler"),
    Case(scheduler="DDPMScheduler", config={"variance_type": "learned_range"}, channels=2),
    Case(scheduler="DDPMScheduler", config={"thresholding": True}),
    Case(scheduler="DDIMScheduler"),
    Case(scheduler="DDIMScheduler", options={"eta": 1.0}),
    Case(scheduler="DDIMInverseScheduler"),
    Case(scheduler="LCMScheduler"),
    Case(scheduler="EulerDiscreteScheduler"),
    Case(scheduler="EulerAncestralDiscreteScheduler"),
    Case(scheduler="HeunDiscreteScheduler"),
    Case(scheduler="FlowMatchEulerDiscreteScheduler"),
    Case(scheduler="FlowMatchEulerDiscreteScheduler", config={"stochastic_sampling": True}),
    Case(scheduler="EDMEulerScheduler"),
    Case(scheduler="DPMSolverMultistepScheduler"),
    Case(scheduler="DPMSolverMultistepScheduler", config={"solver_order": 3}),
    Case(scheduler="DPMSolverMultistepScheduler", config={"algorithm_type": "sde-dpmsolver++"}),
    Case(scheduler="DPMSolverSinglestepScheduler"),
    Case(scheduler="UniPCMultistepScheduler"),
    Case(scheduler="DEISMultistepScheduler"),
    Case(scheduler="EDMDPMSolverMultistepScheduler"),
    Case(scheduler="PNDMScheduler"),
    Case(scheduler="PNDMScheduler", config={"skip_prk_steps": True}),
    Case(scheduler="LMSDiscreteScheduler"),
    Case(scheduler="KDPM2DiscreteScheduler"),
    Case(scheduler="KDPM2AncestralDiscreteScheduler"),
    Case(scheduler="TCDScheduler"),
)


class Prepared:
    """Stands for diffusers' `randn_tensor`: one tensor for each shape and dtype, made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def __call__(self, shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        key = tuple(shape), dtype, torch.device(device or "cpu")
        if key not in self._made:
            self._made[key] = torch.randn(*key[:1], dtype=dtype, device=device)
        return self._made[key]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """In every module of schedulers that is loaded."""
        found = []
        for name, module in list(sys.modules.items()):
            if name.startswith(("diffusers.schedulers.", "fastdiff.compat.")) and hasattr(module, "randn_tensor"):
                found.append((module, module.randn_tensor))
                module.randn_tensor = self  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module, drawn in found:
                module.randn_tensor = drawn  # type: ignore[attr-defined]


class Ops(TorchDispatchMode):
    """Counts the operations that run, without views and reads of host numbers."""

    FREE: tuple[str, ...] = ("aten.view", "aten.slice", "aten.select", "aten.split", "aten.unbind", "aten.unsqueeze")
    FREE += ("aten.squeeze", "aten.detach", "aten.alias", "aten.as_strided", "aten._unsafe_view", "aten.expand")
    FREE += ("aten._local_scalar_dense", "aten.promote_types", "aten._to_copy", "aten.lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.on_samples = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (list, tuple)) and result else result
        # arithmetic on 0-dim coefficients is not counted
        if not str(function).startswith(self.FREE) and isinstance(first, Tensor) and first.ndim > 0:
            self.on_samples += 1
        return result


class Step(NamedTuple):
    """A step of a walk: what it took, what it gave, and how many operations on samples it was."""

    sample: Tensor
    result: Tensor
    ops: int


class Times(NamedTuple):
    """Seconds of each step: until its result is there, and until the host goes on."""

    whole: list[float]
    host: list[float]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _walk(
    scheduler: Any,
    case: Case,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    times: Times | None = None,
    count: bool = False,
    step: Callable[..., Any] | None = None,
) -> Iterator[Step]:
    """The steps of a walk with a smooth network; `times` takes the seconds of each, `step` stands for the method."""
    scheduler.set_timesteps(num_inference_steps=STEPS, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True
    call = scheduler.step if step is None else step
    x = torch.linspace(-1.5, 1.5, torch.Size(shape).numel(), device=device).view(shape)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in list(scheduler.timesteps):
        m = torch.tanh(0.5 * x)
        m = torch.cat([m, torch.sin(x)], 1) if case.channels == 2 else m
        if times is not None:
            _finish(device)
        with Ops() if count else contextlib.nullcontext() as ops:
            start = time.perf_counter()
            result = call(m, t, x, return_dict=False, **case.options)[0]
            host = time.perf_counter() - start
        if times is not None:
            _finish(device)
            times.host.append(host)
            times.whole.append(time.perf_counter() - start)
        yield Step(x, result, 0 if ops is None else ops.on_samples)
        x = result


def _times(
    scheduler: Any, case: Case, shape: tuple[int, ...], device: torch.device, step: Callable[..., Any] | None = None
) -> Times:
    """A walk's."""
    times = Times([], [])
    for _ in _walk(scheduler, case, shape, device, times=times, step=step):
        pass
    return times


def _synchronises(scheduler: Any, case: Case, device: torch.device) -> bool | None:
    """Whether a step of a walk waits for the device; None where there is none."""
    if device.type != "cuda":
        return None
    steps = _walk(scheduler, case, TINY, device)
    next(steps)  # lists its timesteps, and may copy tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _error(ours: list[Step], theirs: list[Step]) -> float:
    """The largest difference of two walks, relative to the largest number that enters or leaves a step."""
    errors = []
    for one, other in zip(ours, theirs):
        unit = torch.maximum(other.sample.abs().max(), other.result.abs().max())
        errors.append(float((one.result - other.result).abs().max() / unit))
    return max(errors)


def _summary(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_us": median * 1e6, "quartile_us": low * 1e6, "upper_quartile_us": high * 1e6, "steps": len(times)}


def measure(case: Case, shapes: tuple[tuple[int, ...], ...], walks: int, device: torch.device) -> dict[str, Any]:
    """Everything about a case: operations, error, and for each shape the times of all contenders."""
    original = getattr(diffusers, case.scheduler)(**case.config)
    ours = getattr(compat, f"Fast{case.scheduler}").from_config(original.config)
    with Prepared().installed():
        return _measure(case, original, ours, shapes, walks, device)


def _measure(
    case: Case, original: Any, ours: Any, shapes: tuple[tuple[int, ...], ...], walks: int, device: torch.device
) -> dict[str, Any]:
    report: dict[str, Any] = {"name": case.name, "scheduler": case.scheduler, "shapes": {}}
    # the first walk compiles; the second is its time without
    first, second = (sum(_times(ours, case, TINY, device).whole) for _ in range(2))
    report["compile_s"] = max(first - second, 0.0)
    walked, expected = (
        list(_walk(scheduler, case, (2, 4, 8, 8), device, count=True)) for scheduler in (ours, original)
    )
    report["ops"], report["ops_original"] = (
        # of the steps alike but for a few at the ends, both stages of a two-stage method
        max(statistics.multimode(step.ops for step in steps[4:-4]))
        for steps in (walked, expected)
    )
    report["error"] = _error(walked, expected)
    report["synchronises"] = _synchronises(ours, case, device)
    contenders: dict[str, Any] = {"ours": (ours, None), "original": (original, None)}
    if device.type == "cuda":
        contenders["compiled original"] = original, torch.compile(original.step)
    for shape in (TINY, *shapes):
        taken = {name: Times([], []) for name in contenders}
        for turn in range(walks + 1):
            for name in list(contenders) if turn % 2 else reversed(contenders):
                scheduler, step = contenders[name]
                times = _times(scheduler, case, shape, device, step)
                # the first turn warms up
                for all_steps, of_walk in zip(taken[name], times if turn else ()):
                    all_steps += of_walk
        summary: dict[str, Any] = {name: _summary(times.whole) for name, times in taken.items()}
        summary["host"] = {name: _summary(times.host) for name, times in taken.items()}
        ours_us = summary["ours"]["median_us"]
        summary["times_faster"] = summary["original"]["median_us"] / ours_us
        if "compiled original" in summary:
            summary["times_faster_than_compiled"] = summary["compiled original"]["median_us"] / ours_us
        report["shapes"]["x".join(map(str, shape))] = summary
    return report


def device_name(device: torch.device) -> str:
    """The last word of a card's name, in lower case; "cpu"."""
    return torch.cuda.get_device_name(device).split()[-1].lower() if device.type == "cuda" else device.type


def goal(case: dict[str, Any], device: str) -> float:
    """How many times faster than the original a case is to be."""
    return (FASTER_GPU if device == "cuda" else FASTER) if case["ops_original"] >= MANY_OPS else NO_SLOWER


def reached(case: dict[str, Any], shape: str, device: str) -> bool:
    """Whether the goals hold for a shape."""
    times = case["shapes"][shape]
    compiled = times.get("times_faster_than_compiled", FASTER_THAN_COMPILED)
    return times["times_faster"] >= goal(case, device) and compiled >= FASTER_THAN_COMPILED


def page(report: dict[str, Any]) -> str:
    """Markdown, a line for each case."""
    shapes = [name for name in report["cases"][0]["shapes"] if name != "x".join(map(str, TINY))]
    tiny = "x".join(map(str, TINY))
    on_gpu = report["device"] == "cuda"
    lines = [
        "# A façade's step against the original's",
        "",
        f"`{report['command']}`, {report['date']}, {report['environment']['cpu']}, "
        f"{report['environment']['torch_threads']} thread(s), torch {report['environment']['torch']}, diffusers "
        f"{report['environment']['packages']['diffusers']}. Medians in microseconds, original → façade (times faster); "
        "noise made beforehand. The tiny tensors show the host's work. Goal: "
        f"{FASTER_GPU if on_gpu else FASTER} times faster where the original takes {MANY_OPS} or more operations, "
        f"else at most {FASTER} times slower{GPU_NOTE if on_gpu else ''}. Compilation, once for all façades and "
        f"shapes: {report['compile_s']:.1f} s.",
        "",
        "| façade | ops | " + " | ".join([*shapes, f"host, {tiny}"]) + " | error | goal |",
        "|---|---|" + "---|" * (len(shapes) + 3),
    ]
    for case in report["cases"]:
        cells = []
        for shape in [*shapes, tiny]:
            times = case["shapes"][shape]
            medians = f"{times['original']['median_us']:.0f} → {times['ours']['median_us']:.0f}"
            faster = [times["times_faster"], times.get("times_faster_than_compiled")]
            cells.append(f"{medians} ({', '.join(f'{one:.1f}' for one in faster if one is not None)})")
        done = all(reached(case, shape, report["device"]) for shape in shapes)
        lines.append(
            f"| {case['name']} | {case['ops_original']} → {case['ops']} | {' | '.join(cells)} | {case['error']:.0e} | "
            f"{'reached' if done else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON and the page")
    parser.add_argument("--quick", action="store_true", help="one shape and two walks: a look, not a measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    diffusers.utils.logging.set_verbosity_error()
    shapes, walks = (SHAPES[:1], 2) if options.quick else (SHAPES, 12)
    day = datetime.date.today().isoformat()
    # a cache of its own, so that compiling is measured and not finding what was compiled before
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        cases = [measure(case, shapes, walks, device) for case in CASES]
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.facade_step", *sys.argv[1:]]),
        "date": day,
        "device": device.type,
        "environment": environment(),
        "compile_s": sum(case["compile_s"] for case in cases),
        "cases": cases,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"facade-step_{device_name(device)}_{day}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
