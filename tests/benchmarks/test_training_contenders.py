"""All trainers that run here make the same update, and a wrong one is caught."""

from dataclasses import replace

import pytest
import torch

from benchmarks import training_rows
from benchmarks.equivalence import NotEquivalentError, Oracle
from benchmarks.numerics import BFLOAT16
from benchmarks.training_contenders import EngineTrainer, TextbookTrainer, Trainer, trainers
from benchmarks.training_rows import oracle_of, steps_of, update_of
from benchmarks.training_task import ContractDraws, TorchDraws, TrainingTask
from benchmarks.workloads import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# compiled, the step is the same code: the engine's is checked compiled in the tests of train_step
EAGER = [replace(one, compiling=0) for one in trainers(CPU) if one.name != "diffusers-best"]


@pytest.fixture(scope="module")
def task() -> TrainingTask:
    return TrainingTask.of(Workload(model="tiny", batch=3), CPU)


@pytest.fixture(scope="module")
def oracle(task: TrainingTask) -> Oracle:
    return oracle_of(task)


@pytest.mark.parametrize("trainer", EAGER, ids=lambda one: one.name)
def test_trainers_update_as_the_textbook(trainer: Trainer, task: TrainingTask, oracle: Oracle) -> None:
    if trainer.name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    training = trainer.begin(task)
    error, tolerance = oracle.check(update_of(training, task), trainer.numerics)
    assert 0 < error <= tolerance < 1e-2
    assert training.activation_bytes is not None
    # at least the input of every convolution of the widest level
    assert training.activation_bytes > 3 * 32 * 16 * 16 * 4
    before = [weight.clone() for weight in training.weights()[0].values()]
    steps_of(training)()
    assert any(not torch.equal(old, new) for old, new in zip(before, training.weights()[0].values()))


def test_the_engine_under_autocast_updates_as_the_textbook(task: TrainingTask, oracle: Oracle) -> None:
    training = EngineTrainer(name="fastdiff", title="eager", numerics=BFLOAT16).begin(task)
    error, tolerance = oracle.check(update_of(training, task), BFLOAT16)
    assert error <= tolerance < 0.3


def test_a_wrong_step_is_caught(task: TrainingTask, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TextbookTrainer(name="textbook-fp32", title="textbook", numerics=EAGER[0].numerics)
    options = task.options
    for wrong in ({"learning_rate": 2.02e-4}, {"ema_decay": 0.05}, {"weight_decay": 0.1}):
        monkeypatch.setattr(TrainingTask, "options", replace(options, **wrong))
        with pytest.raises(NotEquivalentError):
            oracle.check(update_of(trainer.begin(task), task), trainer.numerics)


def test_both_kinds_of_draws_have_the_same_shapes_and_ranges(task: TrainingTask) -> None:
    drawn = [kind(task)(0) for kind in (ContractDraws, TorchDraws)]
    for draw in drawn:
        assert draw.images.shape == draw.noise.shape == task.workload.shape
        assert draw.images.dtype == torch.uint8
        assert draw.noise.dtype == torch.float32
        assert draw.timesteps.shape == (3,)
        assert 0 <= draw.timesteps.min() <= draw.timesteps.max() < 1000
    assert not torch.equal(ContractDraws(task)(0).noise, ContractDraws(task)(1).noise)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_rows_have_unique_keys_and_ours_in_every_workload(device: torch.device, quick: bool) -> None:
    rows = training_rows.rows(device, quick=quick)
    assert len({row.key for row in rows}) == len(rows)
    assert {row.workload for row in rows} == {row.workload for row in rows if row.is_ours}
    assert {row.section for row in rows} == {"training"}
