"""One call that makes a diffusers pipeline with a U-Net fast, and one that takes it back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import fastdiff.compat.diffusers as facades
from fastdiff.compat.diffusers.captured_forward import CapturedForward
from fastdiff.compat.diffusers.fused import FusedScheduler
from fastdiff.compat.diffusers.fused_modules import fuse_norms, unfuse_norms
from fastdiff.compilation import COMPILE_CHOICES, CompiledOrEager, compile_options, compiled, repeated_blocks

VAES = ("vae", "vqvae", "movq")


class ReplacedForward:
    """Stands as `forward` on a module in place of `original`; its signature is the original's."""

    def __init__(self, original: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def accelerate(
    pipe: Any,
    *,
    scheduler: bool = True,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    fused_norm: bool = True,
    compile: bool | str = False,
    cuda_graph: bool = False,
    noise_seed: int | None = None,
) -> Any:
    """Make a diffusers pipeline fast, in place, and return it; the same seed gives the same images in float32.

    Args:
        pipe: any diffusers pipeline with a U-Net at `pipe.unet`.
        scheduler: put the fused counterpart in place of `pipe.scheduler`: a FastDDIMScheduler for a DDIMScheduler.
        dtype: of all of the pipeline's models; None leaves them as they are.
        channels_last: the layout of the U-Net's and the VAE's weights, and so of all they compute; False makes them
            contiguous.
        fused_norm: on a CUDA device, GroupNorm and SiLU of the U-Net and the VAE in one kernel, with the time embedding
            and the bias before them (`fused_modules.fuse_norms` says where). Elsewhere they run as they are.
        compile: True runs the U-Net through torch.compile, with static shapes; "max-autotune" also lets it time
            candidates of its kernels; "repeated_blocks" compiles only its transformer blocks, once for all that look
            alike (minutes less for a large model). The first image then waits for the compiler; without a working one
            the U-Net runs eagerly, with one warning.
        cuda_graph: replay the U-Net as a CUDA graph where it is on a CUDA device, one for each layout of its arguments.
            A graph follows changed inputs and replaced weights. Call `accelerate` again after other changes: adapter
            scales, FreeU, attention processors.
        noise_seed: draw the noise of steps from `fastdiff.noise` by this seed, the same on every device and in any
            batch (`use_noise_contract`). Give the pipeline its starting noise as `latents` then, and no generator.

    The last call decides: `accelerate(pipe)` ends the compilation that an earlier call began. `restore(pipe)` undoes
    all but `dtype`. Offloading (`pipe.enable_model_cpu_offload()`) comes after, as it wraps what is there. The U-Net
    stays the object it was, so that its config, `save_pretrained` and adapters work as before. `pipe.save_pretrained`
    records diffusers' own scheduler class: the saved pipeline loads with and without fastdiff, and is made fast by
    `accelerate` again.

    Raises:
        TypeError: pipe is no diffusers pipeline, or dtype no torch.dtype.
        ValueError: it has no U-Net; its scheduler has no fused counterpart (name another, or pass scheduler=False) or
            an option its counterpart cannot honour; compile names blocks that the U-Net does not have.
    """
    unet = _unet(pipe)
    if compile not in COMPILE_CHOICES:
        raise ValueError(f"compile must be one of {', '.join(map(repr, COMPILE_CHOICES))}, got {compile!r}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be None or a torch.dtype, got {dtype!r}")
    blocks = repeated_blocks(unet) if compile == "repeated_blocks" else []
    fast = _fast(pipe.scheduler) if scheduler else pipe.scheduler
    if noise_seed is not None and not isinstance(fast, FusedScheduler):
        raise ValueError(f"noise_seed needs a fused scheduler, got {type(fast).__name__}")
    if isinstance(fast, FusedScheduler) and (scheduler or noise_seed is not None):
        fast.use_noise_contract(noise_seed)
        _set_scheduler(pipe, fast)
    if dtype is not None:
        pipe.to(dtype)
    for model in _networks(pipe):
        set_layout(model, channels_last)
        unfuse_norms(model)
        if fused_norm:
            fuse_norms(model)

    _restore_forwards(unet)
    whole = forward = unet.forward
    device = next(unet.parameters()).device
    if compile in (True, "max-autotune"):
        whole = compiled(forward, compile)
    # One compiled function a class: blocks of the same shape share what was compiled, and fail together.
    kinds: set[Any] = set(map(type, blocks))
    functions = {kind: CompiledOrEager(kind.forward, **compile_options(device)) for kind in kinds}
    for block in blocks:
        if "forward" in vars(block):
            continue  # somebody's hook, which the class does not know
        block.forward = ReplacedForward(block.forward, functools.partial(functions[type(block)], block))
    if cuda_graph:
        whole = CapturedForward(unet, whole)
    if whole is not forward:
        unet.forward = ReplacedForward(forward, whole)
    return pipe


def restore(pipe: Any) -> Any:
    """Undo `accelerate`, in place: diffusers' own scheduler and modules, contiguous weights, the U-Net's own forward.

    Models stay in their present dtype. Raises TypeError or ValueError like `accelerate` where there is no U-Net.
    """
    unet = _unet(pipe)
    if isinstance(pipe.scheduler, FusedScheduler):
        pipe.scheduler = _original_class(pipe.scheduler).from_config(pipe.scheduler.config)
    for model in _networks(pipe):
        set_layout(model, channels_last=False)
        unfuse_norms(model)
    _restore_forwards(unet)
    return pipe


def _unet(pipe: Any) -> nn.Module:
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}")
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ValueError(f"pipe must have a U-Net at pipe.unet, got {type(pipe).__name__} without one")
    return unet


