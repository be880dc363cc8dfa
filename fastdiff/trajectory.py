"""One sampling call: its tensors, and the step that moves them on by a row of the table.

A step is a model call and one pass of the `p_sample` kernel, which writes the next state and the next model input. All
it reads is on the device, the row number included, so that a step is also what a CUDA graph captures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff import noise as noise_contract
from fastdiff.kernels.device_table import FLOAT_COLUMNS, DeviceTable
from fastdiff.kernels.layout import empty
from fastdiff.kernels.p_sample import p_sample_
from fastdiff.model_arguments import tensors_of, with_tensors, without_tensors
from fastdiff.table import StepTable

ConditionFunction = Callable[..., Tensor]
TimeModulation = Callable[..., Tensor]
# what the modulations of all rows may take in float32; above that every step computes its own
MAX_MODULATION_BYTES = 2**28


@dataclass(frozen=True)
class RowKind:
    """What makes rows different programs: whether they call the model, and with both halves of guidance."""

    evaluates: bool
    guided: bool


@dataclass(frozen=True)
class PackedTable:
    """A step table on a device, and the timesteps [R] the model is given, int64 or float32."""

    rows: DeviceTable
    timesteps: Tensor

    @classmethod
    def of(cls, table: StepTable, device: torch.device) -> PackedTable:
        """Pack `table` for `device`."""
        timesteps = torch.from_numpy(table.timesteps)
        if timesteps.is_floating_point():
            timesteps = timesteps.float()
        return cls(table.to(device), timesteps.to(device))


@dataclass(frozen=True)
class Trajectory:
    """The tensors of one sampling call. Under a CUDA graph they stay and are loaded anew for each call.

    x: [B, C, *spatial] float32, channels-last. model_input: the same in the model's dtype, [2B, ...] for guidance
    ([uncond; cond]), or x itself where they would be equal. history: [K, B, C, *spatial] float32. row: int32 [B].
    inputs: what the caller gave, by name; model arguments as "cond.PATH" and, for guided rows, "guided.PATH".
    modulations: by the same prefix, [R, 1 or the batch of the call, M], what the model makes of each row's timestep.
    """

    x: Tensor
    model_input: Tensor
    history: Tensor | None
    row: Tensor
    inputs: dict[str, Tensor]
    modulations: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """A table, a model and a device: allocates a trajectory, starts it, and advances it by a row.

    Attributes:
        model: called as model(x, t, **arguments).
        model_dtype: of the model's input; autocast_dtype: that of autocast, None for none.
        dynamic_threshold: quantile of |x0|, None for none.
        guidance_rescale: share of the guided output's standard deviation that is the conditional one's.
        cond_fn: gradient of a condition's logarithmic likelihood, called with what the model gets.
        arguments: the model's keyword arguments, with a `TensorAt` for each tensor of the trajectory's inputs.
        time_modulation: the model's method of this name (`fastdiff.UNet.time_modulation`), None where it has none: what
            depends on the timestep alone is then computed for all rows before the first. modulation_channels: of what
            it returns.
        micro_batch_size: largest batch of a model call, None for any.
    """

    table: StepTable
    packed: PackedTable
    device: torch.device
    model: Callable[..., Any]
    model_dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    dynamic_threshold: float | None
    guidance_rescale: float
    cond_fn: ConditionFunction | None
    arguments: dict[str, Any]
    time_modulation: TimeModulation | None = None
    modulation_channels: int = 0
    micro_batch_size: int | None = None

    @property
    def kinds(self) -> list[RowKind]:
        """The kind of every row."""
        return [RowKind(bool(ev), bool(ev and g != 1)) for ev, g in zip(self.table.ev, self.table.columns["g"])]

    @property
    def input_is_state(self) -> bool:
        """True where every row's model input would be a copy of its state: then x itself is passed."""
        unscaled = bool((self.table.columns["c_in"] == 1).all())
        return unscaled and self.model_dtype == torch.float32 and not self.table.guided

    def allocate(self, shape: tuple[int, ...], inputs: dict[str, Tensor]) -> Trajectory:
        """Uninitialised tensors for samples of `shape`; `start` fills them."""
        x = empty(shape, torch.float32, self.device, channels_last=True)
        model_input = x
        if not self.input_is_state:
            copies = 2 if self.table.guided else 1
            model_input = empty((copies * shape[0], *shape[1:]), self.model_dtype, self.device, channels_last=True)
        history = None
        if self.table.n_slots:
            slots = empty((self.table.n_slots * shape[0], *shape[1:]), torch.float32, self.device, channels_last=True)
            history = slots.unflatten(0, (self.table.n_slots, shape[0]))
        row = torch.zeros(shape[0], dtype=torch.int32, device=self.device)
        return Trajectory(x, model_input, history, row, inputs)

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
        self._write_modulations(trajectory)

    def _write_modulations(self, trajectory: Trajectory) -> None:
        """What the model makes of the timesteps of all rows, for each kind of call."""
        if self.time_modulation is None:
            return
        for prefix in dict.fromkeys("guided." if kind.guided else "cond." for kind in self.kinds if kind.evaluates):
            labels = trajectory.inputs.get(f"{prefix}class_labels")
            count = 1 if labels is None else labels.shape[0]
            rows = self.packed.timesteps.shape[0]
            if rows * count * self.modulation_channels * 4 > MAX_MODULATION_BYTES:
                continue
            t = self.packed.timesteps.repeat_interleave(count)
            with self._autocast():
                made = self.time_modulation(t, None if labels is None else labels.repeat(rows))
            made = made.unflatten(0, (rows, count))
            # a captured step reads them where they were first
            kept = trajectory.modulations.setdefault(prefix, made)
            if kept is not made:
                kept.copy_(made)

    def write_model_input(self, trajectory: Trajectory, row: int) -> None:
        """The model's input of row `row` from the state, where no kernel has written it."""
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
        rescale = self._rescale(trajectory, output, uncond)
        grad = self._gradient(trajectory) if kind.evaluates else None
        draws = self.table.draws_noise
        p_sample_(
            trajectory.x,
            output,
            self.packed.rows,
            trajectory.row,
            model_output_uncond=uncond,
            history=trajectory.history,
            seed=inputs["seed"] if draws else None,
            sample_indices=inputs["sample_indices"] if draws else None,
            threshold=self._threshold(trajectory, output, uncond, rescale, grad),
            rescale=rescale,
            grad=grad,
            mask=inputs.get("mask"),
            known=inputs.get("known"),
            model_input_out=None if self.input_is_state else trajectory.model_input,
        )
        trajectory.row.add_(1)

    def _evaluate(self, trajectory: Trajectory, kind: RowKind) -> Tensor:
        x, model_input = trajectory.x, trajectory.model_input
        t = self.packed.timesteps.index_select(0, trajectory.row)
        if kind.guided:
            t = t.repeat(2)
        else:
            model_input = self._conditional_half(trajectory)
        prefix = "guided." if kind.guided else "cond."
        arguments = self._arguments(trajectory, prefix)
        if prefix in trajectory.modulations:
            # all samples of a trajectory are at the same row
            modulation = trajectory.modulations[prefix].index_select(0, trajectory.row[:1])[0]
            arguments["modulation"] = modulation.expand(model_input.shape[0], -1)
        with self._autocast():
            output = self._call_model(model_input, t, arguments, self._per_sample(trajectory))
        output = output if isinstance(output, Tensor) else getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor or an object with one as .sample, got {type(output).__name__}")
        expected = [model_input.shape[0], *x.shape[1:]]
        learned_variance = [model_input.shape[0], 2 * x.shape[1], *x.shape[2:]]
        accepted = [learned_variance] if self.table.columns["lv"].any() else [expected, learned_variance]
        if list(output.shape) not in accepted:
            raise ValueError(f"model must return a tensor of shape {accepted[0]}, got {list(output.shape)}")
        return output

    def _per_sample(self, trajectory: Trajectory) -> set[str]:
        """Paths of the model's arguments that have a row for each sample of the batch."""
        batch, inputs = trajectory.x.shape[0], trajectory.inputs.items()
        rows = {path[5:] for path, value in inputs if path.startswith("cond.") and value.ndim and len(value) == batch}
        return rows | {"modulation"}

    def _call_model(self, model_input: Tensor, t: Tensor, arguments: dict[str, Any], per_sample: set[str]) -> Any:
        """One call, or one for each micro-batch: then the tensors that have a row for each sample are cut like it."""
        batch, size = model_input.shape[0], self.micro_batch_size
        if size is None or batch <= size:
            return self.model(model_input, t, **arguments)
        outputs = []
        for start in range(0, batch, size):
            part = slice(start, start + size)
            cut = {path: value[part] if path in per_sample else value for path, value in tensors_of(arguments).items()}
            output = self.model(model_input[part], t[part], **with_tensors(without_tensors(arguments), cut))
            outputs.append(output if isinstance(output, Tensor) else output.sample)
        return torch.cat(outputs)

    def _conditional_half(self, trajectory: Trajectory) -> Tensor:
        # in a guided table the conditional half is the second one
        model_input = trajectory.model_input
        return model_input[model_input.shape[0] - trajectory.x.shape[0] :]

    def _arguments(self, trajectory: Trajectory, prefix: str) -> dict[str, Any]:
        """The model's keyword arguments with the tensors of one kind of call."""
        tensors = {
            name.removeprefix(prefix): value for name, value in trajectory.inputs.items() if name.startswith(prefix)
        }
        return with_tensors(self.arguments, tensors)

    def _gradient(self, trajectory: Trajectory) -> Tensor | None:
        """[B, C, *spatial] what cond_fn says of the conditional half of the model's input."""
        if self.cond_fn is None:
            return None
        t = self.packed.timesteps.index_select(0, trajectory.row)
        # the caller may keep or differentiate what it gets, the state goes on
        x = self._conditional_half(trajectory).float().clone()
        grad = self.cond_fn(x, t, **self._arguments(trajectory, "cond."))
        if not isinstance(grad, Tensor) or grad.shape != x.shape:
            got = list(grad.shape) if isinstance(grad, Tensor) else type(grad).__name__
            raise ValueError(f"cond_fn must return a tensor of shape {list(x.shape)}, got {got}")
        return grad.detach()

    def _autocast(self) -> contextlib.AbstractContextManager:
        """The sampler's autocast, or the caller's that is in force, without its cache of cast weights.

        The cache ends with the autocast, and a captured graph would go on reading it.
        """
        kind, dtype = self.device.type, self.autocast_dtype
        if dtype is None and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return contextlib.nullcontext() if dtype is None else torch.autocast(kind, dtype, cache_enabled=False)

    def _column(self, trajectory: Trajectory, name: str) -> Tensor:
        """A coefficient of each sample's row, [B, 1, ...]."""
        column = self.packed.rows.floats[:, FLOAT_COLUMNS.index(name)].index_select(0, trajectory.row)
        return column.view(-1, *[1] * (trajectory.x.ndim - 1))

    def _guided(self, trajectory: Trajectory, output: Tensor, uncond: Tensor | None) -> Tensor:
        """The model's output after classifier-free guidance, in float32, without variance channels."""
        channels = trajectory.x.shape[1]
        m = output[:, :channels].float()
        if uncond is None:
            return m
        m_uncond = uncond[:, :channels].float()
        return m_uncond + self._column(trajectory, "g") * (m - m_uncond)

    def _rescale(self, trajectory: Trajectory, output: Tensor | None, uncond: Tensor | None) -> Tensor | None:
        """[B] factor of the guided output (Lin et al. 2024, equations 15 and 16)."""
        if not self.guidance_rescale or output is None or uncond is None:
            return None
        conditional = output[:, : trajectory.x.shape[1]].float()
        # without Bessel's correction, which cancels, and without 0 / 0: a constant output keeps its scale
        wanted, got = (
            m.flatten(1).std(1, correction=0) for m in (conditional, self._guided(trajectory, output, uncond))
        )
        ratio = torch.where(got > 0, wanted / got, 1.0)
        return 1 - self.guidance_rescale + self.guidance_rescale * ratio

    def _threshold(
        self,
        trajectory: Trajectory,
        output: Tensor | None,
        uncond: Tensor | None,
        rescale: Tensor | None,
        grad: Tensor | None,
    ) -> Tensor | None:
        """[B] what |x0| is clipped to: its quantile, at least 1 (Saharia et al. 2022, section 2.3)."""
        if self.dynamic_threshold is None or output is None:
            return None
        m = self._guided(trajectory, output, uncond)
        if rescale is not None:
            m = rescale.view(-1, *[1] * (m.ndim - 1)) * m
        if grad is not None:
            m = m + self._column(trajectory, "mg") * grad
        x0 = self._column(trajectory, "px") * trajectory.x + self._column(trajectory, "pm") * m
        return torch.quantile(x0.abs().flatten(1), self.dynamic_threshold, dim=1).clamp(min=1.0)
