"""What each command does: it imports what it needs when it runs, calls it, and prints the result."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import fields
from typing import Any

from fastdiff.bulk_config import BulkConfig
from fastdiff.cli_commands import (
    Checkpoint,
    CheckpointInspect,
    CheckpointVerify,
    Command,
    Env,
    Eval,
    EvalLikelihood,
    EvalSamples,
    Generate,
    Profile,
    ProfileSample,
    ProfileTrain,
    Sample,
    Train,
    Verify,
)
from fastdiff.sample_config import SampleConfig
from fastdiff.train_config import TrainConfig

# Exit statuses.
FAILED, INTERRUPTED = 1, 128 + signal.SIGINT


def run(command: Command) -> int:
    """Do what the command says, print what came of it, and return the exit status."""
    if isinstance(command, Sample):
        return _sample(command)
    if isinstance(command, Train):
        return _train(command)
    if isinstance(command, Generate):
        return _generate(command)
    if isinstance(command, Eval):
        return _eval(command.what)
    if isinstance(command, Profile):
        return _profile(command.what)
    if isinstance(command, Checkpoint):
        return _checkpoint(command.what)
    if isinstance(command, Verify):
        return _verify(command)
    return _env(command)


def _sample(command: Sample) -> int:
    from fastdiff.generate import generate

    config = SampleConfig(**{field.name: getattr(command, field.name) for field in fields(SampleConfig)})
    drawn = generate(config, progress=sys.stderr.isatty() and not command.json)
    if command.json:
        _print_json(
            images=len(drawn.images),
            shape=list(drawn.images.shape),
            labels=None if drawn.labels is None else drawn.labels.tolist(),
            seconds=drawn.seconds,
            images_per_second=drawn.images_per_second,
            solver=config.solver,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=drawn.guidance_scale,
            seed=config.seed,
            device=drawn.device,
            dtype=config.dtype,
            checkpoint=str(drawn.checkpoint),
            files=[str(path) for path in drawn.files],
        )
    else:
        print(
            f"{len(drawn.images)} samples in {drawn.seconds:.2f} s, {drawn.images_per_second:.1f} images/s "
            f"({config.solver}, {config.num_inference_steps} steps, {drawn.device}): {', '.join(map(str, drawn.files))}"
        )
    return 0


def _train(command: Train) -> int:
    from fastdiff.processes import Processes
    from fastdiff.train import train

    first = Processes.of_environment().first
    if first:
        print(f"checkpoints, log.jsonl, loss.png and samples go to {command.output}")
    result = train(TrainConfig(**{field.name: getattr(command, field.name) for field in fields(TrainConfig)}))
    if not result.completed:
        return INTERRUPTED
    if not first:
        return 0
    print(result.describe())
    if result.superres is not None:
        print(result.superres.describe())
    inputs = "" if command.task == "generate" else " --input IMAGE ..."
    print(f"sample from it with: fastdiff sample --checkpoint {result.checkpoint}{inputs}")
    return 0


def _generate(command: Generate) -> int:
    from fastdiff.bulk import generate_many
    from fastdiff.processes import launch_command

    config = BulkConfig(**{field.name: getattr(command, field.name) for field in fields(BulkConfig)})
    done = generate_many(config, progress=sys.stderr.isatty() and not command.json)
    if command.json:
        _print_json(
            drawn=done.drawn,
            seconds=done.seconds,
            completed=done.completed,
            out=str(done.out),
            rank=int(os.environ.get("RANK", 0)),
        )
    elif done.completed:
        print(f"{done.drawn} samples in {done.seconds:.1f} s by this process; {config.num} are in {done.out}")
    else:
        print(f"stopped; continue with: {launch_command(config.command())} --resume")
    return 0 if done.completed else INTERRUPTED


def _eval(command: EvalSamples | EvalLikelihood) -> int:
    progress = sys.stderr.isatty() and not command.json
    report: Any
    if isinstance(command, EvalSamples):
        from fastdiff.evaluate import evaluate_samples

        report = evaluate_samples(command, progress=progress)
    else:
        from fastdiff.likelihood import evaluate_likelihood

        report = evaluate_likelihood(command, progress=progress)
    if command.json:
        _print_json(**report.to_dict())
    else:
        print(report.describe())
    return 0


def _profile(command: ProfileSample | ProfileTrain) -> int:
    from fastdiff.profile_run import profile_sampling, profile_training

    report = profile_sampling(command) if isinstance(command, ProfileSample) else profile_training(command)
    if command.json:
        _print_json(**report.to_dict())
    else:
        print(report.describe())
        print(f"\ntrace for https://ui.perfetto.dev, profile.json and profile.md are in {command.out}")
    return 0


def _checkpoint(command: CheckpointVerify | CheckpointInspect) -> int:
    from fastdiff.checkpoint_report import describe, inspect, verify_all

    if isinstance(command, CheckpointInspect):
        from fastdiff.generate import find_checkpoint

        content = inspect(find_checkpoint(command.directory))
        if command.json:
            _print_json(**content)
        else:
            print(describe(content))
        return 0
    reports = verify_all(command.directory)
    if command.json:
        _print_json(checkpoints={str(report.path): report.damage for report in reports})
    else:
        print("\n".join(report.describe() for report in reports))
    return 0 if all(report.damage is None for report in reports) else FAILED


def _verify(command: Verify) -> int:
    import torch

    if not torch.cuda.is_available():
        # read when Triton is imported, which importing torch alone does not do
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from fastdiff.verify import verify

    report = verify(only=command.only)
    if command.json:
        _print_json(**report.to_dict())
    else:
        print(report.describe())
    return 0 if report.ok else FAILED


def _env(command: Env) -> int:
    from fastdiff.environment import describe, environment

    report = environment()
    if command.json:
        _print_json(**report)
    else:
        print(describe(report))
    return 0


def _print_json(**values: Any) -> None:
    print(json.dumps(values, indent=2))
