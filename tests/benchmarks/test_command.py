"""python -m benchmarks: what it runs, prints and leaves behind."""

import json
from fnmatch import fnmatch

import pytest
import torch
from hand_made_reports import fix_environment

from benchmarks import __main__ as command
from benchmarks import ceilings
from benchmarks.goals import GOALS
from benchmarks.suite import SECTIONS, Row

FIGURES = {"ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "samples_ms": [1.0, 2.0, 3.0]}


@pytest.fixture
def rows(monkeypatch):
    """Two workloads of two contenders each in every section; `rows` lists the keys that were run."""
    ran = []
    fix_environment(monkeypatch)

    def row(key, ms):
        def run(context):
            ran.append(key)
            return FIGURES | {"ms": ms, "low_ms": ms - 1, "high_ms": ms + 1}

        return Row(key=key, expected_s=0.0, run=run)

    def rows_of(sections, device, *, quick):
        return [
            row(f"{section}/{workload}/{contender}", ms)
            for section in sections
            for workload in ("a", "b")
            for contender, ms in (("diffusers", 6.0), ("fastdiff", 2.0))
        ]

    monkeypatch.setattr(command, "rows_of", rows_of)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 64)
    return ran


def run(folder, *arguments):
    return command.main([*arguments, "--device", "cpu", "--quick", "--out", str(folder)])


def test_a_section_leaves_figures_and_their_page(rows, tmp_path, capsys):
    assert run(tmp_path, "sampling") == 0
    assert rows == [f"sampling/{name}" for name in ("a/fastdiff", "a/diffusers", "b/fastdiff", "b/diffusers")]
    (figures,), (text,) = (list(tmp_path.glob(f"speed_cpu_*.{end}")) for end in ("json", "md"))
    assert "| diffusers | 6 (5–7) | 3.00 |" in text.read_text()
    assert "sampling/a: 2 ms; diffusers 3.00x" in capsys.readouterr().out
    (recorded,) = json.loads(figures.read_text())["runs"].values()
    assert recorded["command"].startswith("python -m benchmarks sampling --device cpu")


def test_all_sections_run_and_none_twice(rows, tmp_path):
    assert run(tmp_path, "all") == 0
    assert sorted({key.split("/")[0] for key in rows}) == sorted(SECTIONS)
    count = len(rows)
    assert run(tmp_path, "all") == 0
    assert len(rows) == count


def test_a_filter_brings_ours_along(rows, tmp_path):
    assert run(tmp_path, "unet", "--only", "b/diffusers") == 0
    assert rows == ["unet/b/fastdiff", "unet/b/diffusers"]


def test_no_budget_leaves_all_open(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        command, "rows_of", lambda *_, quick: [Row(key="unet/a/fastdiff", expected_s=9.0, run=lambda context: FIGURES)]
    )
    assert run(tmp_path, "unet", "--budget-s", "1") == 0
    assert "1 open for want of time: run the same command again" in capsys.readouterr().out


def test_a_failed_row_is_the_exit_status(tmp_path, monkeypatch, rows, capsys):
    def fail(context):
        raise RuntimeError("broke")

    monkeypatch.setattr(command, "rows_of", lambda *_, quick: [Row(key="unet/a/fastdiff", expected_s=0.0, run=fail)])
    assert run(tmp_path, "unet") == 1
    assert "unet/a/fastdiff: failed, RuntimeError: broke" in capsys.readouterr().out


def test_every_section_has_rows_for_every_device():
    for device in ("cpu", "cuda"):
        assert set(command.ORDER[device]) == set(SECTIONS) == set(command.MODULES)
        for quick in (False, True):
            found = command.rows_of(list(SECTIONS), torch.device(device), quick=quick)
            assert {row.section for row in found} == set(SECTIONS)
            assert len({row.key for row in found}) == len(found)


def test_every_goal_speaks_of_rows_that_exist():
    for device in ("cpu", "cuda"):
        found = command.rows_of(list(SECTIONS), torch.device(device), quick=False)
        for goal in GOALS:
            if goal.device != device:
                continue
            named = [row for row in found if fnmatch(row.workload, goal.workloads)]
            contenders = {row.key.rsplit("/", 1)[1] for row in named}
            assert "fastdiff" in contenders, goal
            assert not goal.peers or contenders & set(goal.peers), goal


def test_a_cuda_device_that_is_not_there_is_one_sentence(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["all", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --device is cuda, but torch finds no CUDA device\n"
