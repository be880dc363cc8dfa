"""A row out of place, against the formulas of fastdiff.table in float64, in every layout a caller may bring."""

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.kernels import compiled_ref, dispatch
from fastdiff.kernels import solver_step as module
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET
from fastdiff.kernels.solver_step import solver_step, solver_step_ref

SHAPE = (3, 4, 5, 7)


def table(n_rows: int, n_values: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random coefficients; the columns that the op ignores are NaN."""
    floats = torch.randn(n_rows, HISTORY_OFFSET + n_values, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    for name in ("t", "c_next", "g", "mg", "vg", "k0", "kz"):
        floats[:, FLOAT_COLUMNS.index(name)] = torch.nan
    floats[:, FLOAT_COLUMNS.index("lim")] = floats[:, FLOAT_COLUMNS.index("lim")].abs() + 0.5
    return floats


def formulas(sample, model_output, floats, row, history=(), noise=None, threshold=None):
    """(x_next, x0, y) by the formulas of fastdiff.table, in float64 NumPy, sample by sample."""
    results = []
    for b in range(sample.shape[0]):
        columns = floats[int(row[b if len(row) > 1 else 0])].double().numpy()
        c = dict(zip(FLOAT_COLUMNS, columns))
        x, m, v = sample[b].double().numpy(), 0.0, 0.0
        if model_output is not None:
            halves = model_output[b].double().numpy()
            m, v = (halves[: len(x)], halves[len(x) :]) if halves.shape != x.shape else (halves, 0.0)
        limit = c["lim"] if threshold is None else float(threshold[b])
        x0 = np.clip(c["px"] * x + c["pm"] * m, -limit, limit) / (1 if threshold is None else limit)
        x_next = c["cx"] * x + c["c0"] * x0 + c["cm"] * m
        for h, value in zip(columns[HISTORY_OFFSET:], history):
            x_next = x_next + h * value[b].double().numpy()
        if noise is not None:
            x_next = x_next + c["cz"] * np.exp(c["lv"] * v) * noise[b].double().numpy()
        results.append((x_next, x0, c["ux"] * x + c["u0"] * x0 + c["um"] * m))
    return [torch.from_numpy(np.stack(column)) for column in zip(*results)]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(actual, expected, bound: float) -> None:
    for value, right in zip(actual, expected):
        assert (value.cpu().double() - right).abs().max() <= bound * max(1.0, float(right.abs().max()))


# A few float32 roundings of 2^-24 relative to the largest value; over these cases 1.6e-7 was the largest seen.
BOUND = 5e-7


@pytest.mark.parametrize("n_values", [0, 1, 5], ids=lambda n: f"history{n}")
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned_variance"])
@pytest.mark.parametrize("threshold", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_row", "row_per_sample"])
def test_equals_the_formulas(n_values, learned, threshold, per_sample, device):
    floats = table(6, n_values)
    row = torch.tensor([4, 0, 5] if per_sample else [2])
    sample, noise = random(*SHAPE, seed=1), random(*SHAPE, seed=2)
    output = random(3, 8 if learned else 4, 5, 7, seed=3)
    history = [random(*SHAPE, seed=10 + k) for k in range(n_values)]
    limit = torch.tensor([0.7, 1.0, 2.5]) if threshold else None
    actual = solver_step(
        sample.to(device),
        output.to(device),
        floats.to(device),
        row.to(device),
        history=[value.to(device) for value in history],
        noise=noise.to(device),
        threshold=None if limit is None else limit.to(device),
        remember=True,
        return_x0=True,
    )
    assert_close(actual, formulas(sample, output, floats, row, history, noise, limit), BOUND)


def layouts() -> dict[str, torch.Tensor]:
    dense = random(4, 3, 8, 8, seed=5)
    return {
        "contiguous": dense,
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "batch_innermost": dense.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "sliced": random(4, 3, 8, 16, seed=5)[..., ::2],
        "expanded": dense[:1].expand(4, -1, -1, -1),
        "video": random(4, 3, 2, 3, 5, seed=5),
        "audio": random(4, 3, 9, seed=5),
        "vectors": random(4, 3, seed=5),
        "scalars": random(4, seed=5),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("per_sample", [False, True], ids=["one_row", "row_per_sample"])
def test_any_layout_in_and_the_samples_layout_out(name, per_sample, device):
    sample, floats = layouts()[name], table(5, 1)
    row = torch.tensor([3, 1, 0, 4] if per_sample else [1])
    output = random(*sample.shape, seed=6).contiguous()
    past = random(*sample.shape, seed=7)
    (actual,) = solver_step(
        sample.to(device), output.to(device), floats.to(device), row.to(device), history=[past.to(device)]
    )
    assert_close([actual], formulas(sample, output, floats, row, [past])[:1], BOUND)
    if name in ("contiguous", "channels_last", "video"):
        assert actual.stride() == sample.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype, device):
    if dispatch.INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bf16 stores")
    floats, row = table(2, 0), torch.tensor([1])
    sample, output = random(*SHAPE, seed=1, dtype=dtype), random(*SHAPE, seed=2, dtype=dtype)
    arguments = [value.to(device) for value in (sample, output, floats, row)]
    (low,) = solver_step(*arguments)
    (full,) = solver_step(*arguments, out_dtype=torch.float32)
    assert low.dtype == dtype
    assert full.dtype == torch.float32
    assert torch.equal(low, full.to(dtype))
    assert_close([full], formulas(sample, output, floats, row)[:1], BOUND)


def test_float64_stays_float64(device):
    floats, row = table(2, 0, dtype=torch.float64), torch.tensor([1])
    sample, output = random(*SHAPE, seed=1, dtype=torch.float64), random(*SHAPE, seed=2, dtype=torch.float64)
    (actual,) = solver_step(sample.to(device), output.to(device), floats.to(device), row.to(device))
    assert actual.dtype == torch.float64
    # a few roundings of 2^-53
    assert_close([actual], formulas(sample, output, floats, row)[:1], 1e-15)


@pytest.mark.parametrize("per_sample", [False, True], ids=["one_row", "row_per_sample"])
def test_what_a_row_multiplies_by_zero_is_not_read(per_sample, device):
    floats = table(3, 2)
    for name in ("pm", "cm", "um", "cz"):
        floats[:, FLOAT_COLUMNS.index(name)] = 0.0
    floats[:, HISTORY_OFFSET] = 0.0
    row = torch.tensor([0, 2, 1] if per_sample else [1])
    sample, past = random(*SHAPE, seed=1), random(*SHAPE, seed=2)
    garbage = torch.full(SHAPE, torch.nan)
    output = torch.full((3, 8, 5, 7), torch.inf)
    actual = solver_step(
        sample.to(device),
        output.to(device),
        floats.to(device),
        row.to(device),
        history=[garbage.to(device), past.to(device)],
        noise=garbage.to(device),
        remember=True,
        return_x0=True,
    )
    zero = torch.zeros(SHAPE)
    assert_close(actual, formulas(sample, None, floats, row, [zero, past]), BOUND)


def test_nan_of_the_model_is_not_clipped_away(device):
    floats, row = table(1, 0), torch.tensor([0])
    output = random(*SHAPE, seed=2)
    output[1, 2, 3, 4] = torch.nan
    x_next, x0 = solver_step(
        random(*SHAPE, seed=1).to(device), output.to(device), floats.to(device), row.to(device), return_x0=True
    )
    for value in (x_next, x0):
        assert torch.equal(value.isnan().cpu(), output.isnan())


@pytest.mark.parametrize("outside", [-1, 4, 2**40])
def test_a_row_out_of_range_makes_its_sample_nan_and_no_other(outside, device):
    row = torch.tensor([1, outside, 3])
    sample, output = random(*SHAPE, seed=1).to(device), random(*SHAPE, seed=2).to(device)
    (actual,) = solver_step(sample, output, table(4, 0).to(device), row.to(device))
    assert actual[1].isnan().all()
    assert not actual[[0, 2]].isnan().any()
    (alone,) = solver_step(sample, output, table(4, 0).to(device), row[1:2].to(device))
    assert alone.isnan().all()


@pytest.mark.parametrize("spread", ["every other", "one for all", "columns first"])
def test_rows_and_tables_of_any_strides(spread, device):
    floats, row = table(4, 0).to(device), torch.tensor([3, 0, 2], device=device)
    sample, output = random(*SHAPE, seed=1).to(device), random(*SHAPE, seed=2).to(device)
    if spread == "one for all":
        row = row[:1].expand(3)
    (expected,) = solver_step(sample, output, floats, row.clone())
    if spread == "every other":
        row = row.repeat_interleave(2)[::2]
    if spread == "columns first":
        floats = floats.t().contiguous().t()
    (actual,) = solver_step(sample, output, floats, row)
    assert torch.equal(actual, expected)


def test_complex_values_are_refused(device):
    sample, floats, row = random(*SHAPE, seed=1).to(device), table(1, 1).to(device), torch.tensor([0], device=device)
    for changed in ({"model_output": sample.to(torch.complex64)}, {"history": [sample.to(torch.complex64)]}):
        with pytest.raises(ValueError, match=r"(model_output|history\[0\]) must be a tensor .* got complex64"):
            solver_step(**{"sample": sample, "model_output": sample, "floats": floats, "row": row, **changed})


def test_gradients_flow_through_the_reference(device):
    floats, row = table(2, 1).to(device), torch.tensor([1], device=device)
    sample, output, past = (random(*SHAPE, seed=seed).to(device).requires_grad_() for seed in range(3))
    x_next, x0 = solver_step(sample, output, floats, row, history=[past], return_x0=True)
    (x_next.sum() + 2 * x0.sum()).backward()
    c = dict(zip(FLOAT_COLUMNS, floats[1].tolist()))
    with torch.no_grad():
        inside = ((c["px"] * sample + c["pm"] * output).abs() < c["lim"]).float()
    torch.testing.assert_close(sample.grad, c["cx"] + (c["c0"] + 2) * c["px"] * inside)
    torch.testing.assert_close(output.grad, c["cm"] + (c["c0"] + 2) * c["pm"] * inside)
    torch.testing.assert_close(past.grad, torch.full_like(past, float(floats[1, HISTORY_OFFSET])))


def test_inputs_are_left_alone_and_outputs_are_new(device):
    floats, row = table(2, 1).to(device), torch.tensor([0], device=device)
    tensors = [random(*SHAPE, seed=seed).to(device) for seed in range(4)]
    before = [value.clone() for value in tensors]
    results = solver_step(
        *tensors[:2], floats, row, history=[tensors[2]], noise=tensors[3], remember=True, return_x0=True
    )
    assert all(torch.equal(value, old) for value, old in zip(tensors, before))
    assert len({value.data_ptr() for value in [*tensors, *results]}) == 7


def test_it_is_one_operation_for_whoever_watches(device):
    floats, row = table(3, 0).to(device), torch.tensor([1], device=device)
    sample, output = random(*SHAPE, seed=1).to(device), random(*SHAPE, seed=2).to(device)
    with torch.profiler.profile() as profile:
        solver_step(sample, output, floats, row)
    assert "fastdiff::solver_step" in [event.key for event in profile.key_averages()]

    class Names(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Names():
        solver_step(sample, output, floats, row)
    assert Names.seen == ["fastdiff.solver_step.default"]


def test_opcheck(device):
    floats, row = table(3, 1).to(device), torch.tensor([1], device=device)
    sample, output = random(*SHAPE, seed=1).to(device), random(*SHAPE, seed=2).to(device)
    arguments = (sample, output, floats, row, [sample.clone()], output.clone(), None, True, True, torch.float16)
    torch.library.opcheck(module._solver_step_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_torch_compile_takes_it_whole(device, needs_cxx):
    if dispatch.INTERPRET:
        pytest.skip("the interpreter cannot run under a fake tensor mode")
    floats, row = table(3, 0).to(device), torch.tensor([1], device=device)
    sample, output = random(*SHAPE, seed=1).to(device), random(*SHAPE, seed=2).to(device)

    def step(sample, output):
        return solver_step(2 * sample, output, floats, row)[0] + 1

    compiled = torch.compile(step, fullgraph=True)(sample, output)
    # the same operations, contracted differently: 2^-24 of values up to 30, twice
    torch.testing.assert_close(compiled, step(sample, output), rtol=1e-6, atol=4e-6)


class TestCompiledOnTheCPU:
    @pytest.fixture(autouse=True)
    def _compiled(self, monkeypatch, needs_cxx):
        monkeypatch.setattr(dispatch, "INTERPRET", False)
        monkeypatch.setattr(compiled_ref, "ENABLED", True)
        self.graphs = compiled_ref.CompiledRef(module._combine)
        monkeypatch.setattr(module, "_compiled", self.graphs)

    def test_equals_the_reference_with_two_graphs_for_all_shapes(self):
        floats, row = table(3, 1), torch.tensor([2])
        shapes = [(2, 3, 4, 5), (1, 1), (7,), (16, 4, 64, 64), (2, 3, 4, 5, 6)]
        for shape, memory_format in itertools.product(shapes, ["dense", "channels_last"]):
            tensors = [random(*shape, seed=seed) for seed in range(4)]
            if memory_format == "channels_last" and len(shape) == 4:
                tensors = [value.contiguous(memory_format=torch.channels_last) for value in tensors]
            sample, output, past, noise = tensors
            actual = solver_step(sample, output, floats, row, history=[past], noise=noise, return_x0=True)
            expected = solver_step_ref(sample, output, floats, row, history=[past], noise=noise, return_x0=True)
            for value, right in zip(actual, expected):
                # multiply and add may contract
                torch.testing.assert_close(value, right, rtol=1e-6, atol=4e-6)
                assert value.stride() == sample.stride()
        # one for whole vectors only, one for a rest
        assert len(self.graphs._graphs) == 2

    @pytest.mark.parametrize("layout", ["transposed", "every second column"])
    def test_tables_of_any_strides(self, layout):
        floats, row = table(3, 0), torch.tensor([1])
        sample, output = random(2, 3, seed=1), random(2, 3, seed=2)
        if layout == "transposed":
            strided = floats.t().contiguous().t()
        else:
            strided = torch.stack([floats, torch.full_like(floats, torch.nan)], dim=2).flatten(1)[:, ::2]
        expected = solver_step(sample, output, floats, row)[0]
        assert torch.equal(solver_step(sample, output, strided, row)[0], expected)

    def test_rows_per_sample_and_learned_variance(self):
        floats, row = table(4, 0), torch.tensor([2, 0, 3])
        for shape in [(3, 4, 5, 7), (3, 2, 6)]:
            sample, noise = random(*shape, seed=1), random(*shape, seed=2)
            output = random(shape[0], 2 * shape[1], *shape[2:], seed=3)
            limit = torch.tensor([0.5, 1.0, 2.0])
            actual = solver_step(sample, output, floats, row, noise=noise, threshold=limit, remember=True)
            expected = solver_step_ref(sample, output, floats, row, noise=noise, threshold=limit, remember=True)
            for value, right in zip(actual, expected):
                # the exponential of Inductor's vectors differs by 2^-23, its argument is up to 10
                torch.testing.assert_close(value, right, rtol=4e-6, atol=4e-6)
        assert len(self.graphs._graphs) == 1

    def test_without_a_compiler_one_warning_and_the_eager_result(self, monkeypatch):
        def fail(*arguments):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(compiled_ref, "_compile", fail)
        sample, output = random(*SHAPE, seed=1), random(*SHAPE, seed=2)
        floats, row = table(3, 0), torch.tensor([2])
        with pytest.warns(UserWarning, match="no compiler"):
            (first,) = solver_step(sample, output, floats, row)
        (second,) = solver_step(sample, output, floats, row)
        assert torch.equal(first, second)
        assert torch.equal(first, solver_step_ref(sample, output, floats, row)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(3, 4, 5, 7, dtype=torch.int64)}, "sample must be a float tensor"),
        ({"model_output": torch.zeros(3, 4, 5, 6)}, "model_output must be"),
        ({"model_output": torch.zeros(3, 12, 5, 7)}, "model_output must be"),
        ({"floats": torch.zeros(2, 5)}, "floats must be"),
        ({"row": torch.tensor([0, 1])}, "row must be int64"),
        ({"row": torch.tensor([0], dtype=torch.int32)}, "row must be int64"),
        ({"history": [torch.zeros(SHAPE)] * 2}, "history must hold at most 1"),
        ({"history": [torch.zeros(3, 4)]}, r"history\[0\] must be"),
        ({"noise": torch.zeros(3)}, "noise must be"),
        ({"threshold": torch.zeros(2)}, "threshold must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "sample": torch.zeros(SHAPE),
        "model_output": torch.zeros(SHAPE),
        "floats": table(2, 1),
        "row": torch.tensor([0]),
        **change,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        solver_step(**arguments)
