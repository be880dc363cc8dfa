"""The commands as dataclasses: their fields are the options, the docstrings the help texts. torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastdiff.bulk_config import BulkConfig
from fastdiff.eval_config import EvalLikelihoodConfig, EvalSamplesConfig
from fastdiff.profile_config import ProfileSampleConfig, ProfileTrainConfig
from fastdiff.sample_config import SampleConfig
from fastdiff.train_config import TrainConfig


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
