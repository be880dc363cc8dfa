"""Comparing two runs: noise is told from a change, and what cannot be told is said.

The synthetic times have what measured ones have: a level of each run of its own, slow drift, jitter, single calls that
take far longer, and stretches in which a neighbour takes part of the machine.
"""

import math

import numpy as np
import pytest
from hand_made_reports import make_report, record

from benchmarks import store
from benchmarks.__main__ import main
from benchmarks.compare import compare, judge, locate

PAIRS = 20


def run_of(random, n=200, *, ms=20.0, between=0.004, jitter=0.006, spikes=0.05, neighbour=0.1):
    """Times of `n` calls of one run."""
    drift = np.zeros(n)
    for index in range(1, n):
        drift[index] = 0.97 * drift[index - 1] + 0.001 * random.standard_normal()
    log_ms = math.log(ms) + between * random.standard_normal() + drift + np.abs(jitter * random.standard_normal(n))
    # one in twenty takes longer by a half on average, a few many times as long
    log_ms = log_ms + (random.random(n) < spikes) * random.exponential(0.5, n)
    start = random.integers(0, n)
    log_ms[start : start + int(neighbour * n)] += 0.2
    return {"samples_ms": list(np.exp(log_ms)), "probe_ms": list(np.exp(0.003 * random.standard_normal(40)))}


def verdicts(slower_by, seed, **options):
    """Of pairs of runs of the same thing, the second made slower."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(PAIRS):
        before, after = run_of(random, **options), run_of(random, **options)
        after["samples_ms"] = [sample * (1 + slower_by) for sample in after["samples_ms"]]
        found.append(judge("row", before, after).verdict)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [30, 200])
def test_pairs_of_the_same_give_no_alarm(seed, n):
    assert not {"slower", "faster"} & set(verdicts(0.0, seed, n=n))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [30, 200])
def test_five_percent_are_found(seed, n):
    assert verdicts(0.05, seed, n=n).count("slower") >= 19
    assert verdicts(-0.05, seed, n=n).count("faster") >= 19


def test_a_machine_in_another_state_is_no_change():
    random = np.random.default_rng(0)
    before, after = run_of(random), run_of(random)
    for name in ("samples_ms", "probe_ms"):
        after[name] = [1.1 * sample for sample in after[name]]
    change = judge("row", before, after)
    assert change.verdict == "too noisy"
    assert change.least > 0.09


def test_a_run_that_had_to_wait_is_no_change():
    random = np.random.default_rng(0)
    before, after = run_of(random), run_of(random)
    after["samples_ms"] = [1.1 * sample for sample in after["samples_ms"]]
    assert judge("row", before, after).verdict == "slower"
    # a tenth of the time may be all of the change
    assert judge("row", before, after | {"waited": 0.095}).verdict == "too noisy"
    assert judge("row", before, after | {"waited": 0.01}).verdict == "slower"
    after["samples_ms"] = [10 * sample for sample in after["samples_ms"]]
    assert judge("row", before, after | {"waited": 0.3}).verdict == "too noisy"


def test_drift_counts_against_a_run():
    steady, drifting = np.full(200, 10.0) + np.tile([0.0, 0.1], 100), np.linspace(9.0, 11.0, 200)
    assert locate(drifting).error > 5 * locate(steady).error


def test_the_median_of_a_run_resists_half_of_it():
    calm = locate([10.0] * 200).log_ms
    assert locate([10.0] * 110 + [50.0] * 90).log_ms == calm


def test_few_long_calls_are_compared_by_their_spread():
    steady = {"samples_ms": [1000.0, 1001.0, 1002.0, 1000.5, 1001.5]}
    assert judge("row", steady, {"samples_ms": [1.1 * ms for ms in steady["samples_ms"]]}).verdict == "slower"
    assert judge("row", steady, {"samples_ms": [900.0, 1300.0, 1000.0]}).verdict == "too noisy"
    with pytest.raises(ValueError, match="at least 3"):
        judge("row", steady, {"samples_ms": [1000.0, 1001.0]})


def reports(folder, slower_by):
    """Paths of two result files, the second slower in one of two rows."""
    random = np.random.default_rng(3)
    rows = [{f"unet/{name}-b1/fastdiff": record(**run_of(random)) for name in ("a", "b")} for _ in range(2)]
    slow = rows[1]["unet/b-b1/fastdiff"]
    slow["samples_ms"] = [sample * (1 + slower_by) for sample in slow["samples_ms"]]
    rows[0]["unet/only-b1/fastdiff"] = record(status="failed", reason="x")
    paths = [folder / "before.json", folder / "after.json"]
    for path, found in zip(paths, rows):
        store.save(make_report(found), path)
    return paths


def test_command(tmp_path, capsys):
    before, after = reports(tmp_path, 0.08)
    assert main(["compare", str(before), str(after)]) == 1
    out = capsys.readouterr().out
    assert "1 slower, 0 faster, 1 same, 0 too noisy" in out
    (line,) = [line for line in out.splitlines() if "unet/b-b1" in line]
    assert "slower" in line
    assert main(["compare", str(before), str(before)]) == 0


def test_files_without_a_common_row_are_an_error(tmp_path, capsys):
    before, _ = reports(tmp_path, 0.0)
    other = tmp_path / "other.json"
    store.save(make_report({"unet/c-b1/fastdiff": record()}), other)
    assert main(["compare", str(before), str(other)]) == 2
    assert "no measured row in common" in capsys.readouterr().err


def test_rows_that_one_file_lacks_are_left_out(tmp_path):
    before, after = reports(tmp_path, 0.0)
    assert [change.key for change in compare(store.load(before), store.load(after))] == [
        "unet/a-b1/fastdiff",
        "unet/b-b1/fastdiff",
    ]
