"""One row of a step table on tensors that belong to a caller: the op behind the façades of other libraries.

It computes what `fastdiff.kernels.p_sample` computes of a row, as a function: nothing is written in place, history is
a list of tensors newest first, noise is given. Where `p_sample` walks tensors by their axes for the sake of its noise,
this op needs no order of elements and runs flat over memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.kernels.checks import FLOAT_DTYPES, check_tensor
from fastdiff.kernels.compiled_ref import CompiledRef
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET
from fastdiff.kernels.dispatch import LAUNCH_OPTIONS, device_guard, tl, triton, use_triton

BLOCK_SIZE = 1024
NUM_WARPS = 4
MAX_HISTORY = 5
LANES = 16
_FLOATS = (*FLOAT_DTYPES, torch.float64)
COLUMN = {name: i for i, name in enumerate(FLOAT_COLUMNS)}
_PM, _CM, _UM, _CZ, _LV = (COLUMN[name] for name in ("pm", "cm", "um", "cz", "lv"))


@triton.jit
def _weighted(coefficient, ptr, i, n_elements):
    """coefficient * values; a coefficient of 0 reads nothing, so that the values may be anything."""
    value = tl.load(ptr + i, mask=i < tl.where(coefficient != 0.0, n_elements, 0), other=0.0)
    return coefficient * value.to(coefficient.dtype)


@triton.jit
def _solver_step_kernel(
    sample_ptr,
    model_ptr,
    variance_ptr,
    floats_ptr,
    row_ptr,
    h0_ptr,
    h1_ptr,
    h2_ptr,
    h3_ptr,
    h4_ptr,
    noise_ptr,
    threshold_ptr,
    out_ptr,
    x0_ptr,
    value_ptr,
    n_rows,
    n_columns,
    n_elements,
    n_blocks,
    stride_model,
    stride_row,
    BLOCK_SIZE: tl.constexpr,
):
    group = (tl.program_id(0) // n_blocks).to(tl.int64)
    row = tl.load(row_ptr + group * stride_row)
    valid = (row >= 0) & (row < n_rows)
    floats = floats_ptr + tl.where(valid, row, 0) * n_columns
    # the literals are positions in FLOAT_COLUMNS; px is in every result, so it carries the poison
    px = tl.where(valid, tl.load(floats + 2), float("nan"))
    i = (tl.program_id(0) % n_blocks) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    keep = i < n_elements
    base = group * n_elements
    x = tl.load(sample_ptr + base + i, mask=keep, other=0.0).to(px.dtype)
    m = tl.zeros([BLOCK_SIZE], px.dtype)
    pm, cm, um = tl.load(floats + 3), tl.load(floats + 10), tl.load(floats + 15)
    if model_ptr is not None:
        bound = tl.where((pm != 0.0) | (cm != 0.0) | (um != 0.0), n_elements, 0)
        m = tl.load(model_ptr + group * stride_model + i, mask=i < bound, other=0.0).to(px.dtype)
    x0 = px * x + pm * m
    if threshold_ptr is not None:
        limit = tl.load(threshold_ptr + group).to(px.dtype)
        x0 = tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL) / limit
    else:
        limit = tl.load(floats + 4)
        x0 = tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    cx, c0 = tl.load(floats + 8), tl.load(floats + 9)
    out = cx * x + c0 * x0 + cm * m
    if h0_ptr is not None:
        out += _weighted(tl.load(floats + 18), h0_ptr + base, i, n_elements)
    if h1_ptr is not None:
        out += _weighted(tl.load(floats + 19), h1_ptr + base, i, n_elements)
    if h2_ptr is not None:
        out += _weighted(tl.load(floats + 20), h2_ptr + base, i, n_elements)
    if h3_ptr is not None:
        out += _weighted(tl.load(floats + 21), h3_ptr + base, i, n_elements)
    if h4_ptr is not None:
        out += _weighted(tl.load(floats + 22), h4_ptr + base, i, n_elements)
    if noise_ptr is not None:
        std = tl.load(floats + 11)
        z = _weighted(std, noise_ptr + base, i, n_elements)
        if variance_ptr is not None:
            lv = tl.where(std != 0.0, tl.load(floats + 12), 0.0)
            z *= tl.exp(_weighted(lv, variance_ptr + group * stride_model, i, n_elements))
        out += z
    tl.store(out_ptr + base + i, out.to(out_ptr.dtype.element_ty), mask=keep)
    if x0_ptr is not None:
        tl.store(x0_ptr + base + i, x0.to(x0_ptr.dtype.element_ty), mask=keep)
    if value_ptr is not None:
        ux, u0 = tl.load(floats + 13), tl.load(floats + 14)
        value = ux * x + u0 * x0 + um * m
        tl.store(value_ptr + base + i, value.to(value_ptr.dtype.element_ty), mask=keep)


def _combine(
    sample: Tensor,
    model: Tensor | None,
    variance: Tensor | None,
    columns: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    threshold: Tensor | None,
    remember: bool,
    return_x0: bool,
    out_dtype: torch.dtype,
    masked: bool,
) -> list[Tensor]:
    """The row in plain PyTorch on tensors [G, ...]; columns are [G or 1, n_columns], threshold is [G].

    masked: what is multiplied by zero may be NaN or infinite.
    """

    def column(name: str) -> Tensor:
        return spread(columns[:, COLUMN[name]])

    def spread(coefficient: Tensor) -> Tensor:
        return coefficient.reshape(-1, *[1] * (sample.ndim - 1))

    def unless_zero(coefficient: Tensor, value: Tensor) -> Tensor:
        value = value.to(columns.dtype)
        return torch.where(coefficient != 0, value, 0.0) if masked else value

    x = sample.to(columns.dtype)
    x0, m = column("px") * x, None
    if model is not None:
        m = unless_zero(column("pm").abs() + column("cm").abs() + column("um").abs(), model)
        x0 = x0 + column("pm") * m
    limit = column("lim") if threshold is None else spread(threshold.to(columns.dtype))
    x0 = torch.clamp(x0, -limit, limit)
    if threshold is not None:
        x0 = x0 / limit

    def mixture(state: str, prediction: str, output: str) -> Tensor:
        total = column(state) * x + column(prediction) * x0
        return total if m is None else total + column(output) * m

    out = mixture("cx", "c0", "cm")
    for age, value in enumerate(history):
        h = spread(columns[:, HISTORY_OFFSET + age])
        out = out + h * unless_zero(h, value)
    if noise is not None:
        std = column("cz")
        z = std * unless_zero(std, noise)
        if variance is not None:
            lv = column("lv")
            z = z * torch.exp(lv * unless_zero(std * lv, variance))
        out = out + z
    results = [out]
    if return_x0:
        results.append(x0)
    if remember:
        results.append(mixture("ux", "u0", "um"))
    return [result.to(out_dtype) for result in results]


def _columns(floats: Tensor, row: Tensor) -> Tensor:
    """[1 or B, n_columns] of the rows, NaN for one out of range."""
    valid = (row >= 0) & (row < floats.shape[0])
    columns = floats.index_select(0, torch.where(valid, row, 0))
    return torch.where(valid[:, None], columns, torch.nan)


def solver_step_ref(
    sample: Tensor,
    model_output: Tensor | None,
    floats: Tensor,
    row: Tensor,
    *,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    threshold: Tensor | None = None,
    remember: bool = False,
    return_x0: bool = False,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`solver_step` in plain PyTorch, differentiable in the tensors."""
    model, variance = model_output, None
    if model_output is not None and model_output.shape != sample.shape:
        model, variance = model_output.chunk(2, 1)
    columns = _columns(floats, row)
    dtype = sample.dtype if out_dtype is None else out_dtype
    return _combine(sample, model, variance, columns, history, noise, threshold, remember, return_x0, dtype, True)


