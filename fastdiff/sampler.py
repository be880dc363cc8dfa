"""The sampling loop: it runs the rows of a step table and knows no solver.

A row is a model call and one pass of the `p_sample` kernel, which writes the next state and the next model input. Every
tensor the loop touches is on the device, the row number included, so a row is also what a CUDA graph captures.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import noise as noise_contract
from fastdiff import solvers
from fastdiff.compilation import CompiledOrEager
from fastdiff.cuda_graph import GraphCache
from fastdiff.kernels.layout import empty
from fastdiff.kernels.p_sample import FLOAT_COLUMNS, DeviceTable, p_sample_
from fastdiff.kernels.philox import per_sample, sample_index
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import StepTable

# tables of different strengths a sampler keeps
MAX_TABLES = 8

Callback = Callable[["Sampler", int, float, dict[str, Tensor]], "Mapping[str, Tensor] | None"]


@dataclass(frozen=True)
class RowKind:
    """What makes rows different programs: whether they call the model, and with both halves of guidance."""

    evaluates: bool
    guided: bool


@dataclass
class Trajectory:
    """The tensors of one sampling call. Under a CUDA graph they stay and are loaded anew for each call.

    x: [B, C, *spatial] float32, channels-last. model_input: the same in the model's dtype, [2B, ...] for guidance
    ([uncond; cond]), or x itself where they would be equal. row: int32 [B]. inputs: what the caller gave, by name.
    """

    x: Tensor
    model_input: Tensor
    history: Tensor | None
    row: Tensor
    inputs: dict[str, Tensor]


class Sampler:
    """Draws samples from a diffusion model with any solver, on any device.

    Args:
        model: called as model(x, t, **model_kwargs) with x [B, C, *spatial] and t [B], int64 if all the table's
            timesteps are whole numbers, else float32; returns a tensor like x (or [B, 2C, *spatial], learned variance)
            or an object that holds it as `.sample`. It is never altered: put it in eval mode yourself.
        schedule: the noise schedule the model was trained with.
        solver: a name (`fastdiff.solvers.names()`) or a finished StepTable.
        solver_options: keyword arguments of the solver, for example {"eta": 1.0} for ddim.
        num_inference_steps: 1 .. schedule.num_train_timesteps; not with a StepTable.
        prediction_type: "epsilon", "sample", "v_prediction", "flow_prediction" or "edm".
        timestep_spacing: "trailing", "leading" or "linspace".
        sigma_spacing: None (follow the timesteps), "karras", "exponential" or "beta".
        clip_sample: clip the predicted x0 to [-clip_sample, clip_sample]; None does not clip.
        dynamic_threshold: quantile in (0, 1) of |x0| that a sample is clipped to and divided by (Saharia et al. 2022).
        guidance_scale: classifier-free guidance m_u + guidance_scale * (m_c - m_u) (Ho & Salimans 2022); None: none.
        guidance_interval: (start, end), the part of the walk that is guided (`fastdiff.solvers.build`).
        dtype: None runs the model in its own dtype, another one means autocast.
        device: where to sample; by default that of the noise, else of the model's first parameter, else of the first
            tensor in model_kwargs, else the CPU.
        compile: run the model through torch.compile with static shapes.
        cuda_graph: replay each row as a captured CUDA graph: "auto" (on CUDA), True (an error elsewhere) or False.

    A sampler keeps no state between calls but captured graphs, guarded by locks: several threads may use it.

    Raises:
        ValueError: naming the argument that is out of range or the combination that is impossible.
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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compile: bool = False,
        cuda_graph: bool | str = "auto",
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t, **model_kwargs), got {type(model).__name__}")
        if cuda_graph not in (True, False, "auto"):
            raise ValueError(f'cuda_graph must be True, False or "auto", got {cuda_graph!r}')
        if dynamic_threshold is not None and not 0 < dynamic_threshold < 1:
            raise ValueError(f"dynamic_threshold must be a quantile in (0, 1), got {dynamic_threshold}")
        if isinstance(solver, StepTable):
            if num_inference_steps is not None or solver_options:
                raise ValueError("num_inference_steps and solver_options go with a solver's name, not with a StepTable")
            self._build = None
            self.table = solver
        else:
            if num_inference_steps is None:
                raise ValueError(f"num_inference_steps is needed with solver {solver!r}")
            steps, options = num_inference_steps, dict(solver_options or {})

            @functools.lru_cache(maxsize=MAX_TABLES)
            def build(strength: float) -> StepTable:
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
                    **options,
                )

            self._build = build
            self.table = build(1.0)
        self.model = model
        self.schedule = schedule
        self.dynamic_threshold = dynamic_threshold
        self.dtype = dtype
        self.device = None if device is None else torch.empty(0, device=device).device
        self.cuda_graph = cuda_graph
        self._call_model = CompiledOrEager(model) if compile else model
        self._device_tables = functools.lru_cache(maxsize=MAX_TABLES)(_to_device)
        self._graphs: GraphCache[Trajectory] = GraphCache()
        parameters = getattr(model, "parameters", None)
        first = next(iter(parameters()), None) if parameters else None
        self._own_dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
        if dtype == torch.float32 and self._own_dtype != dtype:
            raise ValueError(
                f"dtype float32 is no autocast of a {self._own_dtype} model: convert the model with .float()"
            )

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
            model_kwargs: passed to the model. For guidance, tensors whose first axis is B are joined with those of the
                same name in uncond_kwargs; everything else is passed once.
            uncond_kwargs: the unconditional model_kwargs; for a model with a `null_class` it defaults to that class.
            init_image: [B, C, *spatial] in the model's range: start from it, noised, `strength` of the way up the walk.
            strength: (0, 1], with init_image.
            mask, known: for an in-painting table: where mask is 1, the samples follow `known`.
            callback_on_step_end: called as callback(sampler, i, t, {"latents": x}) after row i; may return a mapping
                whose "latents" replace x.
            progress: show a progress bar.

        Returns:
            float32 tensor of the shape, channels-last.

        Raises:
            ValueError: naming the argument, what was received and what is accepted.
        """
        model_kwargs, uncond_kwargs = dict(model_kwargs or {}), dict(uncond_kwargs or {})
        shape = tuple(shape)
        if len(shape) < 2 or any(size < 0 for size in shape):
            raise ValueError(f"shape must be [B, C, *spatial] with sizes >= 0, got {list(shape)}")
        device = self._device(noise, model_kwargs)
        table = self._table(init_image, strength)
        inputs = self._inputs(table, shape, device, model_kwargs, uncond_kwargs)
        constants = {name: value for name, value in model_kwargs.items() if not isinstance(value, Tensor)}
        inputs["seed"] = per_sample(seed, shape[0], device, "seed")
        inputs["sample_indices"] = sample_index(sample_indices, shape[0], device)
        for name, value in (("noise", noise), ("init_image", init_image), ("mask", mask), ("known", known)):
            if value is not None:
                inputs[name] = _like(value, shape, device, name, exact=name != "mask")
        if (mask is None) != (known is None):
            raise ValueError("mask and known go together: one of them is missing")

        if mask is not None and not (table.columns["k0"].any() or table.columns["kz"].any()):
            raise ValueError("mask needs an in-painting table: the rows of this one have no k0 or kz")

        if math.prod(shape) == 0:
            return empty(shape, torch.float32, device, channels_last=True)
        run = _Run(self, table, constants, device)
        if not self._captures(device):
            trajectory = run.allocate(shape, inputs)
            run.start(trajectory)
            return self._loop(run, trajectory, run.steps(trajectory), callback_on_step_end, progress)
        entry = self._graphs.entry(self._graph_key(table, shape, device, inputs, constants))
        with entry.lock:
            if entry.buffers is None:
                static = {name: value.clone() for name, value in inputs.items()}
                trajectory = run.allocate(shape, static)
                entry.prepare(trajectory, run.steps(trajectory), lambda: run.start(trajectory), device)
            assert entry.buffers is not None
            trajectory = entry.buffers
            for name, value in inputs.items():
                trajectory.inputs[name].copy_(value)
            run.start(trajectory)
            # the next call overwrites the buffers
            return self._loop(run, trajectory, entry.steps, callback_on_step_end, progress).clone()

    def _loop(
        self,
        run: _Run,
        trajectory: Trajectory,
        steps: Mapping[Hashable, Callable[[], None]],
        callback: Callback | None,
        progress: bool,
    ) -> Tensor:
        table = run.table
        for i in tqdm(range(len(table)), disable=not progress, desc="sampling", unit="row"):
            steps[run.kinds[i]]()
            if callback is not None:
                returned = callback(self, i, float(table.columns["t"][i]), {"latents": trajectory.x})
                latents = (returned or {}).get("latents", trajectory.x)
                if latents is not trajectory.x:
                    trajectory.x.copy_(latents)
                    run.write_model_input(trajectory, i + 1)
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
        if noise is not None:
            return noise.device
        parameters = getattr(self.model, "parameters", None)
        tensors = [] if parameters is None else [next(iter(parameters()), None)]
        tensors += [value for value in model_kwargs.values() if isinstance(value, Tensor)]
        return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))

    def _table(self, init_image: Tensor | None, strength: float) -> StepTable:
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        if init_image is None:
            if strength != 1:
                raise ValueError(f"strength {strength} needs init_image")
            return self.table
        if self._build is None:
            raise ValueError("init_image needs a solver's name: a finished StepTable has a fixed start")
        return self._build(strength)

    def _inputs(
        self,
        table: StepTable,
        shape: tuple[int, ...],
        device: torch.device,
        model_kwargs: Mapping[str, Any],
        uncond_kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """model_kwargs' tensors as "cond.NAME" and, for a guided table, joined with uncond_kwargs as "guided.NAME"."""
        batch = shape[0]
        null_class = getattr(self.model, "null_class", None)
        labels = model_kwargs.get("class_labels")
        # labels on a GPU are not looked at: that would be a host synchronisation
        if (
            null_class is not None
            and isinstance(labels, Tensor)
            and labels.device.type == "cpu"
            and labels.numel()
            and not (int(labels.min()) >= 0 and int(labels.max()) <= null_class)
        ):
            raise ValueError(
                f"class_labels must be in [0, {null_class}] ({null_class} is the null class), got {labels.tolist()}"
            )
        inputs = {}
        for name, value in model_kwargs.items():
            if isinstance(value, Tensor):
                inputs[f"cond.{name}"] = value.to(device)
        if not table.guided:
            if uncond_kwargs:
                raise ValueError(f"uncond_kwargs {sorted(uncond_kwargs)} are given, but guidance_scale is not")
            return inputs
        if null_class is not None and isinstance(labels, Tensor) and "class_labels" not in uncond_kwargs:
            uncond_kwargs["class_labels"] = torch.full_like(labels, null_class)
        if not uncond_kwargs:
            raise ValueError(
                "guidance_scale needs uncond_kwargs, the model's unconditional inputs"
                + (" (or class_labels in model_kwargs)" if null_class is not None else "")
            )
        if unknown := sorted(set(uncond_kwargs) - set(model_kwargs)):
            raise ValueError(f"uncond_kwargs {unknown} have no counterpart in model_kwargs {sorted(model_kwargs)}")
        for name, value in model_kwargs.items():
            if not isinstance(value, Tensor):
                continue
            value = value.to(device)
            if value.ndim and value.shape[0] == batch:
                uncond = uncond_kwargs.get(name)
                if not isinstance(uncond, Tensor) or uncond.shape != value.shape:
                    got = list(uncond.shape) if isinstance(uncond, Tensor) else uncond
                    raise ValueError(
                        f"uncond_kwargs[{name!r}] must be a tensor of shape {list(value.shape)}, got {got}"
                    )
                value = torch.cat([uncond.to(value), value])
            inputs[f"guided.{name}"] = value
        return inputs

    def _graph_key(
        self,
        table: StepTable,
        shape: tuple[int, ...],
        device: torch.device,
        inputs: Mapping[str, Tensor],
        constants: Mapping[str, Any],
    ) -> Hashable:
        """All that a captured step has baked in: layouts, constants, and where the model's weights lie."""
        parameters = getattr(self.model, "parameters", None)
        weights = tuple(parameter.data_ptr() for parameter in parameters()) if parameters else ()
        return (
            table,
            shape,
            device,
            tuple((name, value.shape, value.stride(), value.dtype) for name, value in sorted(inputs.items())),
            tuple((name, repr(value)) for name, value in sorted(constants.items())),
            getattr(self.model, "training", None),
            weights,
        )

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.dtype is None or self.dtype == self._own_dtype:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.dtype)


