"""Continuous batching against whole-batch serving, on one recorded trace of arrivals: python -m benchmarks.serving

Requests arrive at the times of a Poisson process (its gaps are drawn once, from a fixed seed, and scaled to a rate).
`Engine.step` admits them between any two steps; the whole-batch server takes, whenever it is free, the request that has
waited longest and all others of the same settings, and runs them to their end. Both run for real, one after the other
in turns; the clock is the time their work took, and jumps over idle gaps. For each server the highest rate is sought at
which the 95th percentile of the latency stays below a limit: so throughputs are compared at equal latency.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastdiff.checkpoint import Checkpoint, load_model
from fastdiff.engine import Engine
from fastdiff.engine_request import Request
from fastdiff.environment import environment
from fastdiff.generate import packaged_model
from fastdiff.sampler import Sampler

TRACE_SEED = 0
CAPACITY = 16
# how much longer than alone on an idle machine a request may take
LATENCY_FACTOR = 4.0
# the rate is found to one part in this many
RESOLUTION = 12


@dataclass(frozen=True)
class Settings:
    """What a request asks for."""

    solver: str
    num_inference_steps: int
    guidance_scale: float | None = None


MIXES: dict[str, tuple[Settings, ...]] = {
    "one setting": (Settings("dpmpp_2m", 15),),
    "mixed settings": (
        Settings("dpmpp_2m", 15),
        Settings("dpmpp_2m", 10, 1.5),
        Settings("ddim", 20),
        Settings("euler_a", 25, 2.0),
    ),
}


@dataclass(frozen=True)
class Arrival:
    """gap: to the arrival before, for one arrival a second on average."""

    gap: float
    settings: Settings
    label: int
    seed: int


# A server is called with arrivals and their times, and returns the latency of each.
Server = Callable[[Sequence[Arrival], Sequence[float]], list[float]]


def trace(mix: Sequence[Settings], count: int) -> list[Arrival]:
    """The same arrivals every time."""
    rng = np.random.default_rng(TRACE_SEED)
    gaps, kinds, labels = rng.exponential(size=count), rng.integers(len(mix), size=count), rng.integers(10, size=count)
    return [
        Arrival(float(gap), mix[kind], int(label), seed)
        for seed, (gap, kind, label) in enumerate(zip(gaps, kinds, labels))
    ]


def continuous(loaded: Checkpoint, shape: tuple[int, ...], device: torch.device) -> Server:
    """The engine."""
    engine = Engine(
        loaded.model,
        loaded.schedule,
        shape,
        prediction_type=loaded.prediction_type,
        batch_sizes=(1, 2, 4, 8, CAPACITY),
        device=device,
    )

    def serve(arrivals: Sequence[Arrival], times: Sequence[float]) -> list[float]:
        clock, coming, latencies, numbers = 0.0, 0, [0.0] * len(arrivals), {}
        while coming < len(arrivals) or engine.busy:
            if not engine.busy:
                clock = max(clock, times[coming])
            began = time.perf_counter()
            while coming < len(arrivals) and times[coming] <= clock:
                one = arrivals[coming]
                request = Request(
                    solver=one.settings.solver,
                    num_inference_steps=one.settings.num_inference_steps,
                    guidance_scale=one.settings.guidance_scale,
                    seed=one.seed,
                    model_kwargs={"class_labels": torch.tensor([one.label], device=device)},
                )
                numbers[engine.add(request)] = coming
                coming += 1
            finished = engine.step()
            _wait(device)
            clock += time.perf_counter() - began
            for id, _ in finished:
                latencies[numbers[id]] = clock - times[numbers[id]]
        return latencies

    return serve


def whole_batch(loaded: Checkpoint, shape: tuple[int, ...], device: torch.device) -> Server:
    """A sampler for each kind of settings, and batches of one kind."""
    samplers: dict[Settings, Sampler] = {}

    def serve(arrivals: Sequence[Arrival], times: Sequence[float]) -> list[float]:
        clock, coming, latencies = 0.0, 0, [0.0] * len(arrivals)
        waiting: list[int] = []
        while coming < len(arrivals) or waiting:
            if not waiting:
                clock = max(clock, times[coming])
            while coming < len(arrivals) and times[coming] <= clock:
                waiting.append(coming)
                coming += 1
            began = time.perf_counter()
            kind = arrivals[waiting[0]].settings
            # a guided sample takes two places in a model call, as in the engine
            places = CAPACITY // (1 if kind.guidance_scale is None else 2)
            batch = [index for index in waiting if arrivals[index].settings == kind][:places]
            waiting = [index for index in waiting if index not in batch]
            if kind not in samplers:
                samplers[kind] = Sampler(
                    loaded.model,
                    loaded.schedule,
                    solver=kind.solver,
                    num_inference_steps=kind.num_inference_steps,
                    prediction_type=loaded.prediction_type,
                    guidance_scale=kind.guidance_scale,
                    device=device,
                )
            samplers[kind].sample(
                (len(batch), *shape),
                seed=torch.tensor([arrivals[index].seed for index in batch], device=device),
                sample_indices=torch.zeros(len(batch), dtype=torch.int64, device=device),
                model_kwargs={"class_labels": torch.tensor([arrivals[index].label for index in batch], device=device)},
            )
            _wait(device)
            clock += time.perf_counter() - began
            for index in batch:
                latencies[index] = clock - times[index]
        return latencies

    return serve


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def p95(server: Server, arrivals: Sequence[Arrival], rate: float) -> float:
    """Seconds, at `rate` arrivals a second."""
    times = np.cumsum([one.gap / rate for one in arrivals])
    return float(np.percentile(server(arrivals, times.tolist()), 95))


def highest_rate(server: Server, arrivals: Sequence[Arrival], limit: float, start: float) -> tuple[float, float]:
    """(rate, its p95): the highest rate on a geometric grid at which p95 <= limit, by doubling and halving."""
    step = 1 + 1 / RESOLUTION
    low, low_p95, power = start, p95(server, arrivals, start), 1
    while low_p95 > limit:
        low /= 2
        low_p95 = p95(server, arrivals, low)
    high = low * 2
    while (found := p95(server, arrivals, high)) <= limit:
        low, low_p95, high, power = high, found, high * 2, power + 1
    while high / low > step:
        middle = (low * high) ** 0.5
        found = p95(server, arrivals, middle)
        if found <= limit:
            low, low_p95 = middle, found
        else:
            high = middle
    return low, low_p95


def compare(mix: Sequence[Settings], count: int, device: torch.device, rounds: int) -> dict:
    """Both servers on one trace: the medians over the rounds of the highest rates, and their ratio in each round."""
    loaded = load_model(packaged_model(), device=device)
    config = loaded.model.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    servers = {"continuous": continuous(loaded, shape, device), "whole batch": whole_batch(loaded, shape, device)}
    arrivals = trace(mix, count)
    alone = [whole_batch_latency(servers["whole batch"], one) for one in arrivals[:20]]
    limit = LATENCY_FACTOR * statistics.median(alone)
    result: dict = {"alone_s": statistics.median(alone), "limit_s": limit, "requests": count, "rounds": []}
    for _ in range(rounds):
        figures = {}
        for name, server in servers.items():
            rate, reached = highest_rate(server, arrivals, limit, 1 / statistics.median(alone))
            figures[name] = {"requests_per_s": rate, "p95_s": reached}
        figures["ratio"] = figures["continuous"]["requests_per_s"] / figures["whole batch"]["requests_per_s"]
        result["rounds"].append(figures)
    result["ratio"] = statistics.median(figures["ratio"] for figures in result["rounds"])
    return result


def whole_batch_latency(server: Server, one: Arrival) -> float:
    """Of a request that comes alone; the second time, with everything built."""
    return [server([one], [0.0])[0] for _ in range(2)][-1]


def page(report: dict) -> str:
    """Markdown."""
    torch_version = report["environment"]["torch"]
    lines = [
        "# Continuous batching against whole-batch serving",
        "",
        f"`{report['command']}`, {report['date']}, torch {torch_version}, {report['device']}. "
        f"The packaged digits model; {CAPACITY} places; the limit: {LATENCY_FACTOR:g} times what a lone request takes.",
        "",
        "| trace | limit for p95 | continuous, requests/s | whole batch, requests/s | ratio (all rounds) |",
        "|---|---|---|---|---|",
    ]
    for name, mix in report["mixes"].items():
        engine, batches = (
            statistics.median(figures[server]["requests_per_s"] for figures in mix["rounds"])
            for server in ("continuous", "whole batch")
        )
        ratios = ", ".join(f"{figures['ratio']:.2f}" for figures in mix["rounds"])
        limit = f"{1000 * mix['limit_s']:.0f} ms"
        lines.append(f"| {name} | {limit} | {engine:.0f} | {batches:.0f} | **{mix['ratio']:.2f}** ({ratios}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the page")
    parser.add_argument("--requests", type=int, default=120, help="arrivals of a trace")
    parser.add_argument("--rounds", type=int, default=2, help="how often everything is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    day = datetime.date.today().isoformat()
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "date": day,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "environment": environment(),
        "mixes": {name: compare(mix, options.requests, device, options.rounds) for name, mix in MIXES.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    where = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).split()[-1].lower()
    path = options.out / f"serving_{where}_{day}"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
