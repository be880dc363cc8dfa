"""Ceilings: their arithmetic, that they are measured, and what the kernel for the issue rate is made of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, issue_rate
from benchmarks.ceilings import Ceilings, measure_ceilings

ONE = Ceilings(copy_bytes_per_s=2e12, matmul_flops_per_s={"bfloat16": 5e14}, instructions_per_s=1e13)


def test_floors():
    assert ONE.copy_ms(4e9) == 2.0
    assert ONE.matmul_ms(1e12, "bfloat16") == 2.0
    assert ONE.matmul_ms(1e12, "float32") is None
    assert ONE.issue_ms(50 * 1e9) == 5.0
    assert Ceilings(copy_bytes_per_s=1.0, matmul_flops_per_s={}).issue_ms(1.0) is None


def test_json_round_trip():
    assert Ceilings.from_json(json.loads(json.dumps(ONE.as_json()))) == ONE


def test_a_cpu_has_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 64)
    allowed = torch.backends.cuda.matmul.allow_tf32
    found = measure_ceilings(torch.device("cpu"), quick=True)
    # from a slow to an impossibly fast machine
    assert 1e7 < found.copy_bytes_per_s < 1e13
    assert 1e6 < found.matmul_flops_per_s["float32"] < 1e14
    assert found.instructions_per_s is None
    assert torch.backends.cuda.matmul.allow_tf32 == allowed


COUNT = """
import collections, re, subprocess, sys, tempfile, json
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks import issue_rate as it
kernel = it.multiply_add_kernel
constants = {"UNROLLED": it.UNROLLED, "BLOCK_SIZE": it.BLOCK_SIZE}
signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n_iterations": "i32", **dict.fromkeys(constants, "constexpr")}
options = {"num_warps": it.NUM_WARPS, "enable_fp_fusion": True}
compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
names = re.findall(r"^\\s+/\\*[0-9a-f]{4,}\\*/\\s+(?:@!?U?P\\w+\\s+)?([A-Z0-9_.]+)", text, re.M)
print(json.dumps(collections.Counter(name for name in names if name != "NOP")))
"""


@pytest.mark.skipif(not issue_rate.AVAILABLE, reason="needs Triton")
def test_the_loop_of_the_issue_rate_is_multiply_adds():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    a_thread = issue_rate.BLOCK_SIZE // (32 * issue_rate.NUM_WARPS)
    wanted = issue_rate.CHAINS * issue_rate.UNROLLED * a_thread
    # the compiler may write some of them twice, for what is left of a further unrolled loop, but drops none
    assert counts["FFMA"] >= wanted
    assert counts["FFMA"] % wanted == 0
    # all else is a few at the start and the end, and five of the loop itself, which is run hundreds of times
    assert sum(counts.values()) - counts["FFMA"] < 0.3 * counts["FFMA"]