class _Run:
    """One table on one device: allocates a trajectory, starts it, and advances it by a row."""

    def __init__(self, sampler: Sampler, table: StepTable, constants: dict[str, Any], device: torch.device) -> None:
        self.sampler = sampler
        self.table = table
        self.constants = constants
        self.device = device
        self.device_table, self.timesteps = sampler._device_tables(table, device)
        guidance = table.columns["g"]
        self.kinds = [RowKind(bool(ev), bool(ev and g != 1)) for ev, g in zip(table.ev, guidance)]
        # a row whose model input is its state needs no second copy of it
        self.input_is_state = (
            sampler._own_dtype == torch.float32 and not table.guided and bool((table.columns["c_in"] == 1).all())
        )

    def allocate(self, shape: tuple[int, ...], inputs: dict[str, Tensor]) -> Trajectory:
        x = empty(shape, torch.float32, self.device, channels_last=True)
        model_input = x
        if not self.input_is_state:
            copies = 2 if self.table.guided else 1
            input_shape = (copies * shape[0], *shape[1:])
            model_input = empty(input_shape, self.sampler._own_dtype, self.device, channels_last=True)
        history = None
        if self.table.n_slots:
            slots = empty((self.table.n_slots * shape[0], *shape[1:]), torch.float32, self.device, channels_last=True)
            history = slots.unflatten(0, (self.table.n_slots, shape[0]))
        return Trajectory(x, model_input, history, torch.zeros(shape[0], dtype=torch.int32, device=self.device), inputs)

    def start(self, trajectory: Trajectory) -> None:
        """The state before the first row: the scaled initial noise, on top of the scaled init_image if there is one."""
        x, inputs = trajectory.x, trajectory.inputs
        noise = inputs.get("noise")
        if noise is None:
            noise = noise_contract.normal(
                tuple(x.shape), seed=inputs["seed"], sample_indices=inputs["sample_indices"], stream="initial"
            )
        if "init_image" in inputs:
            alpha, sigma = self.table.start
            torch.mul(noise, sigma, out=x).add_(inputs["init_image"], alpha=alpha)
        else:
            torch.mul(noise, self.table.init_noise_sigma, out=x)
        trajectory.row.zero_()
        self.write_model_input(trajectory, 0)

    def write_model_input(self, trajectory: Trajectory, row: int) -> None:
        if not self.input_is_state and row < len(self.table):
            scaled = trajectory.x * float(self.table.columns["c_in"][row])
            trajectory.model_input.unflatten(0, (-1, trajectory.x.shape[0])).copy_(scaled)

    def steps(self, trajectory: Trajectory) -> dict[Hashable, Callable[[], None]]:
        """What advances the trajectory by a row, for each kind of row of the table."""

        def step_of(kind: RowKind) -> Callable[[], None]:
            return lambda: self._step(trajectory, kind)

        return {kind: step_of(kind) for kind in dict.fromkeys(self.kinds)}

    def _step(self, trajectory: Trajectory, kind: RowKind) -> None:
        inputs = trajectory.inputs
        output = uncond = None
        if kind.evaluates:
            output = self._evaluate(trajectory, kind)
            if kind.guided:
                uncond, output = output.chunk(2)
        p_sample_(
            trajectory.x,
            output,
            self.device_table,
            trajectory.row,
            model_output_uncond=uncond,
            history=trajectory.history,
            seed=inputs["seed"] if self.table.draws_noise else None,
            sample_indices=inputs["sample_indices"] if self.table.draws_noise else None,
            threshold=self._threshold(trajectory, output, uncond),
            mask=inputs.get("mask"),
            known=inputs.get("known"),
            model_input_out=None if self.input_is_state else trajectory.model_input,
        )
        trajectory.row.add_(1)

    def _evaluate(self, trajectory: Trajectory, kind: RowKind) -> Tensor:
        prefix = "guided." if kind.guided else "cond."
        kwargs = {
            name.removeprefix(prefix): value for name, value in trajectory.inputs.items() if name.startswith(prefix)
        }
        model_input = trajectory.model_input
        t = self.timesteps.index_select(0, trajectory.row)
        if kind.guided:
            t = t.repeat(2)
        else:
            # after a guided row the conditional half is the second one
            model_input = model_input[model_input.shape[0] - trajectory.x.shape[0] :]
        with self.sampler._autocast(self.device):
            output = self.sampler._call_model(model_input, t, **self.constants, **kwargs)
        output = output if isinstance(output, Tensor) else output.sample
        expected = (model_input.shape[0], trajectory.x.shape[1], *trajectory.x.shape[2:])
        learned = (expected[0], 2 * expected[1], *expected[2:])
        if output.shape not in (expected, learned):
            raise ValueError(f"model must return a tensor of shape {list(expected)}, got {list(output.shape)}")
        return output

    def _threshold(self, trajectory: Trajectory, output: Tensor | None, uncond: Tensor | None) -> Tensor | None:
        """[B] what |x0| is clipped to: its quantile, at least 1 (Saharia et al. 2022, section 2.3)."""
        quantile = self.sampler.dynamic_threshold
        if quantile is None or output is None:
            return None
        x = trajectory.x
        rows = self.device_table.floats.index_select(0, trajectory.row)

        def column(name: str) -> Tensor:
            return rows[:, FLOAT_COLUMNS.index(name)].view(-1, *[1] * (x.ndim - 1))

        m = output[:, : x.shape[1]].float()
        if uncond is not None:
            m_u = uncond[:, : x.shape[1]].float()
            m = m_u + column("g") * (m - m_u)
        x0 = (column("px") * x + column("pm") * m).abs().flatten(1)
        return torch.quantile(x0, quantile, dim=1).clamp(min=1.0)


def _to_device(table: StepTable, device: torch.device) -> tuple[DeviceTable, Tensor]:
    """The packed rows and the timesteps the model is given, int64 or float32, on the device."""
    timesteps = torch.from_numpy(table.timesteps)
    if timesteps.is_floating_point():
        timesteps = timesteps.float()
    return table.to(device), timesteps.to(device)


def _like(value: Tensor, shape: tuple[int, ...], device: torch.device, name: str, *, exact: bool) -> Tensor:
    """`value` as float32 of the shape on the device; a mask may broadcast to it."""
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
