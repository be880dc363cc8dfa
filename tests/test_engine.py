"""Continuous batching: a request gets what it would get alone, in any company, and leaves its place at once."""

import random

import pytest
import torch
from torch import Tensor, nn

from fastdiff import NoiseSchedule, Sampler, engine_model
from fastdiff.engine import Engine, Request
from fastdiff.engine_model import BucketedModel

SHAPE = (2, 5, 4)
SOLVERS = {
    "ddpm": {"num_inference_steps": 5},
    "ddim eta": {"solver": "ddim", "num_inference_steps": 3, "solver_options": {"eta": 1.0}},
    "multistep": {"solver": "dpmpp_2m", "num_inference_steps": 4},
    "third order": {"solver": "dpmpp_3m", "num_inference_steps": 6},
    "heun": {"solver": "heun", "num_inference_steps": 3},
    "karras": {"solver": "euler", "num_inference_steps": 4, "sigma_spacing": "karras"},
    "churn": {"solver": "edm", "num_inference_steps": 3, "solver_options": {"s_churn": 2.0}},
    "clipped": {"solver": "unipc", "num_inference_steps": 4, "clip_sample": 0.5},
}
SOLVERS["ddpm"]["solver"] = "ddpm"


class Labelled(nn.Module):
    """Every sample on its own: elementwise, so that the company cannot change a bit."""

    null_class = 9

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.6))
        self.batches: list[int] = []
        self.t: list[Tensor] = []

    def forward(self, x, t, class_labels):
        self.batches.append(len(x))
        self.t.append(t.clone())
        shift = 0.1 * class_labels.to(x.dtype) + 1e-4 * t.to(x.dtype)
        return torch.tanh(self.scale * x + shift.view(-1, *[1] * (x.ndim - 1)))


def request(name: str, *, label: int = 1, **options) -> Request:
    return Request(model_kwargs={"class_labels": torch.tensor([label])}, **{**SOLVERS[name], **options})


def alone(model: nn.Module, one: Request, shape=SHAPE) -> Tensor:
    """The request's sample by a Sampler of its own."""
    names = ("solver", "num_inference_steps", "solver_options", "timestep_spacing", "sigma_spacing", "clip_sample")
    names += ("guidance_scale", "guidance_interval")
    sampler = Sampler(model, NoiseSchedule.linear(), **{name: getattr(one, name) for name in names})
    return sampler.sample(
        (1, *shape), seed=one.seed, sample_indices=torch.tensor([one.sample_index]), model_kwargs=one.model_kwargs
    )[0]


def engine(model: nn.Module | None = None, **options) -> Engine:
    return Engine(model or Labelled(), NoiseSchedule.linear(), SHAPE, **options)


def mixture() -> list[Request]:
    """All solvers, with and without guidance, with other seeds, labels and sample numbers."""
    requests = [request(name, label=i % 9, seed=i, sample_index=3 * i) for i, name in enumerate(SOLVERS)]
    guided = [
        request(name, label=i, seed=7, guidance_scale=1.5 + i, guidance_interval=(0.2, 0.9) if i % 2 else None)
        for i, name in enumerate(SOLVERS)
    ]
    return [one for pair in zip(requests, guided) for one in pair]


@pytest.mark.parametrize("padded", [False, True], ids=["eager", "padded"])
@pytest.mark.parametrize("batch_sizes", [(2,), (1, 2, 4, 8), (64,)], ids=str)
def test_each_request_gets_what_it_gets_alone_bit_for_bit(batch_sizes, padded, monkeypatch):
    model, requests = Labelled(), mixture()
    one_engine = engine(model, batch_sizes=batch_sizes)
    if padded:
        # as on a GPU, but that nothing is captured
        monkeypatch.setattr(engine_model, "capture", lambda step, *_: (step, None))
        one_engine._call._captures = True
    samples = one_engine.run(requests)
    assert max(model.batches) <= batch_sizes[-1]
    assert not padded or set(model.batches) <= set(batch_sizes)
    for one, sample in zip(requests, samples):
        assert torch.equal(sample, alone(Labelled(), one)), one


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_come_and_go_at_random_change_nothing(seed):
    rng = random.Random(seed)
    one_engine, requests = engine(batch_sizes=rng.choice([(1, 3, 6), (6,), (2, 5, 6)])), mixture() * 2
    rng.shuffle(requests)
    ids: dict[int, Request] = {}
    aborted, done = set(), {}
    while requests or one_engine.busy:
        for _ in range(rng.randrange(3)):
            if requests:
                one = requests.pop()
                ids[one_engine.add(one)] = one
        if ids and rng.random() < 0.5:
            victim = rng.choice(list(ids))
            if victim not in done and one_engine.abort(victim):
                aborted.add(victim)
        done.update(one_engine.step())
        assert one_engine.num_running <= 6
    assert done.keys() | aborted == ids.keys()
    assert not done.keys() & aborted
    assert len(aborted) > 2
    for id, sample in done.items():
        assert torch.equal(sample, alone(Labelled(), ids[id])), ids[id]


