"""How the sampler calls the model: what timesteps decide computed beforehand, in micro-batches, compiled by blocks."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff import NoiseSchedule, Sampler, trajectory
from fastdiff.compilation import BlockwiseCompiled, CompiledOrEager, compile_options, compiled, repeated_blocks
from fastdiff.unet import UNet, UNetConfig, UNetLayer

SHAPE = (3, 1, 8, 8)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    model = UNet.preset("digits").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class Recording(nn.Module):
    """Passes calls on and remembers what they were."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model = model
        self.null_class = model.null_class
        self.calls: list[dict] = []

    def forward(self, x, t, **kwargs):
        self.calls.append({"x": x, "t": t, **kwargs})
        return self.model(x, t, **kwargs)


class Modulated(Recording):
    precomputes = True

    @property
    def modulation_channels(self):
        return self.model.modulation_channels

    def time_modulation(self, t, class_labels=None):
        return self.model.time_modulation(t, class_labels)


def draw(model, *, labels=None, **options):
    sampler = Sampler(
        model,
        NoiseSchedule.linear(),
        solver="ddim",
        solver_options={"eta": 1.0},
        num_inference_steps=4,
        clip_sample=1.0,
        **options,
    )
    kwargs = {} if labels is None else {"class_labels": labels}
    return sampler.sample(SHAPE, seed=5, model_kwargs=kwargs)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("labels", [None, torch.tensor([3, 1, 4])], ids=["no labels", "labels"])
def test_modulations_of_all_steps_give_what_the_steps_own_give(unet, guided, labels):
    if guided and labels is None:
        labels = torch.tensor([10, 10, 0])
    options = {"guidance_scale": 2.0, "guidance_interval": (0.3, 1.0)} if guided else {}
    recorded, plain = Modulated(unet), Recording(unet)
    with_modulations, without = (draw(model, labels=labels, **options) for model in (recorded, plain))
    assert all(call["modulation"].shape == (len(call["x"]), unet.modulation_channels) for call in recorded.calls)
    assert not any("modulation" in call for call in plain.calls)
    # the products of all steps at once and of one step add in another order: far below one level of 8 bits
    torch.testing.assert_close(with_modulations, without, rtol=0, atol=0.2 / 255)
    step = recorded.calls[1]
    own = unet.time_modulation(step["t"], step.get("class_labels"))
    torch.testing.assert_close(step["modulation"], own, rtol=1e-5, atol=1e-5)


def test_modulations_follow_the_weights_from_call_to_call(unet):
    sampler = Sampler(unet, NoiseSchedule.linear(), solver="ddim", num_inference_steps=2)
    before = sampler.sample(SHAPE, seed=1)
    bias = unet.time_embedding.linear_2.bias
    with torch.no_grad():
        bias.add_(1.0)
        changed = sampler.sample(SHAPE, seed=1)
        bias.sub_(1.0)
    assert not torch.allclose(before, changed)


