"""All contenders that run here compute the same, a wrong one is caught, and the arithmetic is put back."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ablation, sampling_rows, unet_rows
from benchmarks.contenders import Contender, Engine, Task, contenders, require
from benchmarks.equivalence import FLOAT32_MARGIN, NotEquivalentError, Oracle
from benchmarks.model_row import ends, flops_of, make_task, oracle_of
from benchmarks.numerics import BFLOAT16, FLOAT32, TF32, Numerics
from benchmarks.suite import Skip
from benchmarks.workloads import MODELS, Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EAGER = [one for one in [*contenders(CPU), *ablation.contenders(CPU)] if not one.compiling]


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(Workload(model="tiny", batch=3), CPU)


@pytest.fixture(scope="module")
def walk_oracle(task: Task) -> Oracle:
    return oracle_of(task, walk=True)


def run(contender: Contender, task: Task, *, walk: bool) -> torch.Tensor:
    if contender.name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    with contender.numerics.installed(), torch.no_grad():
        return ends((contender.walk(task) if walk else contender.forward(task))())


@pytest.mark.parametrize("contender", EAGER, ids=lambda one: one.name)
def test_eager_contenders_walk_as_the_textbook(contender: Contender, task: Task, walk_oracle: Oracle) -> None:
    error, tolerance = walk_oracle.check(run(contender, task, walk=True), contender.numerics)
    assert 0 < error <= tolerance < 1e-5


@pytest.mark.parametrize("contender", EAGER, ids=lambda one: one.name)
def test_eager_contenders_evaluate_as_the_textbook(contender: Contender, task: Task) -> None:
    oracle_of(task, walk=False).check(run(contender, task, walk=False), contender.numerics)


@pytest.mark.parametrize("name", ["fastdiff", "diffusers-best", "textbook-compiled"])
def test_compiled_contenders_walk_as_the_textbook(
    name: str, task: Task, walk_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender = next(one for one in contenders(CPU) if one.name == name)
    assert contender.compiling
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: object) -> object:
        traced.append(name)
        return graph.forward

    # traced whole, but not by Inductor, which takes a minute for this model
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: plain(f, backend=backend, fullgraph=True))
    walk_oracle.check(run(contender, task, walk=True), contender.numerics)
    torch.compiler.reset()
    assert traced == [name]


def test_a_wrong_contender_is_caught(task: Task, walk_oracle: Oracle) -> None:
    engine = Engine(name="fastdiff", title="eager", numerics=FLOAT32)
    for name in ("conv_in.weight", "mid_layers.0.attention.qkv.bias", "up_blocks.1.layers.0.resnet.time_emb_proj.bias"):
        # a hundredth of the weights' own size: a wrong constant, not a wrong shape
        wrong = {**task.weights, name: 1.01 * task.weights[name]}
        with pytest.raises(NotEquivalentError, match="off by"):
            walk_oracle.check(run(engine, replace(task, weights=wrong), walk=True), FLOAT32)


def test_a_wrong_contender_in_bf16_is_caught(task: Task, walk_oracle: Oracle) -> None:
    engine = Engine(name="fastdiff", title="eager", numerics=BFLOAT16)
    walk_oracle.check(run(engine, task, walk=True), BFLOAT16)
    wrong = {**task.weights, "mid_layers.0.resnet.conv2.weight": 2 * task.weights["mid_layers.0.resnet.conv2.weight"]}
    with pytest.raises(NotEquivalentError):
        walk_oracle.check(run(engine, replace(task, weights=wrong), walk=True), BFLOAT16)


def test_nan_and_another_shape_are_not_equivalent(task: Task, walk_oracle: Oracle) -> None:
    expected = walk_oracle.expected.float()
    with pytest.raises(NotEquivalentError, match="off by nan"):
        walk_oracle.check(torch.full_like(expected, float("nan")), BFLOAT16)
    with pytest.raises(NotEquivalentError, match="has shape"):
        walk_oracle.check(expected[:1], FLOAT32)


def test_tolerances_follow_from_the_textbooks_own_errors() -> None:
    def textbook(numerics: Numerics) -> torch.Tensor:
        return torch.tensor([1.0, 1 + {torch.float64: 0, torch.float32: 1e-6, torch.bfloat16: 1e-2}[numerics.dtype]])

    oracle = Oracle(textbook)
    assert oracle.tolerance(BFLOAT16) == pytest.approx(2e-2, rel=1e-3)
    assert oracle.tolerance(TF32) == pytest.approx(2e-2 / 4, rel=1e-3)
    assert oracle.tolerance(FLOAT32) == pytest.approx(FLOAT32_MARGIN * 1e-6, rel=0.1)


def test_switches_are_set_and_put_back() -> None:
    def switches() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark

    before = switches()
    for numerics in (FLOAT32, TF32):
        with numerics.installed():
            assert switches() == (numerics.tf32, numerics.tf32, True)
        assert switches() == before
    with pytest.raises(NotEquivalentError), TF32.installed():
        raise NotEquivalentError
    assert switches() == before


def test_a_missing_package_is_a_skip() -> None:
    with pytest.raises(Skip, match="no_such_package is not installed"):
        require("no_such_package")


@pytest.mark.parametrize("model", MODELS)
def test_models_take_the_operations_they_say(model: str) -> None:
    one = flops_of(Workload(model=model, batch=1))
    assert one / 1e9 == pytest.approx(MODELS[model].gflops, rel=0.03)
    assert flops_of(Workload(model=model, batch=4)) == 4 * one


@pytest.mark.parametrize("module", [sampling_rows, unet_rows], ids=["sampling", "unet"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_rows_have_unique_keys_and_ours_in_every_workload(module, device, quick) -> None:
    rows = module.rows(device, quick=quick)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row.workload for row in rows} == {row.workload for row in rows if row.is_ours}
    assert {row.section for row in rows} == {module.__name__.split(".")[1].removesuffix("_rows")}


def test_the_ablation_has_a_row_for_every_lever() -> None:
    for device, workload, chain in ((CUDA, "cifar10-b1", ablation.CHAIN), (CPU, "small-b8", ablation.CPU_CHAIN)):
        keys = {row.key for row in sampling_rows.rows(device, quick=False)}
        assert {f"sampling/{workload}/{name}" for name in chain.values()} <= keys
