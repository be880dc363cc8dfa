"""The reverse update and a façade's step, at the sizes they are measured at, beside their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_case import Inputs, KernelCase, Outputs
from benchmarks.kernel_inputs import (
    DRAW,
    NAMES,
    TOLERANCE,
    bf16,
    contract_noise,
    fp32,
    itemsize,
    normal_like,
    per_sample,
)
from fastdiff.kernels.device_table import FLOAT_COLUMNS, DeviceTable
from fastdiff.kernels.p_sample import p_sample_
from fastdiff.kernels.philox import STREAMS
from fastdiff.kernels.solver_step import solver_step

# A row in the middle of a walk: alpha_bar = 0.5 to 0.55. c_next is not 1, so that the model's input is written.
COLUMNS = {"px": 1.414, "pm": -1.0, "lim": 1.0, "cx": 0.85, "c0": 0.11, "c_next": 0.97}
DDPM_STD, GUIDANCE, AGE_ONE = 0.2, 7.5, -0.06


def _row(device: torch.device, columns: dict[str, float], n_slots: int = 0, draw: int = -1) -> tuple[Tensor, Tensor]:
    """A step table of one row: (floats, integers)."""
    values = [columns.get(name, 0.0) for name in FLOAT_COLUMNS] + [columns.get("h", 0.0)] * n_slots
    integers = [[0 if n_slots else -1, draw, STREAMS["step"]]]
    return torch.tensor([values], device=device), torch.tensor(integers, dtype=torch.int32, device=device)


def p_sample_case(
    shape: Sequence[int], model: torch.dtype, *, noise_kind: str = "kernel", guided: bool = False
) -> KernelCase:
    """The reverse update of a float32 state; noise_kind: "kernel" | "given" | "none"; guided with one history slot."""
    draws, n_slots = noise_kind != "none", int(guided)
    columns = COLUMNS | {"cz": DDPM_STD if draws else 0.0, "g": GUIDANCE if guided else 1.0}
    columns |= {"u0": 1.0, "h": AGE_ONE} if guided else {}

    def inputs(device: torch.device) -> Inputs:
        batch = shape[0]
        floats, integers = _row(device, columns, n_slots, DRAW if draws else -1)
        made = {
            "x": normal_like(shape, fp32, device),
            "model_output": normal_like((batch * (1 + guided), *shape[1:]), model, device),
            "model_input": normal_like((batch * (1 + guided), *shape[1:]), model, device),
            "floats": floats,
            "integers": integers,
            "row": torch.zeros(batch, dtype=torch.int32, device=device),
            **per_sample(batch, device),
        }
        if guided:
            made["history"] = normal_like(shape, fp32, device)
        if noise_kind == "given":
            made["noise"] = normal_like(shape, fp32, device)
        return made

    def formula(values: Inputs, drawn: Tensor | None) -> Outputs:
        x, m = values["x"], values["model_output"].to(values["x"].dtype)
        c = {name: values["floats"][0, FLOAT_COLUMNS.index(name)] for name in COLUMNS}
        if guided:
            uncond, m = m.chunk(2)
            m = uncond + GUIDANCE * (m - uncond)
        x0 = (c["px"] * x + c["pm"] * m).clamp(-1, 1)
        x_next = c["cx"] * x + c["c0"] * x0
        if guided:
            x_next = x_next + AGE_ONE * values["history"]
        if draws:
            x_next = x_next + DDPM_STD * (torch.randn_like(x) if drawn is None else drawn)
        model_input = (c["c_next"] * x_next).to(values["model_input"].dtype)
        return (x_next, torch.cat([model_input] * 2), x0) if guided else (x_next, model_input)

    def ours(values: Inputs) -> Callable[[], Outputs]:
        output = values["model_output"]
        uncond, output = output.chunk(2) if guided else (None, output)
        history = values["history"][None] if guided else None
        made = {"seed": values["seed"], "sample_indices": values["sample"]}
        sources: dict[str, dict[str, Any]] = {"kernel": made, "given": {"noise": values.get("noise")}, "none": {}}
        table, x = DeviceTable(values["floats"], values["integers"]), values["x"]

        def call() -> Outputs:
            p_sample_(
                x,
                output,
                table,
                values["row"],
                model_output_uncond=uncond,
                history=history,
                model_input_out=values["model_input"],
                **sources[noise_kind],
            )
            return (x, values["model_input"], *([values["history"]] if guided else []))

        return call

    item = itemsize(model)
    suffix = {"kernel": "", "given": "-noise-given", "none": "-no-noise"}[noise_kind]
    costs = {
        (fp32, "kernel", False): "p_sample",
        (bf16, "kernel", False): "p_sample bf16 model",
        (fp32, "kernel", True): "p_sample guided, history",
        (bf16, "kernel", True): "p_sample guided bf16 model, history",
        (fp32, "none", False): "p_sample without noise",
        (bf16, "none", False): "p_sample without noise, bf16 model",
        (fp32, "given", False): "p_sample noise given",
    }
    return KernelCase(
        name=f"p-sample-{NAMES[model]}-model" + "-guided-history" * guided + suffix,
        elements=math.prod(shape),
        # the state in and out, the model's output and next input, twice with guidance; the slot in and out; the noise
        bytes_per_element=8 + 2 * item * (1 + guided) + 8 * guided + 4 * (noise_kind == "given"),
        cost=costs.get((model, noise_kind, guided)),
        inputs=inputs,
        ours=ours,
        formula=formula,
        noise=None if not draws else (lambda values: values["noise"]) if "g" in noise_kind else contract_noise("step"),
        draws=noise_kind == "kernel",
        noise_scale=lambda values: torch.full((1, 1, 1, 1), DDPM_STD, device=values["x"].device),
        tolerance=TOLERANCE[model],
    )


def solver_step_case(shape: Sequence[int], dtype: torch.dtype, *, extended: bool = False) -> KernelCase:
    """A façade's step, out of place; extended with given noise, two remembered values, and a third to remember."""
    columns = COLUMNS | {"cz": DDPM_STD if extended else 0.0, "h": AGE_ONE, "u0": 1.0}

    def inputs(device: torch.device) -> Inputs:
        names = ("x", "model_output", *(("noise", "newer", "older") if extended else ()))
        made = {name: normal_like(shape, dtype, device) for name in names}
        made["floats"], _ = _row(device, columns, 2 * extended)
        return made | {"row": torch.zeros(1, dtype=torch.int64, device=device)}

    def formula(values: Inputs, given: Tensor | None) -> Outputs:
        x, m, c = values["x"], values["model_output"], columns
        x0 = (c["px"] * x + c["pm"] * m).clamp(-1, 1)
        x_next = c["cx"] * x + c["c0"] * x0
        if extended:
            assert given is not None
            x_next = x_next + AGE_ONE * values["newer"] + AGE_ONE * values["older"] + DDPM_STD * given
        return (x_next, x0) if extended else (x_next,)

    def ours(values: Inputs) -> Callable[[], Outputs]:
        history = [values["newer"], values["older"]] if extended else []
        arguments = values["x"], values["model_output"], values["floats"], values["row"]
        return lambda: tuple(solver_step(*arguments, history=history, noise=values.get("noise"), remember=extended))

    return KernelCase(
        name=f"solver-step-{NAMES[dtype]}" + "-noise-history" * extended,
        elements=math.prod(shape),
        bytes_per_element=itemsize(dtype) * (7 if extended else 3),
        cost="solver_step fp16, noise, history" if extended else "solver_step",
        inputs=inputs,
        ours=ours,
        formula=formula,
        noise=(lambda values: values["noise"]) if extended else None,
        tolerance=TOLERANCE[dtype],
    )
