"""The sampler: what a caller gives is checked and laid out, then the rows of a step table run one by one.

The loop knows no solver and waits for the device nowhere; `fastdiff.trajectory` has the step it repeats, and
`fastdiff.cuda_graph` keeps that step captured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import solvers
from fastdiff.compilation import COMPILE_CHOICES, compiled
from fastdiff.cuda_graph import GraphCache
from fastdiff.device import existing_device
from fastdiff.kernels.layout import empty
from fastdiff.kernels.philox import per_sample, sample_index
from fastdiff.latent import LatentSpace, mask_like
from fastdiff.model_arguments import is_plain, model_inputs, tensors_of, without_tensors
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import StepTable
from fastdiff.trajectory import ConditionFunction, PackedTable, Stepper, Trajectory

# tables of different strengths a sampler keeps
MAX_TABLES = 8

Callback = Callable[["Sampler", int, float, dict[str, Tensor]], "Mapping[str, Tensor] | None"]


class Sampler:
    """Draws samples from a diffusion model with any solver, on any device.

    Args:
        model: called as model(x, t, **model_kwargs) with x [B, C, *spatial] and t [B], int64 if all the table's
            timesteps are whole numbers, else float32; returns a tensor like x (or [B, 2C, *spatial], learned variance)
            or an object that holds it as `.sample`. It is never altered: put it in eval mode yourself. Pass an
            nn.Module itself rather than a function around it where its weights may be moved or cast between calls:
            captured graphs read them where they were, and only a module's own can be watched.
        schedule: the noise schedule the model was trained with.
        solver: a name (`fastdiff.solvers.names()`) or a finished StepTable.
        solver_options: keyword arguments of the solver, for example {"eta": 1.0} for ddim, and further ones of
            `fastdiff.solvers.build`, for example {"final_sigmas_type": "sigma_min"}.
        num_inference_steps: 1 .. schedule.num_train_timesteps; not with a StepTable.
        prediction_type: "epsilon", "sample", "v_prediction", "flow_prediction" or "edm".
        timestep_spacing: "trailing", "leading" or "linspace".
        sigma_spacing: None (follow the timesteps), "karras", "exponential", "beta" or "logsnr".
        clip_sample: clip the predicted x0 to [-clip_sample, clip_sample]; None does not clip.
        dynamic_threshold: quantile in (0, 1) of |x0| that a sample is clipped to and divided by (Saharia et al. 2022).
        guidance_scale: classifier-free guidance m_u + guidance_scale * (m_c - m_u) (Ho & Salimans 2022); None: none.
        guidance_interval: (start, end), the part of the walk that is guided (`fastdiff.solvers.build`).
        guidance_rescale: in [0, 1], how much of the guided output's standard deviation is set to that of the
            conditional one (Lin et al. 2024, section 3.4).
        vae: for latent diffusion, a `fastdiff.latent.LatentSpace` or any object with encode and decode: `sample` then
            takes and returns images, and its shape is that of the latents.
        dtype: None runs the model in its own dtype, another one means autocast.
        device: where to sample; by default that of the noise, else of the model's first parameter, else of the first
            tensor in model_kwargs, else the CPU.
        compile: True runs the model through torch.compile with static shapes; "max-autotune" also lets it time its
            candidates for matrix products, convolutions and pointwise kernels (minutes; other processes may choose
            others, so that the last bits of images may differ between them); "repeated_blocks" compiles only the blocks
            that a large model repeats, in a fraction of the time, of the modules as they are now: weights may change
            later, swapping modules in or out needs a new Sampler. `compile_seconds` tells what the compiler took.
        cuda_graph: replay each row as a captured CUDA graph: "auto" (on CUDA), True (an error elsewhere) or False.
        micro_batch_size: the largest batch the model is called with, guided halves counted; None: any. For batches
            whose activations exceed the memory, or the cache. A divisor of the batch compiles one shape only.

    A sampler keeps no state between calls but captured graphs, guarded by locks: several threads may use it.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or the combination that is impossible.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        *,
        solver: str | StepTable,
        solver_options: Mapping[str, Any] | None = None,
        num_inference_steps: int | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "trailing",
        sigma_spacing: str | None = None,
        clip_sample: float | None = None,
        dynamic_threshold: float | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        vae: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compile: bool | str = False,
        cuda_graph: bool | str = "auto",
        micro_batch_size: int | None = None,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        if not isinstance(solver, (str, StepTable)):
            raise TypeError(f"solver must be a name or a StepTable, got {type(solver).__name__}")
        if dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype must be None, float32, float16, bfloat16 or float64, got {dtype}")
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **model_kwargs), got {type(model).__name__}")
        if cuda_graph not in (True, False, "auto"):
            raise ValueError(f'cuda_graph must be True, False or "auto", got {cuda_graph!r}')
        if compile not in COMPILE_CHOICES:
            raise ValueError(f"compile must be one of {', '.join(map(repr, COMPILE_CHOICES))}, got {compile!r}")
        if micro_batch_size is not None and (type(micro_batch_size) is not int or micro_batch_size < 1):
            raise ValueError(f"micro_batch_size must be None or an integer of at least 1, got {micro_batch_size!r}")
        if dynamic_threshold is not None and not 0 < dynamic_threshold < 1:
            raise ValueError(f"dynamic_threshold must be a quantile in (0, 1), got {dynamic_threshold}")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
        if isinstance(solver, StepTable):
            if num_inference_steps is not None or solver_options:
                raise ValueError("num_inference_steps and solver_options go with a solver's name, not with a StepTable")
            self._build = None
            self.table = solver
        else:
            if num_inference_steps is None:
                raise ValueError(f"num_inference_steps is needed with solver {solver!r}")
            if guidance_rescale and guidance_scale is None:
                raise ValueError(f"guidance_rescale={guidance_rescale} needs a guidance_scale")
            steps, options = num_inference_steps, dict(solver_options or {})

            @functools.lru_cache(maxsize=MAX_TABLES)
            def build(strength: float, inpaint: bool = False) -> StepTable:
                return solvers.build(
                    solver,
                    schedule,
                    steps,
                    prediction_type=prediction_type,
                    timestep_spacing=timestep_spacing,
                    sigma_spacing=sigma_spacing,
                    clip_sample=clip_sample,
                    guidance_scale=guidance_scale,
                    guidance_interval=guidance_interval,
                    strength=strength,
                    **(options | {"inpaint": True} if inpaint else options),
                )

            self._build = build
            self.table = build(1.0, False)
        self.model = model
        self.schedule = schedule
        self.dynamic_threshold = dynamic_threshold
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.prediction_type = prediction_type
        self.latent_space = vae if vae is None or isinstance(vae, LatentSpace) else LatentSpace(vae)
        self.dtype = dtype
        self.device = None if device is None else existing_device(device)
        self.cuda_graph = cuda_graph
        self.micro_batch_size = micro_batch_size
        self._call_model = model if compile is False else compiled(model, compile)
        self._packed = functools.lru_cache(maxsize=MAX_TABLES)(PackedTable.of)
        self._graphs: GraphCache[Trajectory] = GraphCache()
        parameters = getattr(model, "parameters", None)
        first = next(iter(parameters()), None) if parameters else None
        self._own_dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
        if dtype == torch.float32 and self._own_dtype != dtype:
            raise ValueError(
                f"dtype float32 is no autocast of a {self._own_dtype} model: convert the model with .float()"
            )

    @property
    def compile_seconds(self) -> float:
        """What the calls that compiled took so far, each with one run of the model; 0 without `compile`."""
        return getattr(self._call_model, "compile_seconds", 0.0)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        *,
        seed: int | Tensor = 0,
        sample_indices: Tensor | None = None,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        init_image: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        cond_fn: ConditionFunction | None = None,
        callback_on_step_end: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Run the table once.

        Args:
            shape: [B, C, *spatial] of the result.
            seed: int in [0, 2^63), or int64 [B].
            sample_indices: int64 [B], the samples' numbers in the noise contract; 0..B-1 by default. A sample's noise
                depends on its own seed and number, not on the batch it is drawn in.
            noise: unit-variance initial noise of the shape instead of the seed's; step noise still comes from the seed.
            model_kwargs: passed to the model, tensors (also inside dicts, lists and tuples) on the sampling device. For
                guidance, tensors whose first axis is B are joined with those at the same place in uncond_kwargs;
                everything else is passed once.
            uncond_kwargs: the unconditional model_kwargs; for a model with a `null_class` it defaults to that class.
            init_image: [B, C, *spatial] in the model's range: start from it, noised, `strength` of the way up the walk
                (Meng et al. 2022). For "ddim_inverse" it is the image to invert.
            strength: (0, 1], with init_image.
            mask, known: in-painting: where mask is 1, the samples keep `known`. The rows of "repaint" do it with jumps,
                those of any other solver by a simple blend (`inpaint` of `fastdiff.solvers.build`).
            cond_fn: called as cond_fn(x, t, **model_kwargs) with what the model gets, in float32, returns the gradient
                of log p(condition | x) like x: classifier guidance (Dhariwal and Nichol 2021). Not with "edm" models,
                whose input is not x. It differentiates under its own torch.enable_grad(); steps are not captured.
            callback_on_step_end: called as callback(sampler, i, t, {"latents": x}) after row i; may return a mapping
                whose "latents" replace x.
            progress: show a progress bar.

        Returns:
            float32 tensor of the shape, channels-last; with a vae the images it decodes to.

        Raises:
            ValueError, TypeError: naming the argument, what was received and what is accepted.
        """
        model_kwargs, uncond_kwargs = dict(model_kwargs or {}), dict(uncond_kwargs or {})
        shape = tuple(shape)
        if len(shape) < 2 or any(size < 0 for size in shape):
            raise ValueError(f"shape must be [B, C, *spatial] with sizes >= 0, got {list(shape)}")
        device = self._device(noise, model_kwargs)
        table = self._table(init_image is not None, strength, mask is not None)
        if cond_fn is not None and self.prediction_type == "edm":
            raise ValueError('cond_fn needs a model whose input is x, prediction_type "edm" scales it')
        if self.latent_space is not None:
            init_image, known, mask = _encoded(self.latent_space, shape, device, init_image, known, mask)
        inputs = model_inputs(
            self.model,
            shape[0],
            device,
            model_kwargs,
            uncond_kwargs,
            guided=table.guided,
            has_scale=self.guidance_scale is not None,
        )
        arguments = without_tensors(model_kwargs)
        inputs["seed"] = per_sample(seed, shape[0], device, "seed")
        inputs["sample_indices"] = sample_index(sample_indices, shape[0], device)
        for name, value in (("noise", noise), ("init_image", init_image), ("mask", mask), ("known", known)):
            if value is not None:
                inputs[name] = _like(value, shape, device, name, exact=name != "mask")
        if table.start[1] == 0 and init_image is None and noise is None:
            raise ValueError("init_image is needed: the walk of this solver starts from data, not from noise")
        if (mask is None) != (known is None):
            raise ValueError("mask and known go together: one of them is missing")
        if mask is not None and not table.keeps_known:
            raise ValueError("mask needs an in-painting table: the rows of this one have no k0 or kz")

        if math.prod(shape) == 0:
            return self._decoded(empty(shape, torch.float32, device, channels_last=True))
        stepper = Stepper(
            table=table,
            packed=self._packed(table, device),
            device=device,
            model=self._call_model,
            model_dtype=self._own_dtype,
            autocast_dtype=None if self.dtype == self._own_dtype else self.dtype,
            dynamic_threshold=self.dynamic_threshold,
            guidance_rescale=self.guidance_rescale,
            cond_fn=cond_fn,
            arguments=arguments,
            time_modulation=_time_modulation(self.model),
            modulation_channels=getattr(self.model, "modulation_channels", 0),
            micro_batch_size=self.micro_batch_size,
        )
        # a graph bakes in what is no tensor: two calls must be told apart by it
        if not self._captures(device) or cond_fn is not None or not is_plain(arguments):
            trajectory = stepper.allocate(shape, inputs)
            stepper.start(trajectory)
            steps = stepper.steps(trajectory)
            return self._decoded(self._loop(stepper, trajectory, steps, callback_on_step_end, progress))
        entry = self._graphs.entry(self._graph_key(table, shape, device, inputs, arguments))
        with entry.lock:
            if entry.buffers is None:
                static = {name: value.clone() for name, value in inputs.items()}
                trajectory = stepper.allocate(shape, static)
                entry.prepare(trajectory, stepper.steps(trajectory), lambda: stepper.start(trajectory), device)
            assert entry.buffers is not None
            trajectory = entry.buffers
            for name, value in inputs.items():
                trajectory.inputs[name].copy_(value)
            stepper.start(trajectory)
            # the next call overwrites the buffers
            x = self._loop(stepper, trajectory, entry.steps, callback_on_step_end, progress).clone()
        return self._decoded(x)

    def _loop(
        self,
        stepper: Stepper,
        trajectory: Trajectory,
        steps: Mapping[Hashable, Callable[[], None]],
        callback: Callback | None,
        progress: bool,
    ) -> Tensor:
        table, kinds = stepper.table, stepper.kinds
        for i in tqdm(range(len(table)), disable=not progress, desc="sampling", unit="row"):
            steps[kinds[i]]()
            if callback is not None:
                returned = callback(self, i, float(table.columns["t"][i]), {"latents": trajectory.x})
                latents = trajectory.x if returned is None else returned.get("latents", trajectory.x)
                if latents is not trajectory.x:
                    if latents.shape != trajectory.x.shape:
                        raise ValueError(
                            f"callback_on_step_end must return latents of shape {list(trajectory.x.shape)}, "
                            f"got {list(latents.shape)}"
                        )
                    trajectory.x.copy_(latents)
                # it may have changed them in place as well
                stepper.write_model_input(trajectory, i + 1)
        return trajectory.x

    def _captures(self, device: torch.device) -> bool:
        if self.cuda_graph == "auto":
            return device.type == "cuda"
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device, got {device}")
        return bool(self.cuda_graph)

    def _device(self, noise: Tensor | None, model_kwargs: Mapping[str, Any]) -> torch.device:
        if self.device is not None:
            return self.device
        if isinstance(noise, Tensor):
            return noise.device
        parameters = getattr(self.model, "parameters", None)
        tensors = [] if parameters is None else [next(iter(parameters()), None)]
        tensors += tensors_of(model_kwargs).values()
        return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))

    def _table(self, from_image: bool, strength: float, inpaint: bool) -> StepTable:
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        if not from_image and strength != 1:
            raise ValueError(f"strength {strength} needs init_image")
        inpaint = inpaint and not self.table.keeps_known
        if self._build is None:
            if from_image:
                raise ValueError("init_image needs a solver's name: a finished StepTable has a fixed start")
            return self.table
        return self._build(strength, inpaint)

    def _decoded(self, x: Tensor) -> Tensor:
        return x if self.latent_space is None else self.latent_space.decode(x)

    def _graph_key(
        self,
        table: StepTable,
        shape: tuple[int, ...],
        device: torch.device,
        inputs: Mapping[str, Tensor],
        arguments: Any,
    ) -> Hashable:
        """All that a captured step has baked in: layouts, constants, modes, and where the model's weights lie."""
        weights: list[Tensor] = []
        hooks: list[int] = []
        if isinstance(self.model, torch.nn.Module):
            weights = [*self.model.parameters(), *self.model.buffers()]
            hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self.model.modules()]
        return (
            table,
            shape,
            device,
            tuple((name, value.shape, value.stride(), value.dtype) for name, value in sorted(inputs.items())),
            repr(arguments),
            getattr(self.model, "training", None),
            tuple((weight.data_ptr(), weight.dtype) for weight in weights),
            tuple(hooks),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        )


def _time_modulation(model: Any) -> Callable[..., Tensor] | None:
    """The model's method of this name, where it says that it may be called."""
    return model.time_modulation if getattr(model, "precomputes", False) is True else None


def _encoded(
    latent_space: LatentSpace,
    shape: tuple[int, ...],
    device: torch.device,
    init_image: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A caller's images as latents, and the mask at their resolution."""
    for name, value in {"init_image": init_image, "known": known, "mask": mask}.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    init_image, known = (
        None if value is None else latent_space.encode(value.to(device)) for value in (init_image, known)
    )
    return init_image, known, None if mask is None else mask_like(mask.to(device), shape)


def _like(value: Tensor, shape: tuple[int, ...], device: torch.device, name: str, *, exact: bool) -> Tensor:
    """`value` as float32 of the shape on the device; a mask may broadcast to it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    try:
        fits = tuple(value.shape) == shape if exact else torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        accepted = f"{list(shape)}{'' if exact else ' or one that broadcasts to it'}"
        raise ValueError(f"{name} must have shape {accepted}, got {list(value.shape)}")
    return value.to(torch.float32).expand(shape)
