"""The runner: what it measures, when, and what it writes down."""

import json

import pytest
import torch
from hand_made_reports import fix_environment

from benchmarks import store
from benchmarks.ceilings import Ceilings
from benchmarks.runner import Runner, one_line
from benchmarks.suite import Row, Skip

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fixed_environment(monkeypatch):
    fix_environment(monkeypatch)


class Clock:
    """Seconds that pass only where a row says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Rows:
    """Rows of workloads sampling/<name> that note when they run; `broken` maps keys to what they raise."""

    def __init__(self, *names, seconds=10.0):
        self.clock, self.ran, self.caches, self.broken, self.seconds = Clock(), [], [], {}, seconds
        self.rows = [
            Row(key=f"sampling/{name}", expected_s=seconds, run=self._run(f"sampling/{name}")) for name in names
        ]

    def _run(self, key):
        def run(context):
            self.ran.append(key)
            self.caches.append(dict(context.cache))
            context.cache[key] = True
            self.clock.now += self.seconds
            if key in self.broken:
                raise self.broken[key]
            return {"ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "samples_ms": [1.0, 2.0, 3.0]}

        return run

    def measure(self, folder, budget_s=1000.0):
        self.ran.clear()
        self.caches.clear()
        self.clock.now = 0.0
        self.said = []
        measuring = Runner(
            device=CPU,
            folder=folder,
            budget_s=budget_s,
            clock=self.clock,
            say=self.said.append,
            ceilings_of=lambda device, quick: Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s={"float32": 1e9}),
        )
        return measuring.run(self.rows)


def test_second_run_measures_what_is_open_and_nothing_twice(tmp_path):
    rows = Rows("a/fastdiff", "b/fastdiff", "c/fastdiff")
    first = rows.measure(tmp_path, budget_s=25)
    assert rows.ran == ["sampling/a/fastdiff", "sampling/b/fastdiff"]
    assert first.open == ["sampling/c/fastdiff"]
    assert rows.said[-1] == "sampling/c/fastdiff: open, would take about 10 s of the 5 s left"
    second = rows.measure(tmp_path)
    assert rows.ran == ["sampling/c/fastdiff"]
    assert (second.path, second.open) == (first.path, [])
    assert rows.measure(tmp_path).done == []
    assert len(store.load(first.path)["runs"]) == 2


def test_contenders_of_a_resumed_workload_are_compared_within_one_run(tmp_path):
    rows = Rows("a/textbook", "a/fastdiff", "a/diffusers")
    first = rows.measure(tmp_path, budget_s=25)
    assert rows.ran == ["sampling/a/fastdiff", "sampling/a/textbook"]
    second = rows.measure(tmp_path)
    assert rows.ran == ["sampling/a/fastdiff", "sampling/a/diffusers"]
    report = store.load(first.path)
    for run, other in ((first.run, "textbook"), (second.run, "diffusers")):
        assert store.newest(report, "sampling/a/fastdiff", run=run)
        assert store.newest(report, f"sampling/a/{other}", run=run)


def test_no_time_is_spent_on_measuring_ours_again_for_a_row_that_does_not_fit(tmp_path):
    rows = Rows("a/fastdiff", "a/diffusers")
    rows.measure(tmp_path, budget_s=15)
    assert rows.measure(tmp_path, budget_s=15).open == ["sampling/a/diffusers"]
    assert rows.ran == []


def test_a_failure_is_recorded_with_its_reason_and_tried_again(tmp_path):
    rows = Rows("a/fastdiff", "b/fastdiff")
    rows.broken["sampling/a/fastdiff"] = RuntimeError("out of luck\nand a long trace")
    outcome = rows.measure(tmp_path)
    assert (outcome.failed, outcome.done) == (["sampling/a/fastdiff"], ["sampling/b/fastdiff"])
    record = store.newest(store.load(outcome.path), "sampling/a/fastdiff")
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: out of luck")
    assert any("out of luck" in line for line in rows.said)
    rows.broken.clear()
    assert rows.measure(tmp_path).done == ["sampling/a/fastdiff"]
    assert [record["status"] for record in store.load(outcome.path)["rows"]["sampling/a/fastdiff"]] == ["done"]


def test_a_missing_package_is_skipped_by_its_reason_and_asked_for_again(tmp_path):
    rows = Rows("a/diffusers")
    rows.broken["sampling/a/diffusers"] = Skip("diffusers is not installed")
    for _ in range(2):
        outcome = rows.measure(tmp_path)
        assert outcome.skipped == ["sampling/a/diffusers"]
        assert store.newest(store.load(outcome.path), "sampling/a/diffusers")["reason"] == "diffusers is not installed"


def test_the_file_is_whole_after_every_row(tmp_path):
    rows = Rows("a/fastdiff", "b/fastdiff", "c/fastdiff")
    rows.broken["sampling/c/fastdiff"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        rows.measure(tmp_path)
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert list(report["rows"]) == ["sampling/a/fastdiff", "sampling/b/fastdiff"]
    (run,) = report["runs"].values()
    assert run["ceilings"]["copy_bytes_per_s"] == 1e9


def test_the_cache_is_shared_within_a_workload_only(tmp_path):
    rows = Rows("a/fastdiff", "a/diffusers", "b/fastdiff")
    rows.measure(tmp_path)
    assert rows.caches == [{}, {"sampling/a/fastdiff": True}, {}]


def test_a_row_that_took_longer_than_it_says_is_planned_with_what_it_took(tmp_path):
    rows = Rows("a/fastdiff", "a/diffusers", seconds=30.0)
    rows.rows = [Row(key=row.key, expected_s=1.0, run=row.run) for row in rows.rows]
    rows.measure(tmp_path, budget_s=20)
    assert rows.measure(tmp_path, budget_s=20).open == ["sampling/a/diffusers"]


def test_other_sources_get_a_file_of_their_own(tmp_path, monkeypatch):
    rows = Rows("a/fastdiff")
    first = rows.measure(tmp_path)
    monkeypatch.setattr(store, "source_digest", lambda: "changed")
    second = rows.measure(tmp_path)
    assert second.done == ["sampling/a/fastdiff"]
    assert second.path != first.path


def test_two_rows_of_one_key_are_refused(tmp_path):
    rows = Rows("a/fastdiff", "a/fastdiff")
    with pytest.raises(ValueError, match="unique"):
        rows.measure(tmp_path)


@pytest.mark.parametrize("key", ["sampling/a", "sampling/a b/fastdiff", "cooking/a/fastdiff", "sampling//fastdiff"])
def test_a_malformed_key_is_refused(key):
    with pytest.raises(ValueError, match="key must"):
        Row(key=key, expected_s=1.0, run=lambda context: {})


def test_one_line_of_an_error_without_a_message():
    assert one_line(RuntimeError()) == "RuntimeError: no message"
