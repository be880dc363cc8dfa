"""Measuring calls: how often, what is counted, what is written down."""

import time

import pytest
import torch

from benchmarks import measurement
from benchmarks.measurement import Measurement, Probe, interleave, measure

CPU = torch.device("cpu")


class Sleeper:
    """Counts its calls, each of which takes some milliseconds."""

    def __init__(self, ms):
        self.ms, self.calls = ms, 0

    def __call__(self):
        self.calls += 1
        time.sleep(self.ms / 1e3)


def test_a_call_is_repeated_until_its_time_is_up():
    call = Sleeper(2.0)
    measured = measure(call, CPU, seconds=0.1)
    # a sleep never ends early
    assert min(measured.samples_ms) >= 2.0
    assert measurement.MIN_REPEATS <= len(measured.samples_ms) <= 50
    assert call.calls > len(measured.samples_ms)


def test_a_long_call_is_repeated_a_few_times_all_the_same():
    measured = measure(Sleeper(20.0), CPU, seconds=0.01)
    assert len(measured.samples_ms) == measurement.MIN_REPEATS_OF_LONG_CALLS


def test_a_short_call_has_a_last_repeat():
    assert len(measure(lambda: None, CPU, seconds=60.0).samples_ms) == measurement.MAX_REPEATS


def test_what_comes_before_a_call_is_outside_its_time():
    before = Sleeper(20.0)
    measured = measure(lambda: None, CPU, seconds=0.05, before=before)
    assert before.calls > len(measured.samples_ms)
    assert sorted(measured.samples_ms)[0] < 20.0


def test_the_probe_takes_its_share():
    measured = measure(Sleeper(5.0), CPU, seconds=0.1, probe=Sleeper(1.0))
    assert 1 <= len(measured.probe_ms) <= len(measured.samples_ms)
    assert min(measured.probe_ms) >= 1.0


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    found = interleave(calls, CPU, seconds=0.01, divide=4)
    turns = len(found["a"].samples_ms)
    assert turns == len(found["b"].samples_ms) >= measurement.MIN_REPEATS
    assert order[-4:] in (["a", "b", "b", "a"], ["b", "a", "a", "b"])


def test_pieces_of_a_call_share_its_time():
    found = interleave({"a": Sleeper(8.0)}, CPU, seconds=0.01, divide=8)
    assert 1.0 <= min(found["a"].samples_ms) < 8.0


def test_figures():
    figures = Measurement(samples_ms=[4.0, 2.0, 1.0, 3.0, 5.0], images=6, waited=0.5).figures()
    assert (figures["ms"], figures["images_per_s"]) == (3.0, 2000.0)
    assert (figures["low_ms"], figures["high_ms"]) == pytest.approx((1.4, 4.6))
    assert figures["samples_ms"] == [4.0, 2.0, 1.0, 3.0, 5.0]
    assert figures["waited"] == 0.5
    assert "peak_memory_mib" not in figures


def test_the_probe_of_a_device_is_the_same_work_every_time():
    probe = Probe(CPU)
    probe()
    product, copy = probe._product.clone(), probe._copy.clone()
    probe()
    assert torch.equal(probe._product, product)
    assert torch.equal(probe._copy, copy)
    assert probe.memory_mib == pytest.approx(3 * 256**2 * 4 / 2**20 + 4)


def test_what_others_took_of_the_processor_is_told_where_the_system_tells():
    waited = measure(lambda: sum(range(10000)), CPU, seconds=0.05).waited
    assert waited is None or 0 <= waited < torch.get_num_threads() + 100
