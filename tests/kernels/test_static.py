"""What the compiled kernels cost, for five GPU architectures and without a GPU: spills, passes, widths, listings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from static_check import CASES

from fastdiff.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@pytest.fixture(scope="module")
def costs(request) -> dict:
    """Every case compiled in one process without the interpreter, which cannot compile kernels that call functions."""
    script = Path(__file__).with_name("static_check.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{'sm_90, per element':38} {'instructions':>12} {'bytes':>6} {'registers':>9}")
        for name, targets in costs.items():
            figures = targets["sm_90"]
            print(
                f"{name:38} {figures['instructions']:8.1f}/{CASES[name].instructions:<3} "
                f"{figures['bytes_per_element']:6} {figures['registers']:9}"
            )
    return costs


@pytest.mark.parametrize("name", CASES)
def test_no_spills_and_no_shared_memory_on_any_target(name, costs):
    for target, figures in costs[name].items():
        assert figures["spilled"] == 0, target
        assert CASES[name].shared or figures["shared"] == 0, target
        assert figures["fp_fusion"] is False, "the launch must switch contraction off"


@pytest.mark.parametrize("name", CASES)
def test_instructions_per_element_are_within_budget(name, costs):
    assert costs[name]["sm_90"]["instructions"] <= CASES[name].instructions


@pytest.mark.parametrize("name", CASES)
def test_one_pass_over_memory(name, costs):
    assert costs[name]["sm_90"]["bytes_per_element"] == CASES[name].bytes_per_element


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.vectorised])
def test_accesses_are_wide(name, costs):
    figures = costs[name]["sm_90"]
    assert figures["wide"] >= figures["wide_expected"]
    assert figures["half"] >= figures["half_expected"]
