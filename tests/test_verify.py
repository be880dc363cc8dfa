"""`fastdiff verify` passes where all is right, and reports what is not: a check that cannot fail shows nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastdiff import cli, verify_cases, verify_formulas, verify_sampler
from fastdiff.kernels import dispatch, p_sample, q_sample
from fastdiff.verify import Check, Path, Report, bound_of, compare, verify
from fastdiff.verify_formulas import Rounded

CPU = [Path("reference, CPU", "cpu", False)]
# key and counter words of Random123's kat_vectors, philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_formula_gives_the_known_answers(counter, key, words):
    assert verify_formulas.philox(counter, key) == words
    arrays = verify_formulas.philox(tuple(np.array([word], np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in arrays) == words


def test_all_references_pass():
    report = verify(paths=CPU)
    assert report.ok, report.describe()
    ran = [check for check in report.checks if check.status == "ok" and not check.note]
    for kernel in ("normal", "q_sample", "mse", "p_sample"):
        assert {check.layout for check in ran if check.kernel == kernel} >= {"channels_last", "contiguous"}
    for kernel in ("q_sample", "mse", "p_sample", "dropout", "group_norm"):
        of_kernel = {(check.dtype, check.layout) for check in ran if check.kernel == kernel}
        assert len(of_kernel) == len(verify_cases.DTYPES) * len(verify_cases.LAYOUTS)
    solvers = {check.kernel for check in ran if check.kernel.startswith("sampler")}
    assert len(solvers) == 5


@pytest.mark.skipif(not dispatch.INTERPRET and not torch.cuda.is_available(), reason="Triton runs nowhere here")
def test_kernels_pass_and_make_the_bits_of_the_references(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", not torch.cuda.is_available())
    report = verify(only="channels_last step")
    assert report.ok, report.describe()
    assert [check.error for check in report.checks if "=" in check.path] == [0.0]


def drifted(kernel, name):
    """The reference with a result that is off by a thousandth."""

    def wrong(*arguments, **options):
        result = kernel(*arguments, **options)
        if result is None:
            arguments[0].mul_(1.001)
            return None
        return result * 1.001

    wrong.__name__ = name
    return wrong


@pytest.mark.parametrize(("module", "name"), [(q_sample, "q_sample_ref"), (p_sample, "p_sample_ref")])
def test_a_wrong_kernel_is_reported(module, name, monkeypatch):
    monkeypatch.setattr(module, name, drifted(getattr(module, name), name))
    kernel = name.removesuffix("_ref")
    report = verify(only=f"{kernel} float32 strided", paths=CPU)
    assert not report.ok
    assert [check.kernel for check in report.checks if check.status == "FAIL"] == [kernel]
    assert "1 of 2 lines failed" in report.describe()


def test_a_value_that_is_never_written_is_reported(monkeypatch):
    def forgetful(x, *arguments, x0_out, **options):
        p_sample_ref(x, *arguments, x0_out=None, **options)

    p_sample_ref = p_sample.p_sample_ref
    monkeypatch.setattr(p_sample, "p_sample_ref", forgetful)
    report = verify(only="p_sample float32 contiguous plain", paths=CPU)
    failed = [check for check in report.checks if check.status == "FAIL"]
    assert [check.note for check in failed] == ["x0 of plain"]
    assert report.to_dict()["checks"][0]["error"] is None
    json.dumps(report.to_dict())


@pytest.mark.parametrize("only", ["q_sample float32", "mse float32 channels_last edm", "p_sample float32 strided"])
def test_a_coefficient_off_by_ten_bounds_is_reported(only):
    report = verify(only=only, paths=CPU)
    self_check = report.checks[-1]
    assert report.ok
    assert self_check.note == "a coefficient off by 10 bounds is reported"
    assert self_check.error > self_check.bound


def test_a_check_that_notices_nothing_fails(monkeypatch):
    monkeypatch.setattr("fastdiff.verify.bound_of", lambda expected, dtype: bound_of(expected, dtype) * 1e-300 + 1.0)
    case = next(case for case in verify_cases.cases() if case.name.startswith("q_sample float32"))
    blind = dataclasses.replace(case, run=lambda device, nudge: case.run(device, 0.0))
    monkeypatch.setattr("fastdiff.verify.cases", lambda: iter([blind]))
    report = verify(only=case.name, paths=CPU)
    assert report.checks[0].status == "ok"
    assert (report.checks[1].status, report.ok) == ("FAIL", False)


def test_a_wrong_solver_is_reported(monkeypatch):
    monkeypatch.setattr(verify_sampler, "SLOPE", 0.3)
    walk = verify_sampler._textbook
    monkeypatch.setattr(verify_sampler, "_textbook", lambda solver, schedule: walk(solver, schedule) * (1 + 1e-4))
    report = verify(only="sampler", paths=CPU)
    assert [check.status for check in report.checks[:5]] == ["FAIL"] * 5


def test_bounds_hold_for_float32_arithmetic_and_are_tight():
    # a * b + c / d of random float32 numbers: errors stay below the bound, and the largest comes near it
    a, b, c, d = np.random.default_rng(0).uniform(0.5, 2, (4, 10_000)).astype(np.float32)
    formula = verify_formulas.total(*(Rounded.exact(x) for x in (a * 0, c * 0)))
    formula = verify_formulas.total(Rounded.exact(a) * Rounded.exact(b), Rounded.exact(c) / Rounded.exact(d), formula)
    error, bound = compare(torch.from_numpy(a * b + c / d), formula)
    assert 0.1 * bound < error <= bound


def test_nan_and_wrong_shape_are_infinite_errors():
    expected = Rounded.exact(np.ones((2, 3)))
    assert compare(torch.full((2, 3), torch.nan), expected)[0] == np.inf
    check = Check("k", "p", "float32", "contiguous")
    check.add(np.nan, 1.0, "a NaN")
    assert (check.status, check.note) == ("FAIL", "a NaN")
    assert not Report().ok


def test_command(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["verify", "--only", "q_sample float16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    monkeypatch.setattr(q_sample, "q_sample_ref", drifted(q_sample.q_sample_ref, "q_sample_ref"))
    assert cli.main(["verify", "--only", "q_sample float32"]) == (1 if not torch.cuda.is_available() else 0)
    assert cli.main(["verify", "--only", "nothing of the kind"]) == 2
    assert "only must be part of" in capsys.readouterr().err
