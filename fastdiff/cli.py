"""The command line: parsing and calls. A command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastdiff.bulk_config import BulkConfig
from fastdiff.eval_config import EvalLikelihoodConfig, EvalSamplesConfig
from fastdiff.profile_config import FIGURES, ProfileSampleConfig, ProfileTrainConfig
from fastdiff.sample_config import SampleConfig
from fastdiff.train_config import TrainConfig

# Exit statuses; 2 is also what the parser uses.
FAILED, BAD_ARGUMENT, INTERRUPTED = 1, 2, 128 + signal.SIGINT


@dataclass(frozen=True, kw_only=True)
class Sample(SampleConfig):
    """Draw samples and save them as a picture."""

    json: bool = False
    """Print one JSON object instead of a sentence."""


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig):
    """Train a U-Net. The defaults make the packaged digits model."""


@dataclass(frozen=True, kw_only=True)
class ProfileSample(ProfileSampleConfig):
    """Profile the walk from noise to image."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ProfileTrain(ProfileTrainConfig):
    """Profile training steps; no checkpoint is written."""

    json: bool = False
    """Print one JSON object instead of a table."""
    # a run's outputs, of which there are none
    output: tyro.conf.Suppress[str] = ProfileTrainConfig.output
    log_every: tyro.conf.Suppress[int] = ProfileTrainConfig.log_every
    checkpoint_every: tyro.conf.Suppress[int] = ProfileTrainConfig.checkpoint_every
    sample_every: tyro.conf.Suppress[int] = ProfileTrainConfig.sample_every
    progress: tyro.conf.Suppress[bool] = ProfileTrainConfig.progress
    resume: tyro.conf.Suppress[bool] = ProfileTrainConfig.resume


@dataclass(frozen=True, kw_only=True)
class Generate(BulkConfig):
    """Draw many samples as files: restartable, and on several GPUs through torchrun."""

    json: bool = False
    """Print one JSON object instead of a sentence."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Show where the time of sampling or training goes."""

    what: (
        Annotated[ProfileSample, tyro.conf.subcommand("sample")]
        | Annotated[ProfileTrain, tyro.conf.subcommand("train")]
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointVerify:
    """Compare every file of a checkpoint, or of all those of a training run, with its recorded SHA-256."""

    directory: tyro.conf.Positional[Path]
    """A checkpoint, or the folder of a training run."""
    json: bool = False
    """Print one JSON object instead of lines."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInspect:
    """Show what a checkpoint holds: step, parameters, data, options."""

    directory: tyro.conf.Positional[Path]
    """A checkpoint, or the folder of a training run (its newest one)."""
    json: bool = False
    """Print one JSON object instead of lines."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Look at checkpoints without loading them."""

    what: (
        Annotated[CheckpointVerify, tyro.conf.subcommand("verify")]
        | Annotated[CheckpointInspect, tyro.conf.subcommand("inspect")]
    )


@dataclass(frozen=True, kw_only=True)
class EvalSamples(EvalSamplesConfig):
    """How near samples are to real images: FID, KID, precision and recall."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True, kw_only=True)
class EvalLikelihood(EvalLikelihoodConfig):
    """How well a model knows images: its variational bound in bits a dimension, and its loss by timestep."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure how good samples, or a model, are."""

    what: (
        Annotated[EvalSamples, tyro.conf.subcommand("samples")]
        | Annotated[EvalLikelihood, tyro.conf.subcommand("likelihood")]
    )


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare every kernel and every reference with float64 formulas, on this machine."""

    only: str | None = None
    """Run only the cases whose name holds this text."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Env:
    """Print versions and hardware, for a bug report."""

    json: bool = False
    """Print one JSON object."""


Command = Sample | Train | Generate | Eval | Profile | Checkpoint | Verify | Env
Parser = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Checkpoint, tyro.conf.subcommand("checkpoint")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Env, tyro.conf.subcommand("env")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for bad arguments, 130 after Ctrl-C, otherwise 1.

    arguments: without the program's name; None takes those of the process. An error is one sentence on stderr; with
    FASTDIFF_TRACEBACK=1 it is raised, to see where it comes from.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--"]:
        words = words[1:]  # after torchrun's own options; some versions of Python pass it on
    name = _command_name(words)
    try:
        command = _parse(words)
        return _run(command)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("FASTDIFF_TRACEBACK") == "1":
            raise
        return _report(name, error)


def _command_name(words: list[str]) -> str:
    inner = {"profile": ("sample", "train"), "checkpoint": ("verify", "inspect"), "eval": ("samples", "likelihood")}
    if words and words[0] in inner:
        return " ".join(words[:2] if words[1:2] and words[1] in inner[words[0]] else words[:1])
    return words[0] if words and words[0] in ("sample", "train", "generate", "verify", "env") else ""


def _parse(words: list[str]) -> Command:
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
            return tyro.cli(Parser, args=words, prog="fastdiff", config=flat)  # type: ignore[call-overload]
    except SystemExit as stop:
        if stop.code in (0, None):
            if words[:1] == ["profile"]:
                print(FIGURES)
            raise
        raise ValueError(_first_paragraph(captured.getvalue())) from None


def _first_paragraph(message: str) -> str:
    """The sentence in the parser's message: a title, the sentence, a rule, help; framed if the output is UTF-8."""
    lines = [line.strip(" │╭╮╰╯") for line in message.splitlines()[1:]]
    while lines and _is_rule(lines[0]):
        lines.pop(0)
    sentence = " ".join(itertools.takewhile(lambda line: not _is_rule(line), lines)).strip()
    # a dataclass that refuses its values is reported under the name of its class
    sentence = re.sub(r"^Error parsing ((Sample|Train|Generate|what): )?", "", sentence)
    return sentence.rstrip(".") or "the arguments could not be read"


def _is_rule(line: str) -> bool:
    return set(line) <= set("-─")


def _run(command: Command) -> int:
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
    from fastdiff.train import train

    print(f"checkpoints, log.jsonl, loss.png and samples go to {command.output}")
    result = train(TrainConfig(**{field.name: getattr(command, field.name) for field in fields(TrainConfig)}))
    if not result.completed:
        return INTERRUPTED
    print(result.describe())
    if result.superres is not None:
        print(result.superres.describe())
    inputs = "" if command.task == "generate" else " --input IMAGE ..."
    print(f"sample from it with: fastdiff sample --checkpoint {result.checkpoint}{inputs}")
    return 0


def _generate(command: Generate) -> int:
    from fastdiff.bulk import generate_many

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
        print(f"stopped; continue with: {config.command()} --resume")
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


def _report(name: str, error: Exception) -> int:
    """One sentence on stderr, and the exit status of the error."""
    message = " ".join(str(error).split()) or type(error).__name__
    bad_argument = isinstance(error, (ValueError, TypeError)) and type(error).__name__ != "CheckpointError"
    expected = bad_argument or isinstance(error, (OSError, ImportError, RuntimeError, ArithmeticError, ValueError))
    if not expected:
        message = f"{type(error).__name__}: {message} (FASTDIFF_TRACEBACK=1 shows where)"
    print(f"{' '.join(['fastdiff', name]).strip()}: error: {message}", file=sys.stderr)
    return BAD_ARGUMENT if bad_argument else FAILED
