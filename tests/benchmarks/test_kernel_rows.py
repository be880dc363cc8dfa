"""The kernels' rows: every case is what its formula says, and its floors are right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_case, kernel_rows
from benchmarks.ceilings import Ceilings
from benchmarks.group_norm_cases import group_norm_case, one_pass
from benchmarks.kernel_case import check, expected, floors, instructions_per_element, measure_case
from benchmarks.kernel_inputs import bf16, fp32
from benchmarks.noising_cases import mse_case, q_sample_case
from benchmarks.suite import Context
from benchmarks.update_cases import p_sample_case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (2, 3, 8, 8)
CEILINGS = Ceilings(copy_bytes_per_s=4e12, matmul_flops_per_s={}, instructions_per_s=3e13)


@pytest.fixture
def small(monkeypatch):
    """All cases of a GPU at sizes for a CPU."""
    monkeypatch.setattr(kernel_rows, "GPU_SHAPE", SHAPE)
    monkeypatch.setattr(kernel_rows, "SHAPES", ((32, 4), (64, 2)))
    monkeypatch.setattr(
        kernel_rows, "group_norm_case", lambda batch, *size, **options: group_norm_case(min(batch, 2), *size, **options)
    )
    return kernel_rows.cases(CUDA, quick=False)


@torch.no_grad()
def errors_of(case, name):
    inputs = case.inputs(CPU)
    reference = expected(case, inputs)
    prepared = kernel_case.prepare_contender(case, name)({key: value.clone() for key, value in inputs.items()})
    return check(case, name, prepared, inputs, reference)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["fastdiff", "eager"])
def test_every_case_is_its_formula(small, name):
    for case in small:
        error = errors_of(case, name)
        assert (error is None) == (name == "eager" and case.draws), case.name


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    case = q_sample_case(SHAPE, fp32, fp32)
    wrong = replace(case, ours=lambda values: lambda: (1.001 * case.ours(values)()[0],))
    monkeypatch.setattr(kernel_case, "CONTENDERS", ("fastdiff", "eager"))
    context = Context(device=CPU, quick=True, ceilings=CEILINGS, remaining_s=lambda: 100.0)
    found = measure_case(wrong, context)
    assert isinstance(found["fastdiff"], AssertionError)
    assert "differs from the formula" in str(found["fastdiff"])
    assert found["eager"]["ms"] > 0


def test_noise_that_is_no_standard_normal_is_refused():
    case = q_sample_case(SHAPE, fp32, fp32)
    formula = case.formula
    inputs = case.inputs(CPU)
    narrow = replace(case, formula=lambda values, drawn: formula(values, 0 * values["x"] if drawn is None else drawn))
    with pytest.raises(AssertionError, match="standard errors"):
        check(narrow, "eager", kernel_case.prepare_contender(narrow, "eager")(inputs), inputs, expected(case, inputs))


def test_figures_of_a_case(monkeypatch):
    monkeypatch.setattr(kernel_case, "CONTENDERS", ("fastdiff", "eager"))
    case = mse_case(SHAPE, fp32)
    context = Context(device=CPU, quick=True, ceilings=CEILINGS, remaining_s=lambda: 100.0)
    for figures in measure_case(case, context).values():
        assert figures["bytes"] == 8 * 2 * 3 * 8 * 8
        assert figures["error"] <= figures["tolerance"]
        assert figures["of_copy"] == pytest.approx(figures["byte_floor_ms"] / figures["ms"])
        assert figures["low_ms"] <= figures["ms"] <= figures["high_ms"]
        json.dumps(figures)


def test_floor_arithmetic():
    case = p_sample_case((256, 3, 256, 256), fp32)
    found = floors(case, CEILINGS, 75.0)
    # 50,331,648 elements of 16 bytes at 4 TB/s, of 75 instructions at 30 T/s
    assert found["byte_floor_ms"] == pytest.approx(0.2013266)
    assert found["issue_floor_ms"] == pytest.approx(0.1258291)
    assert "issue_floor_ms" not in floors(case, CEILINGS, None)


def test_costs_are_cases_of_the_static_check():
    text = (Path(__file__).parents[1] / "kernels" / "static_check.py").read_text()
    for case in kernel_rows.cases(CUDA, quick=False):
        assert case.cost is None or f'"{case.cost}":' in text, case.cost


def test_bytes_of_the_cases_are_those_of_the_static_check():
    with_costs = [case for case in kernel_rows.cases(CUDA, quick=False) if case.cost is not None]
    costs = json.loads(sorted(kernel_case.RESULTS.glob("kernel-cost_*.json"))[-1].read_text())["costs"]
    known = [case for case in with_costs if case.cost in costs]
    assert len(known) >= 16
    for case in known:
        assert case.bytes_per_element == costs[case.cost]["sm_90"]["bytes_per_element"], case.name


def test_instructions_come_from_the_capability_or_else_from_sm_90():
    assert instructions_per_element("q_sample", "sm_80") != instructions_per_element("q_sample", "sm_90")
    assert instructions_per_element("q_sample", "sm_77") == instructions_per_element("q_sample", "sm_90")
    assert instructions_per_element(None, "sm_90") is None
    assert instructions_per_element("no such case", "sm_90") is None


def test_bytes_of_a_norm_follow_from_its_passes():
    for shape in ((256, 128, 32), (256, 320, 64), (1, 1280, 8)):
        once, once_backward = (one_pass(*shape, bf16, backward=backward) for backward in (False, True))
        assert group_norm_case(*shape, bf16).bytes_per_element == (4 if once else 6)
        assert group_norm_case(*shape, bf16, backward=True).bytes_per_element == (6 if once_backward else 10)
    assert one_pass(256, 128, 32, bf16)
    assert not one_pass(256, 320, 64, bf16)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("quick", [False, True])
def test_rows_are_unique_and_ours_comes_first(device, quick):
    found = kernel_rows.rows(device, quick=quick)
    assert len({row.key for row in found}) == len(found)
    assert [row.is_ours for row in found[:3]] == [True, False, False]
    assert sum(row.expected_s for row in found) < 600


def test_one_measurement_serves_all_contenders_and_failures_are_their_own(monkeypatch):
    made = []

    def measured(case, context):
        made.append(case.name)
        return {"fastdiff": {"ms": 1.0}, "eager": RuntimeError("no"), "compiled": {"ms": 2.0}}

    monkeypatch.setattr(kernel_rows, "measure_case", measured)
    context = Context(device=CPU, quick=True, ceilings=CEILINGS, remaining_s=lambda: 100.0)
    ours, eager, compiled = kernel_rows.rows(CPU, quick=True)[:3]
    assert ours.run(context) == {"ms": 1.0}
    with pytest.raises(RuntimeError, match="no"):
        eager.run(context)
    assert compiled.run(context) == {"ms": 2.0}
    assert len(made) == 1