def test_a_place_is_free_within_one_step_of_the_end_or_the_abort():
    one_engine = engine(batch_sizes=(2,))
    first, second, third, fourth = (one_engine.add(request("ddim eta", seed=i)) for i in range(4))
    one_engine.step()
    assert (one_engine.num_running, one_engine.num_waiting) == (2, 2)
    assert one_engine.abort(first)
    assert one_engine.num_running == 1
    one_engine.step()
    assert (one_engine.num_running, one_engine.num_waiting) == (2, 1)
    finished = one_engine.step()
    assert [one.id for one in finished] == [second]
    assert [one.id for one in one_engine.step()] == [third]
    assert (one_engine.num_running, one_engine.num_waiting) == (1, 0)
    assert not one_engine.abort(first)
    assert not one_engine.abort(second)
    assert one_engine.abort(fourth)
    assert not one_engine.busy


def test_a_guided_request_takes_two_places_only_where_its_rows_are_guided():
    model = Labelled()
    one_engine = engine(model, batch_sizes=(1, 2, 3))
    one_engine.add(request("ddim eta", guidance_scale=3.0, guidance_interval=(0.5, 1.0)))
    one_engine.add(request("ddim eta"))
    one_engine.add(request("ddim eta"))
    one_engine.step()
    assert (one_engine.num_running, one_engine.num_waiting) == (2, 1)
    one_engine.step()
    one_engine.step()
    # timesteps 999, 666, 333: the last one is below the interval
    assert model.batches == [3, 3, 2]


def test_an_eager_model_is_called_with_as_many_as_there_are():
    model = Labelled()
    engine(model, batch_sizes=(1, 16)).run([request("ddim eta", seed=i) for i in range(5)])
    assert model.batches == [5, 5, 5]


def test_whole_timesteps_stay_integers_until_others_join():
    model = Labelled()
    one_engine = engine(model)
    one_engine.add(request("ddpm"))
    one_engine.step()
    one_engine.add(request("karras"))
    one_engine.step()
    assert [t.dtype for t in model.t] == [torch.int64, torch.float32]
    assert model.t[1][0] == 799


def test_a_network_gives_the_image_of_a_solo_run_to_one_level_of_8_bits():
    from fastdiff.unet import UNet

    torch.manual_seed(0)
    model = UNet.preset("digits").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    requests = [
        Request(
            solver=solver,
            num_inference_steps=4,
            clip_sample=1.0,
            seed=seed,
            guidance_scale=scale,
            model_kwargs={"class_labels": torch.tensor([seed])},
        )
        for seed, (solver, scale) in enumerate([("ddim", None), ("dpmpp_2m", 2.0), ("ddpm", None), ("euler_a", 1.5)])
    ]
    shape = (1, 8, 8)
    samples = Engine(model, NoiseSchedule.linear(), shape, batch_sizes=(6,)).run(requests)
    for one, sample in zip(requests, samples):
        assert (sample - alone(model, one, shape)).abs().max() <= 2 / 255


def test_finished_samples_outlive_later_steps():
    one_engine = engine(batch_sizes=(1,))
    one_engine.add(request("ddim eta", seed=1))
    one_engine.add(request("ddim eta", seed=2))
    first = next(one for _ in range(3) for one in one_engine.step()).sample
    kept = first.clone()
    for _ in range(3):
        one_engine.step()
    assert torch.equal(first, kept)