def _fast(scheduler: Any) -> FusedScheduler:
    """The scheduler itself if it is fused, else its fused counterpart."""
    if isinstance(scheduler, FusedScheduler):
        return scheduler
    name = f"Fast{type(scheduler).__name__}"
    known = [one for one in facades.__all__ if one.endswith("Scheduler")]
    if name not in known:
        raise ValueError(
            f"the scheduler {type(scheduler).__name__} has no fused counterpart: set pipe.scheduler to the original of"
            f" {', '.join(known)}, or pass scheduler=False"
        )
    return getattr(facades, name).from_config(scheduler.config)


def _original_class(scheduler: FusedScheduler) -> Any:
    return next(kind for kind in type(scheduler).__mro__ if kind.__module__.startswith("diffusers."))


def _set_scheduler(pipe: Any, scheduler: FusedScheduler) -> None:
    pipe.scheduler = scheduler
    # What model_index.json will name: a class that the loader finds without fastdiff too.
    pipe.register_to_config(scheduler=("diffusers", _original_class(scheduler).__name__))


def _networks(pipe: Any) -> list[nn.Module]:
    candidates = [pipe.unet, *(getattr(pipe, name, None) for name in VAES)]
    return [model for model in candidates if isinstance(model, nn.Module)]


def set_layout(model: nn.Module, channels_last: bool) -> None:
    """Give a model's conv weights channels-last strides, or contiguous ones."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    for weight in model.parameters():
        if weight.dim() in (4, 5):
            # By strides: a 1x1 conv's weight counts as contiguous in both formats, and then its output is NCHW
            # wherever its input is, which diffusers' transformer blocks make so.
            memory_format = formats.get(weight.dim(), torch.contiguous_format)
            laid_out = torch.empty_like(weight.data, memory_format=memory_format)
            if laid_out.stride() != weight.stride():
                weight.data = laid_out.copy_(weight.data)


def _restore_forwards(unet: nn.Module) -> None:
    for module in unet.modules():
        replaced = vars(module).get("forward")
        if isinstance(replaced, ReplacedForward):
            # what the instance had itself (a hook of an offloading library), or its class's method
            if getattr(replaced.original, "__func__", None) is type(module).forward:
                del module.forward
            else:
                module.forward = replaced.original
