"""Goals: met, missed, or not measured, and nothing between."""

from hand_made_reports import make_report, record

from benchmarks.goals import DIFFUSERS_BEST, GOALS, Goal, evaluate

CIFAR = "sampling/cifar10-b1"
TEXTBOOK = Goal(device="cuda", workloads=CIFAR, figure="ratio", peers=("textbook-fp32",), at_least=15.0)
BEST = Goal(device="cuda", workloads=CIFAR, figure="ratio", peers=DIFFUSERS_BEST, at_least=1.4)


def only(verdicts):
    (verdict,) = verdicts
    return verdict


def test_a_ratio_is_met_from_its_limit_on():
    for theirs, status in ((150.0, "met"), (149.9, "missed")):
        report = make_report({f"{CIFAR}/fastdiff": record(), f"{CIFAR}/textbook-fp32": record(ms=theirs)})
        verdict = only(evaluate(report, (TEXTBOOK,)))
        assert (verdict.status, verdict.value) == (status, theirs / 10)


def test_rows_of_two_processes_are_never_compared():
    report = make_report({f"{CIFAR}/fastdiff": record(run="one"), f"{CIFAR}/textbook-fp32": record(run="two", ms=1e6)})
    verdict = only(evaluate(report, (TEXTBOOK,)))
    assert (verdict.status, verdict.value) == ("not measured", None)
    assert "one run" in verdict.reason


def test_the_pair_of_one_process_is_found_among_several():
    report = make_report(
        {
            f"{CIFAR}/fastdiff": [record(run="one", ms=10.0), record(run="two", ms=5.0)],
            f"{CIFAR}/textbook-fp32": record(run="one", ms=160.0),
        }
    )
    assert only(evaluate(report, (TEXTBOOK,))).value == 16.0


def test_the_fastest_peer_counts():
    rows = {f"{CIFAR}/fastdiff": record(), f"{CIFAR}/diffusers-best": record(ms=30.0)}
    assert only(evaluate(make_report(rows), (BEST,))).status == "met"
    rows[f"{CIFAR}/diffusers-reduce-overhead"] = record(ms=12.0)
    verdict = only(evaluate(make_report(rows), (BEST,)))
    assert (verdict.status, verdict.peer, verdict.value) == ("missed", "diffusers-reduce-overhead", 1.2)


def test_a_failed_peer_is_no_victory():
    failed = record(status="failed", reason="OutOfMemoryError: no memory")
    report = make_report({f"{CIFAR}/fastdiff": record(), f"{CIFAR}/textbook-fp32": failed})
    verdict = only(evaluate(report, (TEXTBOOK,)))
    assert verdict.status == "not measured"
    assert "no memory" in verdict.reason


def test_a_kernel_is_held_against_the_larger_floor():
    goal = Goal(device="cuda", workloads="kernels/*", figure="times_floor", at_most=1.15)
    for issue, status in ((9.0, "met"), (8.0, "missed"), (None, "not measured")):
        figures = {"byte_floor_ms": 5.0} | ({} if issue is None else {"issue_floor_ms": issue})
        report = make_report({"kernels/q-sample-fp32/fastdiff": record(**figures)})
        assert only(evaluate(report, (goal,))).status == status, issue


def test_bounds_of_one_pass_and_of_two_apply_to_their_own_shapes():
    name = "kernels/group-norm-silu-forward-64x64x320-b256-bf16/fastdiff"
    report = make_report({name: record(of_copy=0.87, bytes_per_element=6.0)})
    shares = [
        verdict for verdict in evaluate(report) if verdict.goal.figure == "of_copy" and "group" in verdict.workload
    ]
    assert [(verdict.goal.at_least, verdict.status) for verdict in shares] == [(0.85, "not measured"), (0.9, "missed")]


def test_a_disturbed_pair_says_so():
    report = make_report({f"{CIFAR}/fastdiff": record(), f"{CIFAR}/textbook-fp32": record(ms=200.0, waited=0.4)})
    assert "40%" in only(evaluate(report, (TEXTBOOK,))).reason


def test_the_bound_is_what_the_peer_spends_in_the_libraries_of_everyone():
    classes = {"convolution": 0.5, "matmul": 0.2, "attention": 0.1, "elementwise": 0.2}
    report = make_report({f"{CIFAR}/fastdiff": record(), f"{CIFAR}/diffusers-best": record(ms=12.0, classes=classes)})
    verdict = only(evaluate(report, (BEST,)))
    assert (verdict.status, verdict.bound) == ("missed", 1.25)


def test_a_quick_look_meets_nothing():
    report = make_report({f"{CIFAR}/fastdiff": record(), f"{CIFAR}/textbook-fp32": record(ms=1e6)}, quick=True)
    assert only(evaluate(report, (TEXTBOOK,))).status == "not measured"


def test_an_empty_report_has_every_goal_of_its_device_unmeasured():
    for device, kind in (("h200", "cuda"), ("cpu", "cpu")):
        verdicts = evaluate(make_report({}, device=device))
        assert len(verdicts) == sum(goal.device == kind for goal in GOALS)
        assert {verdict.status for verdict in verdicts} == {"not measured"}


def test_every_goal_has_one_bound_and_says_it():
    for goal in GOALS:
        assert (goal.at_least is None) != (goal.at_most is None), goal
        assert (goal.figure == "ratio") == bool(goal.peers), goal
        assert "=" in goal.text