BAD = {
    "no steps": ({"num_inference_steps": None}, "num_inference_steps is needed with solver 'ddim'"),
    "solver": ({"solver": "magic"}, "solver is 'magic', known solvers are"),
    "option": ({"solver_options": {"speed": 2}}, "has no option 'speed'"),
    "inverse": ({"solver": "ddim_inverse", "solver_options": {}}, "starts from an image or keeps one"),
    "repaint": ({"solver": "repaint", "solver_options": {}}, "starts from an image or keeps one"),
    "label": ({"model_kwargs": {"class_labels": torch.tensor([10])}}, r"class_labels must be in \[0, 9\]"),
    "two labels": (
        {"model_kwargs": {"class_labels": torch.tensor([1, 2])}},
        r"class_labels of shape \[1, ...\], got \[2\]",
    ),
    "dtype": ({"model_kwargs": {"class_labels": torch.tensor([1.0])}}, "must be like those of the first request"),
    "names": ({"model_kwargs": {}}, "must be like those of the first request"),
    "plain": ({"model_kwargs": {"class_labels": torch.tensor([1]), "flag": True}}, "must be like those of the first"),
    "object": ({"model_kwargs": {"class_labels": object()}}, "must hold tensors and plain values"),
    "unguided uncond": (
        {"uncond_kwargs": {"class_labels": torch.tensor([1])}},
        "uncond_kwargs .* are given, but guidance_scale is not",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_and_the_others_go_on(name):
    changed, message = BAD[name]
    one_engine = engine()
    first = one_engine.add(request("ddim eta"))
    with pytest.raises(ValueError, match=message):
        one_engine.add(
            request("ddim eta", **changed)
            if "model_kwargs" not in changed
            else Request(**{**SOLVERS["ddim eta"], **changed})
        )
    assert one_engine.num_waiting == 1
    assert [one.id for _ in range(3) for one in one_engine.step()] == [first]


def test_a_guided_request_needs_two_places():
    with pytest.raises(ValueError, match="a guided request takes 2 places, batch_sizes end at 1"):
        engine(batch_sizes=(1,)).add(request("ddim eta", guidance_scale=2.0))


@pytest.mark.parametrize("sizes", [(), (0,), (2, 1), (1, 1), (1.0,)], ids=str)
def test_bad_batch_sizes(sizes):
    with pytest.raises(ValueError, match="batch_sizes must be ascending integers of at least 1"):
        engine(batch_sizes=sizes)


@pytest.mark.parametrize(
    "output", [torch.zeros(2, 3, 5, 4), torch.zeros(2, 2, 5), "text"], ids=["channels", "axes", "type"]
)
def test_a_model_that_returns_something_else(output):
    model = BucketedModel(
        lambda x, t: output,
        sizes=(2,),
        shape=SHAPE,
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast_dtype=None,
        compile=False,
        captures=False,
    )
    with pytest.raises((TypeError, ValueError), match="model must return a tensor"):
        model(torch.zeros(1, *SHAPE), torch.zeros(1), {}, {})


def test_the_caller_goes_on_using_its_tensors():
    label = torch.tensor([1])
    one, other = (Request(**SOLVERS["ddim eta"], model_kwargs={"class_labels": torch.tensor([n])}) for n in (1, 5))
    one_engine = engine()
    first = one_engine.add(Request(**SOLVERS["ddim eta"], model_kwargs={"class_labels": label}))
    label.fill_(5)
    second = one_engine.add(Request(**SOLVERS["ddim eta"], model_kwargs={"class_labels": label}))
    samples = dict(done for _ in range(3) for done in one_engine.step())
    assert torch.equal(samples[first], alone(Labelled(), one))
    assert torch.equal(samples[second], alone(Labelled(), other))


def test_a_learned_variance_needs_its_channels():
    one_engine = engine()
    one_engine.add(request("ddpm", solver_options={"variance": "learned_range"}))
    with pytest.raises(ValueError, match="model must return 4 channels for a learned variance, got 2"):
        one_engine.step()


def test_an_output_that_is_a_view_of_a_larger_one():
    class Wide(Labelled):
        def forward(self, x, t, class_labels):
            return torch.cat([super().forward(x, t, class_labels)] * 3, dim=1)[:, :2]

    one = request("multistep", guidance_scale=2.0)
    assert torch.equal(engine(Wide()).run([one])[0], alone(Labelled(), one))


def test_run_wants_an_idle_engine_and_leaves_none_of_refused_requests():
    one_engine = engine()
    with pytest.raises(ValueError, match="known solvers are"):
        one_engine.run([request("ddpm"), request("ddpm", solver="magic")])
    assert not one_engine.busy
    one_engine.add(request("ddpm"))
    with pytest.raises(RuntimeError, match="1 requests are here already"):
        one_engine.run([request("ddpm")])


def test_a_refused_request_decides_nothing_for_the_next():
    one_engine = engine(lambda x, t: x, batch_sizes=(1,))
    with pytest.raises(ValueError, match="takes 2 places"):
        one_engine.add(
            Request(
                **SOLVERS["ddim eta"],
                guidance_scale=2.0,
                model_kwargs={"text": torch.zeros(1, 3)},
                uncond_kwargs={"text": torch.zeros(1, 3)},
            )
        )
    one_engine.add(Request(**SOLVERS["ddim eta"]))


def test_steps_in_and_out_of_inference_mode():
    one, one_engine = request("third order"), engine()
    with torch.inference_mode():
        id = one_engine.add(one)
        one_engine.step()
    samples = {}
    while one_engine.busy:
        samples.update(one_engine.step())
    assert torch.equal(samples[id], alone(Labelled(), one))


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 2**63), ("seed", "a"), ("sample_index", -1)])
def test_seeds_out_of_range_get_no_place(name, value):
    one_engine = engine()
    with pytest.raises(ValueError, match=rf"{name} must be an integer in \[0, 2\^63\), got {value!r}"):
        one_engine.add(request("ddpm", **{name: value}))
    assert not one_engine.busy


