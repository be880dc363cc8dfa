"""The benchmark of the façades' steps: that it measures what it says."""

import json

import pytest

from benchmarks import facade_step


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(facade_step, "CASES", facade_step.CASES[3:4])
    monkeypatch.setattr(facade_step, "SHAPES", ((1, 4, 8, 8),))


@pytest.mark.usefixtures("one_case")
def test_the_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["facade_step", "--quick", "--out", str(tmp_path)])
    facade_step.main()
    (path,) = tmp_path.glob("facade-step_cpu_*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert case["scheduler"] == "DDIMScheduler"
    assert (case["ops"], case["ops_original"]) == (1, 7)
    assert case["error"] < 1e-5
    assert case["shapes"]["1x4x8x8"]["ours"]["steps"] == 2 * facade_step.STEPS
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
