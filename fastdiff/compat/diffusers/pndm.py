"""diffusers' PNDMScheduler, one fused pass a step."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from diffusers import PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.compat.diffusers.forward_noising import ForwardNoising
from fastdiff.compat.diffusers.fused import FusedScheduler, Timestep, result_dtype
from fastdiff.compat.diffusers.row_table import RowTable
from fastdiff.solvers.pndm import ADAMS_BASHFORTH
from fastdiff.table import Row

# what a row's history calls the sample that a group of steps starts from, and the k-th last model output
SAVED = -1
STAGES = ((1.0,), (1.0,), (1.0,), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def _output(age: int) -> int:
    return SAVED - age


class _KeyedTable(RowTable):
    """Rows by what identifies them."""

    def __init__(self, rows: Mapping[Hashable, Row]) -> None:
        super().__init__(list(rows.values()))
        self.number = {key: i for i, key in enumerate(rows)}


class FastPNDMScheduler(ForwardNoising, FusedScheduler, PNDMScheduler):
    """`PNDMScheduler`, with and without the Runge-Kutta start; it keeps state, so it takes one timestep for the batch.

    Like the original it combines model outputs, whatever they predict, and counts its steps from `set_timesteps` on: a
    walk that starts late takes the first steps' formulas where it starts, and those of the Runge-Kutta start lead from
    the first listed timesteps. `ets`, `counter` and `cur_sample` are the original's; `cur_model_output` stays 0, as
    the outputs of a Runge-Kutta step are kept one by one until its last pass sums them. A timestep on a device that is
    no element of `timesteps` is read from there, as in the original.
    """

    row_sources = ("timesteps", "alphas_cumprod", "final_alpha_cumprod")
    per_sample = False
    prediction_types = ("epsilon", "v_prediction")

    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    ets: list[Tensor]
    counter: int
    cur_sample: Tensor | None
    prk_timesteps: np.ndarray
    _stages: Sequence[Tensor] = ()

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The original's step: `step_prk` while there are Runge-Kutta timesteps, then `step_plms`.

        Raises:
            ValueError: timestep is a vector, or set_timesteps was not called.
        """
        self._check_ready()
        if self.counter < len(self.prk_timesteps) and not self.config.skip_prk_steps:
            return self.step_prk(model_output, timestep, sample, return_dict)
        return self.step_plms(model_output, timestep, sample, return_dict)

    def step_prk(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One of the four passes of a pseudo Runge-Kutta step; raises as `step`."""
        self._check_ready()
        t, stage = self._whole(timestep, sample), self.counter % 4
        if stage == 0:
            self.ets.append(model_output)
            self.cur_sample, self._stages = sample, ()
        saved = sample if self.cur_sample is None else self.cur_sample
        prev_sample = self._transition(("prk", self.counter, t), model_output, sample, saved, self._stages)
        self._stages = () if stage == 3 else (model_output, *self._stages)
        return self._finish(prev_sample, return_dict)

    def step_plms(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A multistep step of as many model outputs as there are, four at most; raises as `step`.

        Raises:
            ValueError: it comes before three Runge-Kutta steps, unless the configuration skips them.
        """
        self._check_ready()
        t, again = self._whole(timestep, sample), self.counter == 1
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError(
                f"step_plms needs three model outputs in ets, got {len(self.ets)}: take the 12 steps of the "
                "Runge-Kutta start before, or set skip_prk_steps"
            )
        past = self.ets[::-1] if again else self.ets[:-4:-1]
        order = min(len(past) + (not again), 4)
        key = ("again" if again else "plms", order, t)
        prev_sample = self._transition(key, model_output, sample, self.cur_sample, past)
        if not again:
            self.ets = [*self.ets[-3:], model_output]
        if order == 1:
            self.cur_sample = None if again else sample
        return self._finish(prev_sample, return_dict)

    def _check_ready(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")

    def _whole(self, timestep: Timestep, sample: Tensor) -> int:
        """The timestep as a number of the host's."""
        self._is_vector(timestep, sample)
        known = self._known(timestep)
        return int(timestep if known is None else known)

    def _finish(self, prev_sample: Tensor, return_dict: bool) -> SchedulerOutput | tuple[Tensor]:
        self.counter += 1
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _transition(
        self,
        key: tuple[str, int, int],
        model_output: Tensor,
        sample: Tensor,
        saved: Tensor | None,
        past: Sequence[Tensor],
    ) -> Tensor:
        table = self._table(None, self._listed_rows)
        assert isinstance(table, _KeyedTable)
        if key not in table.number:
            # a timestep that is not listed, or a state that a caller made
            table = self._table(key, lambda: _KeyedTable({key: self._row_of(*key)}))
            assert isinstance(table, _KeyedTable)
        row = table.number[key]
        history = [saved if source == SAVED else past[-source - 2] for source in table.reads[row]]
        dtype = result_dtype(sample, model_output)
        return self._run(table, row, model_output, sample, history=history, out_dtype=dtype)[0]  # type: ignore[arg-type]

    def _listed_rows(self) -> _KeyedTable:
        """Every row that walks from any of the listed timesteps take."""
        timesteps = dict.fromkeys(self._listed)
        keys = [("plms", order, t) for order in (1, 2, 3, 4) for t in timesteps]
        if self.config.skip_prk_steps:
            # the step before led there, so that its start is listed, or nearly so
            keys += [("again", 1, t) for t in timesteps if t + self._stride < len(self.alphas_cumprod)]
        else:
            keys += [("prk", counter, t) for counter in range(len(self.prk_timesteps)) for t in timesteps]
        return _KeyedTable({key: self._row_of(*key) for key in keys})

    @property
    def _stride(self) -> int:
        return self.config.num_train_timesteps // self.num_inference_steps

    def _row_of(self, kind: str, number: int, t: int) -> Row:
        """The row of a step at timestep t.

        Args:
            kind: "prk"; "plms"; or "again", the second step of the multistep start, which repeats the first.
            number: the count of steps before for "prk", else the number of model outputs that are combined.
        """
        weights: tuple[float, ...]
        if kind == "prk":
            start = int(self.prk_timesteps[number // 4 * 4])
            end = t - (0 if number % 2 else self._stride // 2)
            weights, restart = STAGES[number % 4], number % 4 > 0
        elif kind == "plms":
            start, end, weights, restart = t, t - self._stride, ADAMS_BASHFORTH[number - 1], False
        else:
            # of one model output before and its own the mean; of more those alone, from the sample as it is
            start, end, restart = t + self._stride, t, number == 1
            weights = (1 / 2, 1 / 2) if restart else (0.0, *ADAMS_BASHFORTH[number - 1])
        bar = float(self.alphas_cumprod[start])
        bar_end = float(self.alphas_cumprod[end] if end >= 0 else self.final_alpha_cumprod)
        # Liu et al. 2022, equation 11
        from_sample = math.sqrt(bar_end / bar)
        from_output = math.sqrt(1 - bar_end) - math.sqrt(1 - bar) * from_sample
        if self.config.prediction_type == "v_prediction":
            # eps = sqrt(bar) * v + sqrt(1 - bar) * x, of the combined outputs and the sample that the step starts from
            from_sample += from_output * math.sqrt(1 - bar)
            from_output *= math.sqrt(bar)
        history = {_output(age): from_output * weight for age, weight in enumerate(weights) if age}
        if restart:
            history[SAVED] = from_sample
        return Row(cx=0.0 if restart else from_sample, cm=from_output * weights[0], history=history)
