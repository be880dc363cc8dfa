"""Contenders in turns: who runs when, and what is made of the times."""

import itertools

import pytest
import torch

from benchmarks import paired
from benchmarks.suite import OURS
from benchmarks.workloads import Workload


def test_every_round_runs_each_once_in_an_order_that_turns(monkeypatch):
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in ("a", "b", "c")}
    taken = paired.seconds(calls, 4)
    assert {name: len(values) for name, values in taken.items()} == dict.fromkeys("abc", 4)
    rounds = ["".join(ran[first : first + 3]) for first in range(0, len(ran), 3)]
    # three to warm up
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab", "abc"]


def test_ratios_are_taken_within_a_round():
    ours = [1.0, 2.0, 4.0, 8.0]
    taken = {OURS: ours, "diffusers": [1.5 * value for value in ours], "diffusers-best": [2.0, 4.0, 8.0, 8.0]}
    figures = paired.compare(taken)
    assert figures["ms"] == {OURS: 3000.0, "diffusers": 4500.0, "diffusers-best": 6000.0}
    assert figures["ratios"]["diffusers"] == pytest.approx([1.5, 1.5, 1.5])
    assert figures["ratios"]["diffusers-best"][0] == 2.0


def test_page_names_work_contenders_and_ratios():
    figures = paired.compare({OURS: [0.1, 0.1], "diffusers": [0.13, 0.13]})
    versions = {"torch": "2", "packages": {}, "cpu": "a CPU", "torch_threads": 2}
    report = {"command": "c", "date": "d", "commit": "e", "environment": versions, "work": {"sampling/tiny": figures}}
    assert "| sampling/tiny | diffusers | 130 | **1.30** (1.30–1.30) |" in paired.page(report)


def test_contenders_are_ours_and_two_of_diffusers(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    workload, device = Workload(model="tiny", batch=1), torch.device("cpu")
    for make in (paired.sampling_calls, paired.training_calls):
        calls = make(workload, device)
        assert set(calls) == {OURS, *paired.PEERS}
        for call in itertools.chain(calls.values(), calls.values()):
            call()