@pytest.mark.parametrize(
    ("name", "value"),
    [("cuda_graph", "x"), ("cuda_graph", True), ("dtype", torch.int8), ("prediction_type", "magic"), ("compile", "x")],
)
def test_options_are_those_of_the_sampler(name, value):
    with pytest.raises(ValueError, match=name):
        engine(**{name: value})


def test_tables_are_told_apart_by_plain_values_only():
    with pytest.raises(ValueError, match="solver_options must hold plain values"):
        engine().add(request("ddim eta", solver_options={"eta": torch.tensor(0.5)}))
    table = Sampler(Labelled(), NoiseSchedule.linear(), solver="ddim", num_inference_steps=3).table
    with pytest.raises(ValueError, match="go with a solver's name, not with a StepTable"):
        engine().add(request("ddim eta", solver=table))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_calls_equal_eager_ones_without_synchronising():
    requests = mixture()
    eager = engine(Labelled().cuda(), cuda_graph=False).run(requests)
    model = Labelled().cuda()
    captured = engine(model)
    first = captured.run(requests)
    calls = len(model.batches)
    ids, done = [captured.add(one) for one in requests], {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        while captured.busy:
            done.update(captured.step())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    second = [done[id] for id in ids]
    assert len(model.batches) == calls
    for one, again, expected in zip(first, second, eager):
        assert torch.equal(one, expected)
        assert torch.equal(again, expected)


def test_a_first_request_that_the_model_does_not_take_binds_nobody():
    served = engine()
    wrong = served.add(Request(num_inference_steps=2, model_kwargs={"class_label": torch.tensor([1])}))
    with pytest.raises(TypeError, match="class_label"):
        served.step()
    assert served.abort(wrong)
    assert not served.model_answered
    good = request("ddpm")
    assert torch.equal(served.run([good])[0], alone(Labelled(), good))
    assert served.model_answered


def test_a_sample_outlives_the_error_of_a_call_for_others(monkeypatch):
    served = engine()
    one = served.add(request("ddpm"))
    while served.num_running == 0 or served._running[0].row < 4:
        served.step()
    other = served.add(request("multistep"))
    finish = served._finished

    def finish_early():
        monkeypatch.setattr(served, "_finished", finish)
        served._running[0].row = 5
        return finish()

    monkeypatch.setattr(served, "_finished", finish_early)
    evaluate = served._evaluate

    def fail(rows):
        monkeypatch.setattr(served, "_evaluate", evaluate)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(served, "_evaluate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        served.step()
    assert served.busy
    assert [done.id for done in served.step()] == [one]
    while other not in (ids := [done.id for done in served.step()]):
        assert ids == []
    assert not served.busy
