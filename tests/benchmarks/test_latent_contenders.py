"""The accelerated pipeline computes what diffusers' own does, and every goal has its rows."""

from fnmatch import fnmatch

import pytest
import torch

from benchmarks import sampling_rows, training_rows
from benchmarks.equivalence import NotEquivalentError
from benchmarks.goals import DIFFUSERS_BEST, GOALS
from benchmarks.latent_contenders import LatentContender
from benchmarks.latent_rows import flops_and_weights, oracle_of
from benchmarks.numerics import BFLOAT16_STATE, FLOAT32

diffusers = pytest.importorskip("diffusers")

from benchmarks.latent_pipeline import LATENT_MODELS, LatentTask  # noqa: E402
from benchmarks.model_row import ends  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task() -> LatentTask:
    return LatentTask(model="sd-tiny", batch=3, device=CPU)


@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16_STATE], ids=["fp32", "bf16"])
def test_the_accelerated_pipeline_walks_as_diffusers(task: LatentTask, numerics) -> None:
    oracle = oracle_of(task, exact=torch.float64)
    ours = LatentContender(name="fastdiff", title="accelerate", numerics=numerics, accelerated=True)
    error, tolerance = oracle.check(ends(ours.walk(task)(task.spec.steps)), numerics)
    assert 0 < error <= tolerance < (1e-4 if numerics == FLOAT32 else 0.1)


def test_a_wrong_pipeline_is_caught(task: LatentTask, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = oracle_of(task, exact=torch.float64)
    plain = LatentContender(name="diffusers", title="eager", numerics=FLOAT32)
    oracle.check(ends(plain.walk(task)(task.spec.steps)), FLOAT32)
    monkeypatch.setattr("benchmarks.latent_pipeline.GUIDANCE_SCALE", 7.6)
    with pytest.raises(NotEquivalentError):
        oracle.check(ends(plain.walk(task)(task.spec.steps)), FLOAT32)


def test_the_large_model_has_the_size_it_says() -> None:
    _, weights = flops_and_weights(LatentTask(model="sd15", batch=1, device=torch.device("meta")))
    assert f"{weights / 1e6:.1f} M" in LATENT_MODELS["sd15"].description


def test_every_goal_has_its_rows() -> None:
    """A goal whose key no row has would be "not measured" for ever."""
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        rows = [row for module in (sampling_rows, training_rows) for row in module.rows(device, quick=False)]
        keys = {row.key for row in rows}
        for goal in GOALS:
            if goal.device != name or goal.workloads.startswith("kernels/"):
                continue
            workloads = {row.workload for row in rows if fnmatch(row.workload, goal.workloads)}
            assert workloads, goal.workloads
            peers = set(goal.peers) & set(DIFFUSERS_BEST) or set(goal.peers)
            for workload in workloads:
                assert f"{workload}/fastdiff" in keys
                assert not peers or any(f"{workload}/{peer}" in keys for peer in peers), (workload, goal.peers)
