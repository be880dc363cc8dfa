"""Who is compared: the textbook in PyTorch, diffusers, and the engine, with the same weights on the same inputs.

A contender makes two calls for a task: `forward`, one evaluation of the U-Net, and `walk`, a whole sampling. Making a
call builds the model; the first run of the call compiles, captures and lets cuDNN choose, and is no part of its time.
"""

from __future__ import annotations

import contextlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.numerics import BFLOAT16, BFLOAT16_STATE, FLOAT32, TF32, Numerics
from benchmarks.suite import Skip
from benchmarks.workloads import NUM_TRAIN_TIMESTEPS, Workload, reference_walk, schedule, timesteps
from fastdiff.compilation import compiled
from fastdiff.cuda_graph import capture
from fastdiff.kernels.group_norm import group_norm_silu_ref
from fastdiff.reference_unet import ReferenceUNet
from fastdiff.sampler import Sampler
from fastdiff.unet import UNet

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A workload on a device. weights: float32, on the CPU. noise: float32 [B, C, H, W], on the device."""

    workload: Workload
    device: torch.device
    weights: dict[str, Tensor]
    noise: Tensor

    @property
    def timesteps(self) -> Tensor:
        """[B] int64, spread over the schedule: what one evaluation is conditioned by."""
        return torch.linspace(0, NUM_TRAIN_TIMESTEPS - 1, self.workload.batch, device=self.device).long()


@dataclass(frozen=True, kw_only=True)
class Contender(ABC):
    """One way to run a U-Net.

    Attributes:
        name: of [a-z0-9.-], the last part of a row's key. title: what a table calls it.
        numerics: its arithmetic; both its calls are made and run with `numerics.installed()`.
        compiling: how long its first call takes, as a multiple of compiling the model in the default mode.
    """

    name: str
    title: str
    numerics: Numerics
    compiling: float = 0.0

    @abstractmethod
    def forward(self, task: Task) -> Call:
        """One evaluation of the model at the task's noise and timesteps. Raises Skip where a package is missing."""

    @abstractmethod
    def walk(self, task: Task) -> Call:
        """A whole sampling from the task's noise. Raises Skip where a package is missing."""


@dataclass(frozen=True, kw_only=True)
class Textbook(Contender):
    """ReferenceUNet and the loop of fastdiff.reference, NCHW, as one writes them down; compiled where it compiles."""

    def _model(self, task: Task) -> Callable[..., Tensor]:
        model = ReferenceUNet(task.workload.config)
        model.load_state_dict(task.weights)
        model.to(task.device, self.numerics.dtype).eval()
        return torch.compile(model, dynamic=False) if self.compiling else model

    def forward(self, task: Task) -> Call:
        model, x, t = self._model(task), task.noise.to(self.numerics.dtype), task.timesteps
        return lambda: model(x, t)

    def walk(self, task: Task) -> Call:
        model, start, dtype = self._model(task), task.noise.to(self.numerics.state_dtype), self.numerics.dtype

        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            return model(x.to(dtype), t).to(x.dtype)

        return lambda: reference_walk(evaluate, start, task.workload.num_steps)


@dataclass(frozen=True, kw_only=True)
class Diffusers(Contender):
    """UNet2DModel with its DDIMScheduler, in the loop of a pipeline without what makes the host wait.

    The U-Net reads its timesteps from the device and the scheduler's step gets them as integers: DDIMPipeline hands the
    device's to both, and the step then waits for them. mode: of torch.compile, fullgraph; None: eager.
    """

    mode: str | None = None
    channels_last: bool = False

    def _model(self, task: Task) -> nn.Module:
        require("diffusers")
        import diffusers

        from fastdiff.compat.diffusers.unet import to_diffusers_unet

        # a notice of casting at each model
        diffusers.utils.logging.set_verbosity_error()
        ours = UNet(task.workload.config).eval()
        ours.load_state_dict(task.weights)
        model: Any = to_diffusers_unet(ours).to(task.device, self.numerics.dtype)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if hasattr(model, "fuse_qkv_projections"):
            model.fuse_qkv_projections()
        return model

    def _compiled(self, model: nn.Module) -> Callable[..., tuple[Tensor]]:
        return model if self.mode is None else torch.compile(model, mode=self.mode, fullgraph=True)

    def _input(self, task: Task, dtype: torch.dtype) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return task.noise.to(dtype, memory_format=layout)

    def forward(self, task: Task) -> Call:
        model = self._compiled(self._model(task))
        x, t = self._input(task, self.numerics.dtype), task.timesteps
        return lambda: model(x, t, return_dict=False)[0]

    def walk(self, task: Task) -> Call:
        model = self._compiled(self._model(task))
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS, timestep_spacing="trailing", clip_sample=False
        )
        scheduler.set_timesteps(task.workload.num_steps)
        host = timesteps(task.workload.num_steps)
        assert scheduler.timesteps.tolist() == host
        # [B] each, as `forward` has them: the same compiled code
        device = scheduler.timesteps[:, None].repeat(1, task.workload.batch).to(task.device).unbind()
        start, dtype = self._input(task, self.numerics.state_dtype), self.numerics.dtype

        def walk() -> Tensor:
            x = start
            for t, t_device in zip(host, device):
                output = model(x.to(dtype), t_device, return_dict=False)[0]
                x = scheduler.step(output, t, x, return_dict=False)[0]
            return x

        return walk


