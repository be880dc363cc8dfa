"""The sampling loop: any table, any device path, and the promises about noise, guidance, dtypes and errors."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff import cuda_graph, noise
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import Row, StepTable, run_table

SOLVERS = ("ddpm", "ddim", "euler", "euler_a", "dpmpp_2m")
SHAPE = (3, 2, 5, 4)
STREAM_NAMES = {0: "initial", 1: "step"}


def smooth_model(x: Tensor, t: Tensor, **_) -> Tensor:
    """A deterministic stand-in for a network: bounded, elementwise, and different at every timestep."""
    return torch.tanh(0.5 * x + 0.001 * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))


class Labelled(nn.Module):
    """A class-conditional model that records the batches it sees."""

    null_class = 4

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=dtype))
        self.calls = []

    def forward(self, x, t, class_labels):
        self.calls.append((x.dtype, x.shape[0], class_labels.tolist(), t))
        return self.scale * x + 0.1 * class_labels.to(x.dtype).view(-1, 1, 1, 1)


def make(model=smooth_model, solver="ddim", steps=4, schedule=None, **kwargs) -> Sampler:
    schedule = schedule or NoiseSchedule.linear()
    return Sampler(model, schedule, solver=solver, num_inference_steps=steps, **kwargs)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 7), SHAPE, (2, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_loop_equals_the_table_in_float64(solver, shape):
    """Coefficients are exact to half an ulp and a row rounds a few times: 32 ulp of the largest state for each row."""
    sampler = make(solver=solver, steps=6, clip_sample=1.5)
    got = sampler.sample(shape, seed=11)

    def step_noise(stream: int, draw: int) -> Tensor:
        return noise.normal(shape, seed=11, stream=STREAM_NAMES[stream], draw=draw).double()

    x = noise.normal(shape, seed=11, stream="initial").double()
    largest = []

    def model(x: Tensor, t: float) -> Tensor:
        largest.append(x.abs().max())
        return smooth_model(x, torch.full((shape[0],), t))

    want = run_table(sampler.table, model, x * sampler.table.init_noise_sigma, step_noise)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 32 * 2**-23 * max(largest) * len(sampler.table)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_of_8_is_8_batches_of_1(solver):
    sampler = make(solver=solver, solver_options={"eta": 0.7} if solver == "ddim" else None)
    together = sampler.sample((8, 3, 6, 6), seed=2**45 + 1)
    alone = [sampler.sample((1, 3, 6, 6), seed=2**45 + 1, sample_indices=torch.tensor([i])) for i in range(8)]
    # this model is elementwise, so nothing but the noise could differ
    assert torch.equal(together, torch.cat(alone))
    shuffled = torch.tensor([5, 0, 7])
    assert torch.equal(sampler.sample((3, 3, 6, 6), seed=2**45 + 1, sample_indices=shuffled), together[shuffled])


def test_samples_differ_by_seed_and_by_index():
    sampler = make(solver="ddpm")
    first = sampler.sample(SHAPE, seed=0)
    assert torch.equal(first, sampler.sample(SHAPE, seed=0))
    assert not torch.equal(first, sampler.sample(SHAPE, seed=1))
    assert not torch.equal(first[0], first[1])
    per_sample = sampler.sample(SHAPE, seed=torch.tensor([0, 1, 0]))
    assert torch.equal(per_sample[0], first[0])
    assert torch.equal(per_sample[1], sampler.sample(SHAPE, seed=1)[1])


def test_given_noise_is_scaled_by_the_sampler():
    sampler = make(solver="euler")
    z = noise.normal(SHAPE, seed=5, stream="initial")
    assert torch.equal(sampler.sample(SHAPE, noise=z), sampler.sample(SHAPE, seed=5))


@pytest.mark.parametrize("sigma_spacing", [None, "karras"])
def test_model_gets_whole_timesteps_as_int64_and_others_as_float32(sigma_spacing):
    seen = []

    def model(x, t):
        seen.append(t)
        return smooth_model(x, t)

    make(model, solver="dpmpp_2m", sigma_spacing=sigma_spacing).sample(SHAPE)
    assert all(t.shape == SHAPE[:1] for t in seen)
    assert {t.dtype for t in seen} == {torch.int64 if sigma_spacing is None else torch.float32}


def test_guidance_is_one_batched_call_uncond_first_with_the_null_class():
    model = Labelled()
    labels = torch.tensor([0, 1, 3])
    sampler = make(model, guidance_scale=3.0)
    guided = sampler.sample(SHAPE, seed=4, model_kwargs={"class_labels": labels})
    assert [call[1:3] for call in model.calls] == [(6, [4, 4, 4, 0, 1, 3])] * 4
    by_hand = make(
        lambda x, t: model(x, t, torch.full((3,), 4)) + 3.0 * (model(x, t, labels) - model(x, t, torch.full((3,), 4)))
    ).sample(SHAPE, seed=4)
    # guidance amplifies the rounding of the two outputs, about 0.3 * |x| each, by its scale of 3
    torch.testing.assert_close(guided, by_hand, rtol=0, atol=4 * 3 * 2**-23 * float(by_hand.abs().max()) * 4)


def test_rows_outside_the_guidance_interval_evaluate_the_conditional_half_only():
    model = Labelled()
    sampler = make(model, steps=5, guidance_scale=3.0, guidance_interval=(0.3, 0.7))
    sampler.sample(SHAPE, model_kwargs={"class_labels": torch.tensor([0, 1, 2])})
    batches = [call[1] for call in model.calls]
    assert batches == [6 if g != 1 else 3 for g in sampler.table.columns["g"]]
    assert set(batches) == {3, 6}
    assert all(call[2] == [0, 1, 2] for call in model.calls if call[1] == 3)


def test_uncond_kwargs_join_tensors_and_pass_the_rest_once():
    seen = []

    def model(x, t, context, table, flag):
        seen.append((context, table, flag))
        return smooth_model(x, t)

    cond, uncond, table = torch.ones(3, 7, 2), torch.zeros(3, 7, 2), torch.arange(5.0)
    make(model, guidance_scale=2.0).sample(
        SHAPE, model_kwargs={"context": cond, "table": table, "flag": "on"}, uncond_kwargs={"context": uncond}
    )
    context, passed, flag = seen[0]
    assert torch.equal(context, torch.cat([uncond, cond]))
    assert torch.equal(passed, table)
    assert flag == "on"


def test_nested_model_arguments_are_joined_by_their_place():
    seen = []

    def model(x, t, added):
        seen.append(added)
        return smooth_model(x, t)

    cond = {"ids": [torch.ones(3, 2), "plain"], "scale": torch.tensor(2.0)}
    uncond = {"ids": [torch.zeros(3, 2), "plain"]}
    make(model, guidance_scale=2.0).sample(SHAPE, model_kwargs={"added": cond}, uncond_kwargs={"added": uncond})
    assert torch.equal(seen[0]["ids"][0], torch.cat([torch.zeros(3, 2), torch.ones(3, 2)]))
    assert seen[0]["ids"][1] == "plain"
    assert seen[0]["scale"] == 2.0
    with pytest.raises(ValueError, match=r"added\.ids\.0"):
        make(model, guidance_scale=2.0).sample(SHAPE, model_kwargs={"added": cond}, uncond_kwargs={"added": {}})


def test_guidance_scale_1_takes_and_ignores_uncond_kwargs():
    context = {"context": torch.ones(3, 1)}
    calls = []

    def model(x, t, context):
        calls.append(x.shape[0])
        return smooth_model(x, t)

    make(model, guidance_scale=1.0).sample(SHAPE, model_kwargs=context, uncond_kwargs=context)
    assert set(calls) == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_runs_in_its_own_dtype_and_the_state_stays_float32(dtype):
    model = Labelled(dtype)
    result = make(model).sample(SHAPE, model_kwargs={"class_labels": torch.zeros(3, dtype=torch.int64)})
    assert {call[0] for call in model.calls} == {dtype}
    assert result.dtype == torch.float32


def test_another_dtype_means_autocast_and_leaves_the_model_alone():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)
            self.seen = []

        def forward(self, x, t):
            out = self.layer(x)
            self.seen.append((x.dtype, out.dtype))
            return out

    model = Convolution()
    make(model, dtype=torch.bfloat16).sample(SHAPE)
    assert set(model.seen) == {(torch.float32, torch.bfloat16)}
    assert model.layer.weight.dtype == torch.float32


def test_objects_with_a_sample_attribute_and_learned_variance_are_understood():
    tensor = make(solver="ddpm").sample(SHAPE, seed=3)
    wrapped = make(lambda x, t: SimpleNamespace(sample=smooth_model(x, t)), solver="ddpm")
    assert torch.equal(wrapped.sample(SHAPE, seed=3), tensor)

    def learned(x, t):
        return torch.cat([smooth_model(x, t), -torch.ones_like(x)], 1)

    # v = -1 is the lower end of the range: the posterior variance itself (Nichol & Dhariwal 2021, equation 15). A row
    # rounds about five times, so four rows cost 20 * 6e-8 = 1.2e-6 of a value's size on the way, which may be several
    # times its final one.
    sampler = make(learned, solver="ddpm", solver_options={"variance": "learned_range"})
    torch.testing.assert_close(sampler.sample(SHAPE, seed=3), tensor, rtol=1e-5, atol=1e-5)


def test_img2img_starts_at_the_strength_from_the_noised_image():
    schedule = NoiseSchedule.linear()
    image = torch.rand(SHAPE) * 2 - 1
    starts = []

    def model(x, t):
        starts.append((x.clone(), int(t[0])))
        return smooth_model(x, t)

    make(model, steps=10, schedule=schedule).sample(SHAPE, seed=1, init_image=image, strength=0.3)
    assert len(starts) == 3
    x, t = starts[0]
    want = schedule.alpha[t] * image + schedule.sigma[t] * noise.normal(SHAPE, seed=1, stream="initial")
    # three roundings of 6e-8 each on values below 5
    torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)


def test_dynamic_threshold_bounds_the_data_prediction():
    """One row from a table whose x_next is x0: every sample is clipped to its own quantile and divided by it."""
    table = StepTable.from_rows([Row(pm=1.0, c0=1.0)])
    scale = torch.tensor([0.1, 3.0, 9.0]).view(3, 1, 1, 1)
    output = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * scale
    sampler = Sampler(lambda x, t: output, NoiseSchedule.linear(), solver=table, dynamic_threshold=0.8)
    s = np.maximum(np.quantile(output.abs().flatten(1).numpy(), 0.8, axis=1), 1.0).astype(np.float32)
    want = np.clip(output.numpy(), -s[:, None, None, None], s[:, None, None, None]) / s[:, None, None, None]
    # the quantile interpolates and the division rounds: a few roundings of 6e-8
    np.testing.assert_allclose(sampler.sample(SHAPE).numpy(), want, rtol=1e-6)


def test_in_painting_rows_follow_the_known_image():
    table = StepTable.from_rows([Row(cx=1.0, k0=0.5, kz=2.0, draws=True, ev=False)])
    known, mask = torch.rand(SHAPE), torch.zeros(1, 1, 5, 4)
    mask[..., 2:] = 1
    result = Sampler(smooth_model, NoiseSchedule.linear(), solver=table).sample(SHAPE, seed=2, known=known, mask=mask)
    z = noise.normal(SHAPE, seed=2, stream="step")
    start = noise.normal(SHAPE, seed=2, stream="initial")
    # 0.5 * known is exact, 2 * z too: the sum and the blend round once each, 1.2e-7 of the value
    torch.testing.assert_close(result, torch.where(mask.bool(), 0.5 * known + 2 * z, start), rtol=1e-6, atol=1e-6)


def test_callback_sees_every_row_and_may_replace_the_latents():
    rows = []

    def callback(sampler, i, t, tensors):
        rows.append((i, t))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else None

    inputs = []

    def model(x, t):
        inputs.append(x.clone())
        return smooth_model(x, t)

    sampler = make(model, solver="euler", steps=4)
    sampler.sample(SHAPE, callback_on_step_end=callback)
    assert rows == list(enumerate(sampler.table.columns["t"].tolist()))
    assert torch.equal(inputs[2], torch.zeros(SHAPE))
    assert inputs[3].abs().max() > 0


def test_latents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"callback_on_step_end must return latents of shape .*, got \[1\]"):
        make().sample(SHAPE, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})
    with pytest.raises(TypeError, match="noise must be a tensor, got str"):
        make().sample(SHAPE, noise="gaussian")


def test_latents_changed_in_place_reach_the_model():
    inputs = []

    def model(x, t):
        inputs.append(x.clone())
        return smooth_model(x, t)

    def callback(sampler, i, t, tensors):
        tensors["latents"].zero_()

    make(model, solver="euler").sample(SHAPE, callback_on_step_end=callback)
    assert inputs[0].abs().max() > 0
    assert all(torch.equal(x, torch.zeros(SHAPE)) for x in inputs[1:])


def test_no_host_synchronisation_inside_the_loop():
    """.item(), a branch on a tensor and .tolist() all read a value on the host through aten::_local_scalar_dense."""

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    sampler = make(solver="ddpm", guidance_scale=2.0)
    with Recorder():
        sampler.sample(SHAPE, model_kwargs={"context": torch.ones(3)}, uncond_kwargs={"context": torch.zeros(3)})
        first_row = next(i for i, name in enumerate(names) if "index_select" in name)
        assert not any("_local_scalar_dense" in name for name in names[first_row:])
        torch.ones(1).item()
    assert "_local_scalar_dense" in names[-1]


def test_threads_share_a_sampler():
    sampler = make(solver="dpmpp_2m", steps=6)
    want = [sampler.sample(SHAPE, seed=seed) for seed in range(4)]
    failures = []

    def work(seed: int) -> None:
        failures.extend(seed for _ in range(10) if not torch.equal(sampler.sample(SHAPE, seed=seed), want[seed]))

    threads = [threading.Thread(target=work, args=(seed % 4,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.fixture
def captured(monkeypatch):
    """Runs the graph path on any machine: what a capture would replay is the step itself."""
    captures = []

    def capture(step, reset, device, pool):
        for _ in range(cuda_graph.WARMUP_CALLS):
            reset()
            step()
        captures.append(step)
        return step, None

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(Sampler, "_captures", lambda self, device: self.cuda_graph is not False)
    return captures


@pytest.mark.parametrize("solver", SOLVERS)
def test_static_buffers_give_what_fresh_ones_give(solver, captured):
    options = {"solver": solver, "steps": 5, "guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}
    sampler, eager = make(Labelled(), **options), make(Labelled(), **options, cuda_graph=False)
    results = [
        sampler.sample(SHAPE, seed=seed, model_kwargs={"class_labels": torch.tensor([seed, 0, 1])})
        for seed in (0, 1, 2)
    ]
    assert len(captured) == 2  # guided and unguided rows, captured once
    for seed, result in enumerate(results):
        want = eager.sample(SHAPE, seed=seed, model_kwargs={"class_labels": torch.tensor([seed, 0, 1])})
        assert torch.equal(result, want)


def test_graphs_are_told_apart_by_what_they_bake_in(captured):
    model = nn.Conv2d(2, 2, 1)
    sampler = make(lambda x, t, **kwargs: model(x), steps=2)
    tensor, other = torch.zeros(3), torch.ones(3)
    for kwargs in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": {"b": tensor}}, {"a": {"b": other}}):
        sampler.sample(SHAPE, model_kwargs=kwargs)
    assert len(captured) == 3
    sampler.sample(SHAPE, model_kwargs={"a": object()})  # nothing tells two of these apart: eager
    assert len(captured) == 3
    with torch.inference_mode():
        sampler.sample(SHAPE, model_kwargs={"a": 1})
    with torch.autocast("cpu", torch.bfloat16):
        sampler.sample(SHAPE, model_kwargs={"a": 1})
    assert len(captured) == 5


def test_graphs_follow_the_weights_of_a_module(captured):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)

        def forward(self, x, t):
            return self.layer(x)

    model = Model()
    sampler = make(model, steps=2)
    first = sampler.sample(SHAPE)
    nn.init.zeros_(model.layer.weight)  # in place: the graph sees it
    assert not torch.equal(sampler.sample(SHAPE), first)
    assert len(captured) == 1
    model.layer.weight = nn.Parameter(torch.ones_like(model.layer.weight))
    sampler.sample(SHAPE)
    assert len(captured) == 2


def test_at_most_eight_graphs_are_kept(captured):
    sampler = make(steps=2)
    for batch in range(1, 12):
        sampler.sample((batch, 1, 2, 2))
    assert len(sampler._graphs) == cuda_graph.MAX_ENTRIES
    captures = len(captured)
    sampler.sample((11, 1, 2, 2))
    assert len(captured) == captures
    sampler.sample((1, 1, 2, 2))
    assert len(captured) == captures + 1


def test_what_cannot_be_captured_runs_eagerly_with_one_warning(monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\ndetails")

    monkeypatch.setattr(cuda_graph, "capture", refuse)
    want = make().sample(SHAPE, seed=1)
    monkeypatch.setattr(Sampler, "_captures", lambda self, device: True)
    sampler = make()
    with pytest.warns(UserWarning, match="not permitted when stream is capturing") as record:
        first, second = sampler.sample(SHAPE, seed=1), sampler.sample(SHAPE, seed=1)
    assert len(record) == 1
    assert torch.equal(first, want)
    assert torch.equal(second, want)


def test_a_broken_compiler_gives_the_eager_result_and_one_warning(monkeypatch):
    def broken_compile(function, **_):
        def call(*_, **__):
            raise RuntimeError("no C++ compiler found")

        return call

    want = make().sample(SHAPE)
    monkeypatch.setattr(torch, "compile", broken_compile)
    sampler = make(compile=True)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found") as record:
        first, second = sampler.sample(SHAPE), sampler.sample(SHAPE)
    assert len(record) == 1
    assert torch.equal(first, want)
    assert torch.equal(second, want)


def test_compiled_model_gives_the_eager_result(needs_cxx):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))
    results = [make(lambda x, t: model(x), compile=compile).sample(SHAPE, seed=1) for compile in (False, True)]
    # sums of up to 36 products in another order, 36 * 6e-8 = 2e-6, in two layers through four rows: 2e-5 of the terms,
    # which may be several times their sum
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "heunn"}, "heunn"),
        ({"steps": 0}, "num_inference_steps"),
        ({"steps": 1001}, "num_inference_steps"),
        ({"steps": None}, "num_inference_steps"),
        ({"prediction_type": "eps"}, "prediction_type"),
        ({"timestep_spacing": "even"}, "spacing"),
        ({"sigma_spacing": "carras"}, "sigma_spacing"),
        ({"clip_sample": -1.0}, "clip_sample"),
        ({"dynamic_threshold": 1.5}, "dynamic_threshold"),
        ({"guidance_interval": (0.2, 0.8)}, "guidance_scale"),
        ({"solver_options": {"etta": 1.0}}, "etta"),
        ({"cuda_graph": "yes"}, "cuda_graph"),
        ({"device": "nowhere"}, "device"),
        ({"dtype": torch.int8}, "dtype"),
        ({"model": Labelled(torch.bfloat16), "dtype": torch.float32}, "dtype"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_constructor_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (3,)}, "shape"),
        ({"seed": -1}, "seed"),
        ({"seed": torch.tensor([0, -1, 0])}, "seed"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed"),
        ({"sample_indices": torch.arange(4)}, "sample_indices"),
        ({"noise": torch.zeros(3, 2, 5, 5)}, "noise"),
        ({"init_image": torch.zeros(1, 2, 5, 4), "strength": 0.5}, "init_image"),
        ({"init_image": torch.zeros(SHAPE), "strength": 0.0}, "strength"),
        ({"strength": 0.5}, "strength"),
        ({"mask": torch.ones(SHAPE)}, "known"),
        ({"uncond_kwargs": {"context": torch.zeros(3)}}, "guidance_scale"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_sample_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().sample(**({"shape": SHAPE} | arguments))


def test_guidance_without_an_unconditional_input_is_an_error():
    with pytest.raises(ValueError, match="uncond_kwargs"):
        make(guidance_scale=2.0).sample(SHAPE)
    with pytest.raises(ValueError, match="context"):
        make(guidance_scale=2.0).sample(SHAPE, uncond_kwargs={"context": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="class_labels"):
        make(Labelled(), guidance_scale=2.0).sample(SHAPE, model_kwargs={"class_labels": torch.tensor([0, 1, 5])})


def test_a_model_of_another_shape_or_type_is_an_error():
    with pytest.raises(ValueError, match="model must return"):
        make(lambda x, t: x[:, :1]).sample(SHAPE)
    with pytest.raises(TypeError, match="model must return"):
        make(lambda x, t: None).sample(SHAPE)
    with pytest.raises(ValueError, match=r"model must return a tensor of shape \[3, 4, 5, 4\]"):
        make(solver="ddpm", solver_options={"variance": "learned_range"}).sample(SHAPE)


def test_arguments_of_another_type_are_errors():
    with pytest.raises(TypeError, match="schedule"):
        Sampler(smooth_model, None, solver="ddim", num_inference_steps=2)
    with pytest.raises(TypeError, match="solver"):
        make(solver=["ddim"])
    with pytest.raises(TypeError, match="noise"):
        make().sample(SHAPE, noise=np.zeros(SHAPE))


def test_empty_batches_give_empty_tensors():
    assert make().sample((0, 2, 5, 4)).shape == (0, 2, 5, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_rows_equal_eager_ones_without_host_synchronisation():
    model = nn.Conv2d(2, 2, 3, padding=1).cuda()
    kwargs = {"model": lambda x, t: model(x), "device": "cuda", "solver": "ddpm", "steps": 20}
    eager, graph = make(**kwargs, cuda_graph=False), make(**kwargs, cuda_graph=True)
    first = graph.sample(SHAPE, seed=1)
    kept = first.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = graph.sample(SHAPE, seed=2)
        eager_second = eager.sample(SHAPE, seed=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, kept)
    assert torch.equal(second, eager_second)
    assert not torch.equal(first, second)