def test_modulations_that_would_take_too_much_memory_are_left_to_the_steps(unet, monkeypatch):
    labels = torch.tensor([3, 1, 4])
    rows, channels = 4, unet.modulation_channels
    monkeypatch.setattr(trajectory, "MAX_MODULATION_BYTES", rows * len(labels) * channels * 4 - 1)
    recorded = Modulated(unet)
    draw(recorded, labels=labels)
    assert not any("modulation" in call for call in recorded.calls)
    draw(recorded)
    assert "modulation" in recorded.calls[-1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_micro_batches_give_the_whole_batch(unet, size):
    labels = torch.tensor([3, 1, 4])
    recorded = Recording(unet)
    parts = draw(recorded, labels=labels, guidance_scale=2.0, micro_batch_size=size)
    assert max(len(call["x"]) for call in recorded.calls) == min(size, 6)
    assert all(len(call["x"]) == len(call["t"]) == len(call["class_labels"]) for call in recorded.calls)
    assert sum(len(call["x"]) for call in recorded.calls) == 4 * 6
    whole = draw(unet, labels=labels, guidance_scale=2.0)
    # convolutions of another batch size add in another order; the promise is one level of 8 bits
    torch.testing.assert_close(parts, whole, rtol=0, atol=2 / 255)


def test_micro_batches_cut_nested_arguments_and_join_outputs_of_objects():
    class Output:
        def __init__(self, sample):
            self.sample = sample

    seen = []

    def model(x, t, added, once):
        seen.append((len(x), len(added["text"]), once.shape))
        return Output(x * added["text"].view(-1, 1, 1, 1) * once.sum())

    kwargs = {"added": {"text": torch.arange(3.0)}, "once": torch.full((2,), 0.5)}
    schedule = NoiseSchedule.linear()
    whole, parts = (
        Sampler(model, schedule, solver="ddim", num_inference_steps=2, micro_batch_size=size).sample(
            SHAPE, seed=0, model_kwargs=kwargs
        )
        for size in (None, 2)
    )
    assert torch.equal(whole, parts)
    assert seen[2:] == [(2, 2, (2,)), (1, 1, (2,))] * 2


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_micro_batch_size_out_of_range(unet, bad):
    with pytest.raises(ValueError, match=f"micro_batch_size must be None or an integer of at least 1, got {bad}"):
        draw(unet, micro_batch_size=bad)


class Tower(nn.Module):
    """Two blocks of one class with other widths, around the same weights in between."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(4), Block(4), Block(6)])
        self.widen = nn.Conv2d(4, 6, 1)

    def forward(self, x, t):
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[2](self.widen(x))[:, :4]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x)) * (2.0 if self.training else 1.0)


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile without a compiler behind it; what it was asked to compile."""
    asked = []

    def compile(function, **options):
        asked.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def test_repeated_blocks_are_compiled_once_a_class_and_the_model_stays_as_it_was(eager_compile):
    torch.manual_seed(0)
    model, x, t = Tower().eval(), torch.randn(2, 4, 5, 5), torch.zeros(2)
    expected = model(x, t)
    blockwise = BlockwiseCompiled(model, **compile_options("cpu"))
    assert [function for function, _ in eager_compile] == [Block.forward]
    assert torch.equal(blockwise(x, t), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    model.blocks[0].conv.weight = nn.Parameter(torch.zeros(4, 4, 1, 1))
    model.train()
    assert torch.equal(blockwise(x, t), model(x, t))
    assert not torch.equal(model(x, t), expected)


def test_repeated_blocks_of_a_model_that_names_none():
    with pytest.raises(ValueError, match=r'compile must be True or False for Conv2d, which has no "repeated_blocks"'):
        repeated_blocks(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r'compile="repeated_blocks" needs an nn.Module, got function'):
        compiled(lambda x, t: x, "repeated_blocks")


def test_options_are_those_of_the_device_that_is_called_on(eager_compile):
    function = compiled(lambda x, t: x, "max-autotune")
    assert function.compile_seconds == 0
    function(torch.zeros(1), torch.zeros(1))
    with FakeTensorMode():
        for _ in range(2):
            function(torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda"))
    assert [options["options"].get("max_autotune", False) for _, options in eager_compile] == [False, True]
    assert function.compile_seconds > 0


def test_unknown_compile_names_what_is_accepted(unet):
    with pytest.raises(ValueError, match=r"compile must be one of True, False, 'max-autotune', .* got 'fast'"):
        draw(unet, compile="fast")


def test_options_keep_shapes_static_and_convolutions_with_cudnn():
    options = compile_options("cuda", mode="max-autotune")
    assert options["dynamic"] is False
    assert options["options"]["max_autotune_conv_backends"] == "ATEN"
    assert options["options"]["triton.cudagraphs"] is False
    known = torch._inductor.list_options()
    assert set(options["options"]) <= set(known)
    with pytest.raises(ValueError, match="mode must be one of default, max-autotune, got 'fast'"):
        compile_options("cuda", mode="fast")


def test_compile_seconds_count_calls_that_compile(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: calls.append(1) or function(*args))
    seconds = iter([1.0, 3.0, 10.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    double = CompiledOrEager(lambda x: 2 * x)
    for shape in [(2,), (2,), (3,), (3,), (2,)]:
        assert torch.equal(double(torch.ones(shape)), 2 * torch.ones(shape))
    assert double.compile_seconds == 2.0 + 5.0
    assert len(calls) == 5


class Halved(UNet):
    def forward(self, x, t, *args, **kwargs):
        return super().forward(x, t // 2, *args, **kwargs)


@pytest.mark.parametrize("between", ["subclass", "instance", "hook"])
def test_what_stands_between_a_call_and_the_forward_sees_every_call(unet, between):
    """Else a forward that changes t, or hooks, FSDP's among them, would be passed over."""
    model = UNet(unet.config).eval()
    if between == "subclass":
        model = Halved(unet.config).eval()
    elif between == "instance":
        forward = model.forward
        model.forward = lambda x, t, *args, **kwargs: forward(x, t // 2, *args, **kwargs)
    else:
        model.register_forward_pre_hook(lambda module, args: (args[0], args[1] // 2))
    model.load_state_dict(unet.state_dict())
    assert torch.equal(draw(model), draw(lambda x, t: unet(x, t // 2)))


def test_hooks_tell_captured_steps_apart(unet):
    sampler = Sampler(unet, NoiseSchedule.linear(), solver="ddim", num_inference_steps=2)

    def key():
        return sampler._graph_key(sampler.table, SHAPE, torch.device("cpu"), {}, {})

    before = key()
    handle = unet.down_blocks[0].layers[0].resnet.conv1.register_forward_hook(lambda *_: None)
    assert key() != before
    handle.remove()
    assert key() == before


def test_micro_batches_do_not_cut_what_has_their_size_by_chance():
    def model(x, t, class_labels, shared):
        return x * shared.sum() + class_labels.view(-1, 1, 1, 1)

    kwargs = {"class_labels": torch.tensor([1.0, 2.0, 3.0]), "shared": torch.arange(6.0)}
    whole, parts = (
        Sampler(
            model,
            NoiseSchedule.linear(),
            solver="ddim",
            num_inference_steps=2,
            guidance_scale=2.0,
            micro_batch_size=size,
        ).sample(
            SHAPE, model_kwargs=kwargs, uncond_kwargs={"class_labels": torch.zeros(3), "shared": torch.arange(6.0)}
        )
        for size in (None, 2)
    )
    assert torch.equal(whole, parts)


def test_every_layer_of_a_unet_with_many_widths_is_compiled():
    config = UNetConfig(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        model_channels=8,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=2,
        attention_resolutions=(8, 4),
        norm_num_groups=4,
    )
    model, x, t = UNet(config).eval(), torch.randn(1, 1, 16, 16), torch.tensor([7])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        layers = sum(type(module) is UNetLayer for module in model.modules())
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        modulation = model.time_modulation(t)
        blockwise = BlockwiseCompiled(model, backend="eager")
        result = blockwise(x, t, modulation=modulation)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch.equal(blockwise(x, t, modulation=modulation), result)
    assert layers == 22
    # layers of one shape share a graph; more shapes than Dynamo's limit of 8
    assert 8 < graphs <= layers
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(result, model(x, t))


def test_calls_that_differ_inside_are_told_apart(monkeypatch):
    """A call that nobody has seen may fail to compile; one that was seen is not looked at again."""

    def compile(function, **_):
        seen = set()

        def compiled_function(x, extra):
            key = (x.shape, x.stride(), extra["a"].shape, torch.is_grad_enabled())
            if seen and key not in seen:
                raise RuntimeError("no compiler any more")
            seen.add(key)
            return function(x, extra)

        return compiled_function

    monkeypatch.setattr(torch, "compile", compile)
    x, extra = torch.ones(4, 4), {"a": torch.ones(2)}
    others = [(x, {"a": torch.ones(3)}), (torch.ones(4, 8)[:, ::2], extra)]
    for other in others:
        double = CompiledOrEager(lambda x, extra: 2 * x)
        double(x, extra)
        with pytest.warns(UserWarning, match="no compiler any more"):
            assert torch.equal(double(*other), 2 * other[0])
    double = CompiledOrEager(lambda x, extra: 2 * x)
    double(x, extra)
    with torch.no_grad(), pytest.warns(UserWarning, match="no compiler any more"):
        double(x, extra)