@dataclass(frozen=True, kw_only=True)
class Engine(Contender):
    """fastdiff's UNet and Sampler; compiled where it compiles.

    graph: on a GPU, replay what can be captured. fused_norm: False runs GroupNorm and SiLU as plain PyTorch. mode: as
    the Sampler's `compile` has it.
    """

    mode: bool | str = True
    graph: bool = True
    fused_norm: bool = True

    def _model(self, task: Task) -> UNet:
        model = UNet(task.workload.config).eval()
        model.load_state_dict(task.weights)
        return model.to(task.device, self.numerics.dtype)

    def forward(self, task: Task) -> Call:
        model = self._model(task)
        network = compiled(model, self.mode) if self.compiling else model
        x = task.noise.to(self.numerics.dtype, memory_format=torch.channels_last)
        t = task.timesteps
        if not self.graph or task.device.type != "cuda":
            return self._under_norm(lambda: network(x, t))
        held: list[Tensor] = []
        replays: list[Callable[[], None]] = []

        def step() -> None:
            held[:] = [network(x, t)]

        def forward() -> Tensor:
            if not replays:
                replays.append(capture(step, lambda: None, task.device, None)[0])
            replays[0]()
            return held[0]

        return self._under_norm(forward)

    def walk(self, task: Task) -> Call:
        sampler = Sampler(
            self._model(task),
            schedule(),
            solver="ddim",
            num_inference_steps=task.workload.num_steps,
            compile=self.mode if self.compiling else False,
            cuda_graph="auto" if self.graph else False,
        )
        shape, noise = task.workload.shape, task.noise
        return self._under_norm(lambda: sampler.sample(shape, noise=noise))

    def _under_norm(self, call: Call) -> Call:
        if self.fused_norm:
            return call

        def run() -> Tensor:
            with self._norm():
                return call()

        return run

    @contextlib.contextmanager
    def _norm(self) -> Iterator[None]:
        """What the U-Net calls for its norms, while this one's calls run."""
        if self.fused_norm:
            yield
        else:
            with mock.patch("fastdiff.unet_blocks.group_norm_silu", group_norm_silu_ref):
                yield


def require(package: str) -> None:
    """Raise Skip where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skip(f"{package} is not installed")


def contenders(device: torch.device) -> list[Contender]:
    """All of them on this kind of device, in the order of priority; what compiles for minutes comes last."""
    if device.type != "cuda":
        return [
            Engine(name="fastdiff", title="fastdiff", numerics=FLOAT32, compiling=1),
            Textbook(name="textbook-fp32", title="textbook, eager", numerics=FLOAT32),
            Diffusers(name="diffusers", title="diffusers, eager", numerics=FLOAT32),
            Diffusers(
                name="diffusers-best",
                title="diffusers, channels-last, compiled",
                numerics=FLOAT32,
                compiling=1,
                mode="default",
                channels_last=True,
            ),
            Textbook(name="textbook-compiled", title="textbook, compiled", numerics=FLOAT32, compiling=1),
        ]
    return [
        Engine(name="fastdiff", title="fastdiff, bf16", numerics=BFLOAT16, compiling=1),
        Textbook(name="textbook-fp32", title="textbook, eager fp32", numerics=FLOAT32),
        Diffusers(
            name="diffusers-reduce-overhead",
            title="diffusers, bf16, channels-last, compiled (reduce-overhead), CUDA graphs",
            numerics=BFLOAT16_STATE,
            compiling=1,
            mode="reduce-overhead",
            channels_last=True,
        ),
        Diffusers(name="diffusers", title="diffusers, eager fp32", numerics=FLOAT32),
        Textbook(name="textbook-bf16", title="textbook, eager bf16", numerics=BFLOAT16),
        Textbook(name="textbook-tf32", title="textbook, eager fp32 with TF32", numerics=TF32),
        Textbook(name="textbook-compiled", title="textbook, compiled bf16", numerics=BFLOAT16, compiling=1),
        Diffusers(
            name="diffusers-best",
            title="diffusers, bf16, channels-last, compiled (max-autotune), CUDA graphs",
            numerics=BFLOAT16_STATE,
            compiling=4,
            mode="max-autotune",
            channels_last=True,
        ),
    ]
