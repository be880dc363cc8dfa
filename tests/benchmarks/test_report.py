"""Result files: merged, written, drawn; and the command line's errors."""

import json

import pytest
from hand_made_reports import make_report, record

from benchmarks import store
from benchmarks.__main__ import main
from benchmarks.report import write_report


def saved(folder, name, rows, **options):
    path = folder / f"{name}.json"
    store.save(make_report(rows, **options), path)
    return path


def test_merging_keeps_every_run_and_the_newest_record_last(tmp_path):
    key = "sampling/a-b1/fastdiff"
    first = saved(tmp_path, "first", {key: record(run="one", ms=10.0)})
    second = saved(tmp_path, "second", {key: record(run="two", ms=9.0), "unet/a-b1/fastdiff": record(run="two")})
    merged = store.merge([store.load(first), store.load(second)])
    assert [one["ms"] for one in merged["rows"][key]] == [10.0, 9.0]
    assert list(merged["runs"]) == ["one", "two"]
    assert store.newest(merged, key)["run"] == "two"
    assert store.newest(merged, key, run="one")["ms"] == 10.0


def test_a_failure_makes_way_for_the_figures_of_a_later_file(tmp_path):
    key = "sampling/a-b1/fastdiff"
    failed = saved(tmp_path, "first", {key: record(run="one", status="failed", reason="x")})
    done = saved(tmp_path, "second", {key: record(run="two")})
    merged = store.merge([store.load(failed), store.load(done)])
    assert [one["status"] for one in merged["rows"][key]] == ["done"]


def test_a_later_failure_is_told_beside_the_earlier_figures(tmp_path):
    key = "sampling/a-b1/fastdiff"
    done = saved(tmp_path, "first", {key: record(run="one")})
    failed = saved(tmp_path, "second", {key: record(run="two", status="failed", reason="x")})
    merged = store.merge([store.load(done), store.load(failed)])
    assert store.newest(merged, key)["status"] == "failed"
    assert store.newest(merged, key, status="done")["run"] == "one"


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"quick": True}])
def test_reports_of_different_kinds_do_not_merge(tmp_path, other):
    files = [saved(tmp_path, "first", {}), saved(tmp_path, "second", {}, **other)]
    with pytest.raises(ValueError, match=f"different {next(iter(other))}"):
        write_report(files, tmp_path / "out")


def test_report_writes_a_file_of_each_kind(tmp_path):
    pytest.importorskip("matplotlib")
    rows = {
        f"sampling/cifar10-b{batch}/{name}": record(
            ms=ms, low_ms=ms, high_ms=ms, images_per_s=batch / ms, flops=1e9, bytes=1e6
        )
        for batch in (1, 16)
        for name, ms in (("fastdiff", 10.0), ("diffusers", 30.0))
    }
    path = saved(tmp_path, "run", rows)
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    stem = "speed_h200_2026-01-02"
    assert set(written) == {f"{stem}{end}" for end in (".json", ".md", ".png", "_roofline.png", "_scaling.png")}
    for name in (f"{stem}.png", f"{stem}_roofline.png", f"{stem}_scaling.png"):
        assert written[name].read_bytes().startswith(b"\x89PNG")
        assert name in written[f"{stem}.md"].read_text()
    assert json.loads(written[f"{stem}.json"].read_text())["rows"].keys() == rows.keys()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ('{"rows": {}}', "is not a report of the benchmark suite"),
        ("[]", "is not a report of the benchmark suite"),
    ],
)
def test_a_file_that_is_no_report_is_named_in_one_sentence(tmp_path, capsys, content, said):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(path) in line
    assert said in line


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path, capsys):
    assert main(["kernels", "--out", str(tmp_path), "--device", "cpu", "--only", "no-such-row"]) == 2
    assert "'no-such-row'" in capsys.readouterr().err


def test_saving_leaves_no_temporary_file(tmp_path):
    path = saved(tmp_path, "run", {})
    assert list(tmp_path.iterdir()) == [path]
