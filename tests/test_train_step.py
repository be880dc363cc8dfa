"""The training iteration: what it reads, what it leaves alone, and that a replay of it is the iteration."""

import dataclasses
import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import train_step
from fastdiff.data import load_dataset
from fastdiff.processes import Processes
from fastdiff.schedule import NoiseSchedule
from fastdiff.train_config import TrainConfig
from fastdiff.train_setup import new_model, objective_for
from fastdiff.train_step import TrainStep
from fastdiff.train_update import learning_rate
from fastdiff.unet import UNetConfig

pytest.importorskip("sklearn")

TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    model_channels=16,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_num_groups=8,
    num_classes=10,
)
# With these, everything random is drawn: flips and dropout besides timesteps, noise and the labels that are left out.
EVERYTHING = {
    "horizontal_flip": True,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.1,
    "weight_decay": 0.1,
    "ema_decay": 0.9,
}


def make(dropout=0.2, device="cpu", dtype=torch.float32, **changes):
    # 50 images in batches of 20: the third batch has images of two epochs
    options = {"batch_size": 20, "warmup_steps": 3, "steps": 5, "cuda_graph": False, "label_dropout": 0.3}
    config = TrainConfig(**{**options, **changes})
    digits = load_dataset("digits")
    dataset = dataclasses.replace(digits, images=digits.images[:50], labels=digits.labels[:50]).to(device)
    model = new_model(config, dataclasses.replace(TINY, dropout=dropout), torch.device(device))
    objective = objective_for(config, NoiseSchedule.cosine(), model, dataset, dtype)
    return TrainStep(model, objective, dataset, config)


def everything(step):
    averages = {f"ema.{name}": value for name, value in step.ema.model.state_dict().items()}
    return {**step.state(), **averages}


def run(step, steps):
    """The results of every step, and the state after the last one."""
    results = []
    for number in range(steps):
        results += [value.clone() for value in step(number)]
    return results, everything(step)


def assert_same(left, right):
    (results, state), (other_results, other_state) = left, right
    assert all(torch.equal(one, other) for one, other in zip(results, other_results))
    assert [name for name in state if not torch.equal(state[name], other_state[name])] == []


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on any device: the operators of a call, run again on the same memory without its Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        self.calls.append((function, arguments, keywords, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, arguments, keywords, result in self.calls:
            again = function(*arguments, **keywords)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(step, reset, device, pool):
    """Stands in for `fastdiff.cuda_graph.capture`."""
    for _ in range(2):
        reset()
        step()
    recording = Recording()
    with recording:
        step()
    return recording.replay, None


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_replayed_iteration_is_the_iteration(changes, monkeypatch):
    """The replay runs no Python: a number of the host in the iteration would stay what it was in the first step."""
    monkeypatch.setattr(train_step, "capture", record)
    replayed = make(**changes)
    replayed._captures = True
    assert_same(run(replayed, 5), run(make(**changes), 5))


def test_nothing_that_lasts_is_allocated_anew():
    step = make(dropout=0.0)
    step(0)
    before = {name: value.data_ptr() for name, value in everything(step).items()}
    outputs = [value.data_ptr() for value in step(1)]
    assert before == {name: value.data_ptr() for name, value in everything(step).items()}
    assert outputs == [value.data_ptr() for value in step(2)]
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_what_cannot_be_captured_runs_eagerly_with_one_warning(monkeypatch):
    def fail(step, reset, device, pool):
        reset()
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(train_step, "capture", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step = make()
    step._captures = True
    with pytest.warns(UserWarning, match="runs eagerly: operation not permitted when stream is capturing$") as caught:
        results = run(step, 2)
    assert len(caught) == 1
    assert_same(results, run(make(), 2))  # the warm-up has left nothing behind


def test_without_memory_to_go_back_after_the_warm_up_the_step_runs_eagerly(monkeypatch):
    step = make()
    step._captures = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clone, failures = torch.Tensor.clone, iter([False, False, True])

    def run_out(tensor, **keywords):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(tensor, **keywords)

    monkeypatch.setattr(torch.Tensor, "clone", run_out)
    with pytest.warns(UserWarning, match="runs eagerly: CUDA out of memory$"):
        step(0)
    monkeypatch.undo()
    other = make()
    other(0)
    assert_same(([], everything(step)), ([], everything(other)))


@pytest.mark.parametrize(("processes", "pieces", "enough"), [(2, 1, 4), (5, 1, 10), (5, 2, 20)])
def test_several_processes_are_told_how_many_pieces_come_next(processes, pieces, enough):
    step = make()
    step._processes, step._pieces = Processes(0, processes, 0), pieces
    with pytest.raises(torch.OutOfMemoryError, match=f"gradient_accumulation_steps must be {enough} or more$"):
        step._cut_finer(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_captured_iteration_is_the_iteration(changes):
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = run(make(device="cuda", cuda_graph=True, **changes), 5)
        assert_same(captured, run(make(device="cuda", **changes), 5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device, got cpu"):
        make(cuda_graph=True)
    make(cuda_graph="auto")(0)


def test_autocast_casts_each_weight_once_a_step():
    step = make(dropout=0.0, dtype=torch.bfloat16, gradient_accumulation_steps=2)
    step(0)
    recording = Recording()
    with recording:
        step(1)
    to_copy = torch.ops.aten._to_copy.default
    casts = [arguments[0].data_ptr() for function, arguments, _, _ in recording.calls if function is to_copy]
    counts = {name: casts.count(weight.data_ptr()) for name, weight in step.model.named_parameters()}
    assert max(counts.values()) == 1
    assert counts["conv_in.weight"] == 1


def test_cudnn_may_time_its_algorithms_only_while_a_compiled_step_runs(monkeypatch):
    seen = []

    def call(self, *args, **kwargs):
        seen.append(torch.backends.cudnn.benchmark)
        return self._eager(*args, **kwargs)

    monkeypatch.setattr(train_step.CompiledOrEager, "__call__", call)
    make(compile=True)(0)
    assert (seen, torch.backends.cudnn.benchmark) == ([True], False)


def test_load_state_takes_over_everything():
    source, target = make(), make(seed=1)
    run(source, 2)
    averages = {name: value.clone() for name, value in source.ema.model.state_dict().items()}
    target.load_state(averages, {name: value.clone() for name, value in source.state().items()})
    assert_same(([], everything(source)), ([], everything(target)))


def test_learning_rate_by_step():
    config = TrainConfig(learning_rate=0.01, warmup_steps=4, steps=8)
    assert [learning_rate(config, step) for step in (0, 3, 4, 6)] == pytest.approx([0.0025, 0.01, 0.01, 0.005])
    constant = dataclasses.replace(config, lr_schedule="constant")
    assert learning_rate(constant, 7) == 0.01


def test_forward_and_backward_compile_once_and_whole(needs_cxx):
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        results, _ = run(make(dropout=0.0, compile=True), 3)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1
    for one, other in zip(results, run(make(dropout=0.0), 3)[0]):
        # Some hundred operations, each with a rounding of 6e-8 or sums in another order; two AdamW steps at their
        # start, which move by the learning rate, 1e-3, whatever the size of a gradient, where that is only rounding.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
