"""The page: every figure where it belongs, and a dash where there is none."""

import pytest
from hand_made_reports import make_report, record

from benchmarks.page import MISSING, page, show, spread, table, times
from benchmarks.series import series_of


def cells_of(text, first):
    """The cells of the only table line that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_missing_figures_are_dashes():
    text = page(make_report({"sampling/small-b8/fastdiff": record(), "sampling/small-b8/diffusers": record(ms=20.0)}))
    cells = cells_of(text, "diffusers")
    assert cells[1:3] == ["20 (9–12)", "2.00"]
    # nothing but its time was measured
    assert set(cells[3:-1]) == {MISSING}


def test_disturbed_rows_are_marked():
    text = page(make_report({"sampling/a-b1/fastdiff": record(waited=0.5), "sampling/a-b1/diffusers": record()}))
    assert cells_of(text, "fastdiff")[1] == "10 (9–12) *"
    assert cells_of(text, "diffusers")[1] == "10 (9–12)"


def test_a_ratio_across_processes_is_a_dash():
    report = make_report({"sampling/a-b1/fastdiff": record(run="one"), "sampling/a-b1/diffusers": record(run="two")})
    assert times(report, "sampling/a-b1", "diffusers") == MISSING
    assert cells_of(page(report), "diffusers")[2] == MISSING


def test_failures_are_shown_with_their_reasons():
    rows = {
        "sampling/a-b1/fastdiff": record(),
        "sampling/a-b1/diffusers": record(status="failed", reason="RuntimeError: broke | here"),
        "sampling/a-b1/textbook-fp32": record(status="skipped", reason="no package"),
    }
    text = page(make_report(rows))
    assert "| sampling/a-b1/diffusers | failed | RuntimeError: broke \\| here |" in text
    assert cells_of(text, "sampling/a-b1/textbook-fp32")[1:] == ["skipped", "no package"]


def test_kernels_are_held_against_both_floors():
    figures = {"byte_floor_ms": 8.0, "issue_floor_ms": 5.0, "of_copy": 0.8, "bytes_per_element": 8}
    rows = {"kernels/q-sample-fp32/fastdiff": record(**figures), "kernels/q-sample-fp32/eager": record(ms=40.0)}
    lines = [line for line in page(make_report(rows)).splitlines() if line.startswith("| q-sample-fp32 |")]
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert cells[4:6] == ["4.00", MISSING]
    assert cells[6:12] == ["8", "8", MISSING, "5", "1.25", "80%"]


def test_levers_are_shown_on_top_of_one_another():
    chain = {"textbook-fp32": 80.0, "textbook-bf16": 40.0, "ablation-channels-last": 20.0, "fastdiff": 8.0}
    text = page(make_report({f"sampling/a-b1/{name}": record(ms=ms) for name, ms in chain.items()}))
    assert cells_of(text, "+ channels-last")[2:] == ["20", "2.00x", "4.00x"]
    assert cells_of(text, "+ graph")[2:] == ["8", "2.50x", "10.00x"]


def test_shares_of_the_kernel_classes():
    classes = {"convolution": 0.75, "group_norm": 0.2}
    text = page(make_report({"unet/a-b1/fastdiff": record(classes=classes, contender="fastdiff, bf16")}))
    assert cells_of(text, "share of")[1:] == ["convolution", "group_norm"]
    assert [cells for cells in map(str.split, text.splitlines()) if "75%" in cells]


def test_curves_need_two_points_and_keep_what_is_fixed_apart():
    rows = {f"sampling/a-b{batch}/fastdiff": record(images_per_s=float(batch)) for batch in (16, 1)}
    rows |= {f"sampling/a-b1-s{steps}/fastdiff": record(ms=steps, images_per_s=1.0) for steps in (10, 100)}
    found = {(one.title, one.axis): one.points for one in series_of(make_report(rows))}
    assert found == {
        ("sampling/a", "batch"): [(1, 1.0), (16, 16.0)],
        ("sampling/a-b1", "steps"): [(10, 10), (100, 100)],
    }
    assert cells_of(page(make_report(rows)), "images/s, batch")[1:] == ["1", "16"]


@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_an_empty_report_has_a_page(device):
    assert "not measured" in page(make_report({}, device=device))


def test_a_quick_look_says_so():
    assert "no measurement" in page(make_report({}, quick=True))


def test_a_cell_may_hold_a_bar():
    assert table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"
    assert table(["a"], []) == ""


def test_numbers():
    assert show(None) == MISSING
    assert show(0.0) == "0"
    assert spread({}) == MISSING
