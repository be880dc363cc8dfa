"""The serving benchmark: its trace, its search for the highest rate, and that both servers serve everybody."""

import numpy as np
import pytest
import torch

from benchmarks import serving
from fastdiff.checkpoint import load_model
from fastdiff.generate import packaged_model

CPU = torch.device("cpu")


def test_trace_is_recorded_and_of_unit_rate():
    mix = serving.MIXES["mixed settings"]
    arrivals = serving.trace(mix, 2000)
    assert arrivals == serving.trace(mix, 2000)
    # the mean of 2000 exponential gaps has a standard deviation of 1/sqrt(2000)
    assert abs(np.mean([one.gap for one in arrivals]) - 1) < 4 / 2000**0.5
    assert {one.settings for one in arrivals} == set(mix)


@pytest.mark.parametrize("capacity", [3.7, 40.0, 411.0])
@pytest.mark.parametrize("start", [1.0, 50.0])
def test_highest_rate_is_found_to_its_resolution(capacity, start):
    def server(arrivals, times):
        rate = sum(one.gap for one in arrivals) / times[-1]
        return [0.1 if rate <= capacity else 9.0] * len(arrivals)

    rate, reached = serving.highest_rate(server, serving.trace(serving.MIXES["one setting"], 20), 0.2, start)
    assert reached == pytest.approx(0.1)
    assert capacity / (1 + 1 / serving.RESOLUTION) <= rate <= capacity


@pytest.mark.parametrize("make", [serving.continuous, serving.whole_batch])
def test_every_request_is_served_once_and_latencies_count_the_waiting(make):
    server = make(load_model(packaged_model()), (1, 8, 8), CPU)
    mix = (serving.Settings("ddim", 2), serving.Settings("euler", 3, 1.5))
    arrivals = serving.trace(mix, 6)
    server(arrivals, [0.0] * 6)
    together = server(arrivals, [0.0] * 6)
    apart = server(arrivals, [1000.0 * i for i in range(6)])
    assert all(0 < latency < 900 for latency in (*together, *apart))
    # all at once: somebody waits for all the work there is
    assert max(together) > np.median(apart)


def test_page_has_a_line_for_each_trace():
    rounds = [{"continuous": {"requests_per_s": 30.0}, "whole batch": {"requests_per_s": 20.0}, "ratio": 1.5}]
    report = {
        "command": "x",
        "date": "2026-01-01",
        "environment": {"torch": "2"},
        "device": "CPU",
        "mixes": {"one setting": {"limit_s": 0.2, "rounds": rounds, "ratio": 1.5}},
    }
    assert "| one setting | 200 ms | 30 | 20 | **1.50** (1.50) |" in serving.page(report)