def _dense(value: Tensor) -> bool:
    """True if the tensor fills its memory without holes or overlaps, in any order of its axes."""
    if value.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(value.stride(), value.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class _Flat:
    """The tensors of a call as [groups, n / lanes, lanes] over memory, all in the order of the sample's elements.

    One group where one row serves the whole batch; a group a sample where rows, thresholds or the halves of a
    learned-variance output lie apart, which needs each sample in one piece: else the tensors are copied.
    """

    def __init__(self, sample: Tensor, per_sample: bool) -> None:
        if not sample.is_contiguous():
            in_one_piece = sample.shape[0] == 1 or sample.stride(0) * sample.shape[0] == sample.numel()
            if not _dense(sample) or (per_sample and not in_one_piece):
                sample = sample.contiguous()
        self.sample = sample
        self.stride = sample.stride()
        self.groups = sample.shape[0] if per_sample else 1
        self.n = sample.numel() // self.groups

        # whole vectors, where there are only such, spare the compiled loop a look for the end at every one of them
        lanes = LANES if self.n % LANES == 0 else 1
        self.shape, self.steps = (self.groups, self.n // lanes, lanes), (lanes, 1)

    def __call__(self, value: Tensor) -> Tensor:
        if value.stride() != self.stride:
            value = torch.empty_like(self.sample, dtype=value.dtype).copy_(value)
        return value.as_strided(self.shape, (self.n, *self.steps))

    def halves(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves of a [B, 2C, ...] model output; views where its samples are laid out as the sample's."""
        halves = output.chunk(2, 1)
        if halves[0].stride()[1:] == self.stride[1:] and self.sample[0].is_contiguous():
            first, second = (half.as_strided(self.shape, (output.stride(0), *self.steps)) for half in halves)
            return first, second
        return self(halves[0]), self(halves[1])


_compiled = CompiledRef(_combine)


def _run(
    sample: Tensor,
    model_output: Tensor | None,
    floats: Tensor,
    row: Tensor,
    history: list[Tensor],
    noise: Tensor | None,
    threshold: Tensor | None,
    remember: bool,
    return_x0: bool,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    learned = model_output is not None and model_output.shape != sample.shape
    flat = _Flat(sample, learned or row.numel() > 1 or threshold is not None)
    variance = None
    if model_output is None:
        model = None
    elif learned:
        model, variance = flat.halves(model_output)
    else:
        model = flat(model_output)
    x, past = flat(flat.sample), [flat(value) for value in history]
    z = None if noise is None else flat(noise)
    if not use_triton(sample):
        masked = row.numel() > 1
        index = -1 if masked else int(row)
        if 0 <= index < floats.shape[0]:
            # one row, in the CPU's own memory: what it does not read is left out here instead of in the loop
            columns = floats.narrow(0, index, 1).contiguous()
            c = columns.tolist()[0]
            if not (c[_PM] or c[_CM] or c[_UM]):
                model = None
            if not (variance is not None and c[_CZ] * c[_LV]):
                variance = None
            if not c[_CZ]:
                z = None
            past = [value if h else x for value, h in zip(past, c[HISTORY_OFFSET:])]
        else:
            columns = _columns(floats, row)
        results = _compiled(x, model, variance, columns, past, z, threshold, remember, return_x0, out_dtype, masked)
        return [result.as_strided(flat.sample.shape, flat.stride) for result in results]
    outputs = [torch.empty_like(flat.sample, dtype=out_dtype) for _ in range(1 + return_x0 + remember)]
    n_blocks = triton.cdiv(flat.n, BLOCK_SIZE)
    if flat.groups * n_blocks >= 2**31 or flat.n >= 2**31:
        raise ValueError(f"sample of shape {list(sample.shape)} is too large: fewer than 2^31 elements are accepted")
    with device_guard(sample):
        _solver_step_kernel[(flat.groups * n_blocks,)](
            x,
            model,
            variance,
            floats.contiguous(),
            row.reshape(-1).contiguous(),
            *past,
            *[None] * (MAX_HISTORY - len(past)),
            z,
            None if threshold is None else threshold.contiguous(),
            outputs[0],
            outputs[1] if return_x0 else None,
            outputs[-1] if remember else None,
            floats.shape[0],
            floats.shape[1],
            flat.n,
            n_blocks,
            0 if model is None else model.stride(0),
            0 if row.numel() == 1 else 1,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )
    return outputs


# Not a custom_op: the façades call this once a step on small tensors, and its wrapper takes as long as their kernel.
_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(
    "solver_step(Tensor sample, Tensor? model_output, Tensor floats, Tensor row, Tensor[] history, Tensor? noise, "
    "Tensor? threshold, bool remember, bool return_x0, ScalarType out_dtype) -> Tensor[]"
)
_library.impl("solver_step", _run, "CompositeExplicitAutograd")
# solver_step sends what requires grad elsewhere; PyTorch's stand-in for a missing formula would take 50 microseconds.
_library.impl("solver_step", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastdiff::solver_step", lib=_library)
def _(sample, model_output, floats, row, history, noise, threshold, remember, return_x0, out_dtype):
    return [torch.empty_like(sample, dtype=out_dtype) for _ in range(1 + return_x0 + remember)]


_solver_step_op = torch.ops.fastdiff.solver_step.default
# not public: without them every call goes through the dispatcher
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)


def solver_step(
    sample: Tensor,
    model_output: Tensor | None,
    floats: Tensor,
    row: Tensor,
    *,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    threshold: Tensor | None = None,
    remember: bool = False,
    return_x0: bool = False,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Execute one row of a step table out of place, as one operation.

    The formulas are those of `fastdiff.table`, without guidance, gradient and mask; float32 arithmetic, or float64 for
    float64 coefficients. Model output, history and noise that a row multiplies by zero are not read and may hold
    anything. On the CPU the plain reference runs, compiled by Inductor on its first use with a combination of arguments
    and dtypes (FASTDIFF_COMPILE_STEP=0 in the environment keeps it eager). Tensors that require grad take the eager
    reference, which autograd differentiates.

    Args:
        sample: [B, ...] of any float dtype and strides: the state x.
        model_output: like sample, or [B, 2C, *spatial] with the learned-variance channels v in the second half.
        floats: float32 or float64 [R, HISTORY_OFFSET + K]: the columns of `FLOAT_COLUMNS` (t, c_next, g, mg, vg, k0
            and kz are ignored) and the coefficients of the remembered values by age.
        row: int64 [1], one row for all samples, or [B]. One out of [0, R) makes its samples NaN.
        history: up to min(K, 5) remembered values like sample, the newest first.
        noise: like sample: what a row's cz multiplies.
        threshold: float [B]: x0 = clamp(x0, -s, s) / s in place of the row's lim (Saharia et al. 2022, section 2.3).
        remember: also return y, what a multistep method remembers.
        return_x0: also return the clipped data prediction.
        out_dtype: of all results; that of sample by default.

    Returns:
        [x_next], then x0 and y as asked for; laid out as sample where that is dense, else contiguous.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or device than the above.
    """
    if not isinstance(sample, Tensor) or not sample.is_floating_point() or sample.ndim < 1:
        got = f"{sample.dtype} of {list(sample.shape)}" if isinstance(sample, Tensor) else type(sample).__name__
        raise TypeError(f"sample must be a float tensor [B, ...], got {got}")
    _check(sample, model_output, floats, row, history, noise, threshold)
    dtype = sample.dtype if out_dtype is None else out_dtype
    if sample.numel() == 0:
        return [torch.empty_like(sample, dtype=dtype) for _ in range(1 + return_x0 + remember)]
    differentiates = torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in (sample, model_output, noise, threshold, *history)
    )
    if differentiates or (torch.compiler.is_compiling() and not use_triton(sample)):
        return solver_step_ref(
            sample,
            model_output,
            floats,
            row,
            history=history,
            noise=noise,
            threshold=threshold,
            remember=remember,
            return_x0=return_x0,
            out_dtype=dtype,
        )
    # Python kernels cost the dispatcher 20 to 40 microseconds, as much as their work: it is gone through where it is
    # needed, on a GPU (streams, captures) and where somebody watches or transforms the operations.
    run = _run if sample.device.type == "cpu" and type(sample) is Tensor and _unobserved() else _solver_step_op
    return run(sample, model_output, floats, row, list(history), noise, threshold, remember, return_x0, dtype)


def _unobserved() -> bool:
    """True if no dispatch mode, function transform or profiler is active."""
    return not (_modes() or _transform() is not None or torch.autograd._profiler_enabled())


def _fits(value: Tensor, shape: torch.Size, device: torch.device) -> bool:
    return value.shape == shape and value.device == device and value.is_floating_point()


def _check(
    sample: Tensor,
    model_output: Tensor | None,
    floats: Tensor,
    row: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    threshold: Tensor | None,
) -> None:
    shape, device = sample.shape, sample.device
    n_values = floats.shape[-1] - HISTORY_OFFSET
    if floats.ndim != 2 or n_values < 0 or floats.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"floats must be float32 or float64 [R, {HISTORY_OFFSET} + K], got {floats.dtype} of {list(floats.shape)}"
        )
    if floats.device != device:
        raise ValueError(f"floats must be on {device}, got {floats.device}")
    if row.dtype != torch.int64 or row.device != device or row.numel() not in (1, shape[0]):
        raise ValueError(
            f"row must be int64 [1] or [{shape[0]}] on {device}, got {row.dtype} of {list(row.shape)} on {row.device}"
        )
    if len(history) > min(n_values, MAX_HISTORY):
        raise ValueError(
            f"history must hold at most {min(n_values, MAX_HISTORY)} values for this table, got {len(history)}"
        )
    # what fits is seen at once: a façade's step takes some 50 microseconds
    if model_output is not None and not _fits(model_output, shape, device):
        doubled = (shape[0], 2 * shape[1], *shape[2:]) if len(shape) > 1 else shape
        check_tensor("model_output", model_output, doubled, _FLOATS, device)
    if noise is not None and not _fits(noise, shape, device):
        check_tensor("noise", noise, shape, _FLOATS, device)
    for age, value in enumerate(history):
        if not _fits(value, shape, device):
            check_tensor(f"history[{age}]", value, shape, _FLOATS, device)
    if threshold is not None:
        check_tensor("threshold", threshold, (shape[0],), _FLOATS, device)
