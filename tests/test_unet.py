"""The U-Net: layouts, gradients, conditioning, compilation and validation."""

import json
import re
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.unet import PRESETS, UNet, UNetConfig
from fastdiff.unet_blocks import GroupNormSiLU, KeyedDropout, TimestepEmbedding

TINY = UNetConfig(
    sample_size=8,
    in_channels=2,
    out_channels=4,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_heads=2,
    num_classes=5,
    cross_attention_dim=6,
    norm_num_groups=4,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddpm_pad_right_bottom": {"downsample_padding": 0},
    "adm": {"use_scale_shift_norm": True, "resblock_updown": True},
}


def make_unet(**overrides) -> UNet:
    """A tiny UNet none of whose weights is zero, not even those that start so."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_dict({**TINY.to_dict(), **overrides}))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def make_inputs(batch: int = 3, size: tuple[int, int] = (8, 8)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch, 2, *size, generator=generator).to(memory_format=torch.channels_last),
        "t": torch.randint(1000, (batch,), generator=generator),
        "class_labels": torch.randint(5, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 6, generator=generator),
    }


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def unet(request) -> UNet:
    return make_unet(**request.param)


class LayoutWatch(TorchDispatchMode):
    """Collects operations whose result is a [B, C, H, W] activation in another layout, and those that copy a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.not_channels_last: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.dim() < 3:
            return out
        # Views rearrange tokens and heads, and cost nothing.
        if out.dim() == 4 and not func.is_view and not out.is_contiguous(memory_format=torch.channels_last):
            self.not_channels_last.append(str(func))
        if re.match(r"aten\.(clone|_to_copy|copy_|contiguous)", str(func)):
            self.copies.append(str(func))
        return out


@pytest.mark.parametrize("size", [(8, 8), (4, 10)], ids=["square", "4x10"])
def test_every_activation_is_channels_last_and_none_is_copied(unet: UNet, size: tuple[int, int]) -> None:
    inputs = {**make_inputs(size=size), "t": torch.tensor([0.0, 0.5, 999.0])}
    with torch.no_grad(), LayoutWatch() as watch:
        out = unet(**inputs)
    assert out.shape == (3, 4, *size)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert watch.not_channels_last == []
    assert watch.copies == []


def test_contiguous_input_gives_the_same_channels_last_output(unet: UNet) -> None:
    inputs = make_inputs()
    expected = unet(**inputs)
    out = unet(**{**inputs, "x": inputs["x"].contiguous()})
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_single_channel_images_run_channels_last_too() -> None:
    # One channel is contiguous in both layouts at once: only the weights can say which is meant.
    unet = make_unet(in_channels=1)
    inputs = {**make_inputs(), "x": torch.randn(3, 1, 8, 8)}
    with torch.no_grad(), LayoutWatch() as watch:
        unet(**inputs)
    assert watch.not_channels_last == []
    assert watch.copies == []


@pytest.mark.parametrize("batch", [1, 3])
def test_images_of_a_batch_do_not_mix(unet: UNet, batch: int) -> None:
    inputs = make_inputs(5)
    some = {name: value[:batch] for name, value in inputs.items()}
    # Only the order of the sums differs: some ten layers that sum a few hundred products, each sum off by about
    # sqrt(300) * 6e-8 = 1e-6 of outputs near 1, and the norms pass these errors on.
    torch.testing.assert_close(unet(**some), unet(**inputs)[:batch], rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_every_parameter(unet: UNet) -> None:
    unet(**make_inputs()).square().sum().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_a_fresh_model_predicts_zero() -> None:
    assert torch.equal(UNet(TINY)(**make_inputs()), torch.zeros(3, 4, 8, 8))


def test_no_labels_means_the_null_class(unet: UNet) -> None:
    inputs = make_inputs()
    null = torch.full((3,), 5)
    assert unet.null_class == 5
    torch.testing.assert_close(unet(**{**inputs, "class_labels": None}), unet(**{**inputs, "class_labels": null}))
    difference = unet(**inputs) - unet(**{**inputs, "class_labels": null})
    assert difference.abs().max() > 0.01


def test_classes_without_a_null_class() -> None:
    unet = make_unet(null_class=False)
    assert unet.null_class is None
    assert unet.class_embedding is not None
    assert len(unet.class_embedding.weight) == 5
    inputs = make_inputs()
    assert unet(**{**inputs, "class_labels": torch.tensor([0, 4, 2])}).shape == (3, 4, 8, 8)
    with pytest.raises(ValueError, match=r"class_labels must be in \[0, 4\], got \[5, 0, 1\]"):
        unet(**{**inputs, "class_labels": torch.tensor([5, 0, 1])})
    with pytest.raises(ValueError, match="class_labels are needed by a model without a null class"):
        unet(**{**inputs, "class_labels": None})


def test_unconditional_model_has_no_null_class() -> None:
    unet = make_unet(num_classes=None)
    assert unet.null_class is None
    assert not any("class" in name for name in unet.state_dict())


@pytest.mark.parametrize("name", ["t", "class_labels", "encoder_hidden_states"])
def test_each_image_follows_its_own_condition(unet: UNet, name: str) -> None:
    inputs = make_inputs()
    changed = inputs[name].clone()
    changed[1] = (changed[1] + 1) % 5
    difference = (unet(**{**inputs, name: changed}) - unet(**inputs)).abs().amax((1, 2, 3))
    assert difference[1] > 1e-3
    assert difference[[0, 2]].max() < 1e-5


def test_dropout_acts_in_training_only() -> None:
    unet = make_unet(dropout=0.5)
    inputs = make_inputs()
    assert not torch.equal(unet(**inputs), unet(**inputs))
    unet.eval()
    assert torch.equal(unet(**inputs), unet(**inputs))


def dropout_keys_of(*samples: int) -> Tensor:
    return torch.tensor([[3, sample, 2] for sample in samples])


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_keyed_dropout_depends_on_the_sample_and_not_on_the_batch(overrides: dict[str, Any]) -> None:
    unet, inputs = make_unet(dropout=0.5, **overrides), make_inputs()
    keys = dropout_keys_of(7, 8, 9)
    out = unet(**inputs, dropout_keys=keys)
    torch.manual_seed(5)
    assert torch.equal(unet(**inputs, dropout_keys=keys), out)
    order = torch.tensor([2, 0])
    part = unet(**{name: value[order] for name, value in inputs.items()}, dropout_keys=keys[order])
    # the same sums of another batch: convolutions may add in another order
    torch.testing.assert_close(part, out[order], rtol=1e-4, atol=1e-4)
    others = unet(**inputs, dropout_keys=dropout_keys_of(7, 8, 10)) - out
    assert (others.flatten(1).abs().amax(1) > 0.01).tolist() == [False, False, True]


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_layer_has_a_mask_of_its_own(overrides: dict[str, Any]) -> None:
    unet, ran = make_unet(dropout=0.5, **overrides), []
    for module in unet.modules():
        if isinstance(module, KeyedDropout):
            module.register_forward_hook(lambda module, *_: ran.append(module.layer))
    unet(**make_inputs(), dropout_keys=dropout_keys_of(7, 8, 9))
    assert ran == list(range(len(ran)))
    assert len(ran) >= 6


def test_keys_change_nothing_without_dropout_and_in_eval_mode() -> None:
    inputs, keys = make_inputs(), dropout_keys_of(7, 8, 9)
    for unet in (make_unet(), make_unet(dropout=0.5).eval()):
        assert torch.equal(unet(**inputs, dropout_keys=keys), unet(**inputs))
    assert make_unet(dropout=0.5).state_dict().keys() == make_unet().state_dict().keys()


@pytest.mark.parametrize("keys", ["given", "none", "without dropout"])
def test_the_compiled_graph_reads_keys_only_where_they_matter(keys: str) -> None:
    unet, inputs = make_unet(dropout=0.0 if keys == "without dropout" else 0.5), make_inputs()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    given = None if keys == "none" else dropout_keys_of(7, 8, 9)
    out = torch.compile(unet, backend=backend, fullgraph=True)(**inputs, dropout_keys=given)
    code = graphs[0].code
    assert ("dropout_keys" in code) == (keys == "given")
    assert ("nn.functional.dropout" in code) == (keys != "given")
    if keys == "given":
        # compiled, group norms and upsampling add in another order: some 20 layers of some 10 roundings of 2^-24 each;
        # another mask would change the output by its own size
        expected = unet(**inputs, dropout_keys=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=200 * 2**-24 * expected.abs().max().item())


def test_gradients_with_keyed_dropout_are_those_of_a_kept_mask() -> None:
    unet, keys = make_unet(dropout=0.3).double(), dropout_keys_of(7, 8, 9)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in make_inputs().items()}
    unet(**inputs, dropout_keys=keys).square().mean().backward()
    gradient = unet.conv_in.weight.grad.clone()
    direction = torch.randn_like(gradient)

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            unet.conv_in.weight += distance * direction
            loss = unet(**inputs, dropout_keys=keys).square().mean().item()
            unet.conv_in.weight -= distance * direction
        return loss

    slope = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    # the third derivative times 1e-8 / 6; a backward pass with another mask would be off by a third
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_bfloat16_autocast_is_finite_and_close(unet: UNet) -> None:
    inputs = make_inputs()
    expected = unet(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unet(**inputs)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    # bfloat16 rounds to 2^-9; some 30 layers add up to sqrt(30) times that, relative to the largest output.
    assert (out - expected).abs().max() < 4 * 30**0.5 * 2**-9 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_timestep_embedding_keeps_float32_angles_in_bfloat16(dtype: torch.dtype) -> None:
    embedding = TimestepEmbedding(16, 32, flip_sin_to_cos=True, freq_shift=0).to(torch.bfloat16)
    # 998 and 999 are the same number in bfloat16.
    out = embedding(torch.tensor([998, 999], dtype=dtype))
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "no_silu"])
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_group_norm_silu_is_its_formula(silu: bool, modulated: bool, memory_format: torch.memory_format) -> None:
    torch.manual_seed(2)
    norm = GroupNormSiLU(3, 12, eps=1e-3, silu=silu)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = torch.randn(2, 12, 5, 3).to(memory_format=memory_format)
    bias, scale, shift = torch.randn(3, 2, 12) if modulated else torch.zeros(3, 2, 12)
    groups = (x + bias[:, :, None, None]).double().reshape(2, 3, 4 * 15)
    normal = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-3).sqrt()
    y = normal.reshape(2, 12, 5, 3) * norm.weight[:, None, None] + norm.bias[:, None, None]
    y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    expected = y * torch.sigmoid(y) if silu else y
    out = norm(x, bias, scale, shift) if modulated else norm(x)
    assert out.is_contiguous(memory_format=memory_format)
    # A float32 mean over 60 values and a handful of operations on values below 10: 16 units in the last place.
    torch.testing.assert_close(out.double(), expected, rtol=16 * 2**-24, atol=160 * 2**-24)


@pytest.mark.parametrize(("variant", "backend"), [("ddpm_pad_right_bottom", "eager"), ("adm", "aot_eager")])
def test_compiles_without_a_graph_break(variant: str, backend: str) -> None:
    torch.compiler.reset()
    unet = make_unet(**VARIANTS[variant])
    inputs = make_inputs()
    # fullgraph: a graph break is an error.
    out = torch.compile(unet, fullgraph=True, backend=backend)(**inputs)
    torch.testing.assert_close(out, unet(**inputs))
    out.sum().backward()
    assert all(p.grad is not None for p in unet.parameters())


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_inductor_agrees_with_eager() -> None:
    torch.compiler.reset()
    unet = make_unet(channel_mult=(1,), attention_resolutions=(8,))
    inputs = make_inputs()
    with torch.no_grad():
        out = torch.compile(unet, fullgraph=True)(**inputs)
        expected = unet(**inputs)
    assert out.is_contiguous(memory_format=torch.channels_last)
    # fused differently, the sums and the exponentials of SiLU round differently: 1e-6 a layer, some ten layers
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name: str) -> None:
    config = PRESETS[name]
    values = json.loads(json.dumps(config.to_dict()))
    assert values == config.to_dict()
    assert UNetConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        # 35.7 M (DDPM, appendix B); the sum of google/ddpm-cifar10-32's tensors.
        ("cifar10", {}, 35_746_307),
        # 121 M (improved DDPM, ImageNet 64x64 with 128 channels); the classes add 1001 embeddings of 512.
        ("imagenet64", {}, 121_060_483),
        ("imagenet64", {"num_classes": 1000}, 121_060_483 + 1001 * 512),
    ],
)
def test_preset_parameter_counts(name: str, overrides: dict, count: int) -> None:
    with torch.device("meta"):
        unet = UNet.preset(name, **overrides)
    assert sum(p.numel() for p in unet.parameters()) == count


def test_digits_preset_fits_four_megabytes_in_half_precision() -> None:
    unet = UNet.preset("digits")
    assert 1_000_000 < sum(p.numel() for p in unet.parameters()) <= 1_900_000
    assert unet.null_class == 10
    assert unet(torch.randn(2, 1, 8, 8), torch.tensor([0, 999])).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample_size": 7}, "sample_size must be divisible by 2 .* got 7"),
        ({"sample_size": 8.0}, "sample_size must be a positive integer, got 8.0"),
        ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ({"num_classes": True}, "num_classes must be a positive integer, got True"),
        ({"channel_mult": ()}, "channel_mult must have at least one level"),
        ({"channel_mult": 2}, "channel_mult must be a tuple of positive integers, got 2"),
        ({"channel_mult": (1, 0)}, "each item of channel_mult must be a positive integer, got 0"),
        ({"attention_resolutions": (5,)}, r"attention_resolutions must be among \(8, 4\) .* got 5"),
        ({"norm_num_groups": 5}, "norm_num_groups must divide 16 channels, got 5"),
        ({"num_heads": 3}, "num_heads must divide the 32 channels of an attention, got 3"),
        ({"num_head_channels": 8}, "num_heads and num_head_channels exclude each other, got 2 and 8"),
        ({"model_channels": 15}, "model_channels must be even .* got 15"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
        ({"attention_norm_eps": -1.0}, "attention_norm_eps must be positive or None, got -1.0"),
        ({"downsample_padding": 2}, "downsample_padding must be 0 or 1, got 2"),
        ({"freq_shift": 8}, r"freq_shift must be in \[0, model_channels / 2\), got 8"),
        ({"depth": 3}, "UNetConfig has no field depth; its fields are sample_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_rejects(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**TINY.to_dict(), **overrides})


def test_config_without_sample_size_and_unknown_preset_are_errors() -> None:
    with pytest.raises(ValueError, match="needs the field sample_size, got only in_channels"):
        UNetConfig.from_dict({"in_channels": 3})
    with pytest.raises(ValueError, match="one of digits, cifar10, imagenet64, got 'imagenet'"):
        UNet.preset("imagenet")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 1, 8, 8), r"x must have shape \[B, 2, H, W\], got \[3, 1, 8, 8\]"),
        ("x", torch.zeros(2, 8, 8), r"x must have shape \[B, 2, H, W\], got \[2, 8, 8\]"),
        ("x", torch.zeros(3, 2, 8, 7), "height and width of x must be positive multiples of 2, got 8 x 7"),
        ("x", torch.zeros(3, 2, 8, 8, dtype=torch.uint8), "x must be torch.float32 like the model .*, got torch.uint8"),
        ("x", torch.zeros(3, 2, 8, 8, dtype=torch.float16), "x must be torch.float32 like the model .*, got torch.flo"),
        ("x", torch.zeros(3, 2, 8, 8, device="meta"), "x must be on cpu like the model, got meta"),
        ("t", torch.zeros(2), r"t must have shape \[3\].* got \[2\]"),
        ("t", torch.tensor(5), r"t must have shape \[3\].* got \[\]"),
        ("class_labels", torch.zeros(3), r"int64 or int32 of shape \[3\], got torch.float32 of shape \[3\]"),
        ("class_labels", torch.zeros(2, dtype=torch.int64), r"class_labels must be .* of shape \[2\]"),
        ("class_labels", torch.tensor([0, 99, 1]), r"class_labels must be in \[0, \d\], got \[0, 99, 1\]"),
        ("class_labels", torch.tensor([0, -1, 1]), r"class_labels must be in \[0, \d\], got \[0, -1, 1\]"),
        ("encoder_hidden_states", None, r"encoder_hidden_states must have shape \[3, S, 6\], got None"),
        ("encoder_hidden_states", torch.zeros(3, 7, 5), r"must have shape \[3, S, 6\], got \[3, 7, 5\]"),
    ],
)
def test_forward_rejects(name: str, value: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_unet()(**{**make_inputs(), name: value})


@pytest.mark.parametrize(
    ("field", "argument"), [("num_classes", "class_labels"), ("cross_attention_dim", "encoder_hidden_states")]
)
def test_a_condition_the_model_does_not_have_is_an_error(field: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be None for a model without .*{field}=None"):
        make_unet(**{field: None})(**make_inputs())


@pytest.mark.parametrize("watched", ["hook", "adapter"])
def test_first_conv_is_called_where_somebody_watches_or_replaces_it(unet: UNet, watched: str) -> None:
    """Elsewhere its bias goes to the norm and the module is passed over."""
    seen = []

    class Adapter(torch.nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    inputs = make_inputs()
    expected = unet(**inputs)
    block = unet.down_blocks[0].layers[0].resnet
    if watched == "hook":
        block.conv1.register_forward_hook(lambda module, args, output: seen.append(output))
    else:
        adapter = Adapter(block.conv1.in_channels, block.conv1.out_channels, 3, padding=1)
        adapter.load_state_dict(block.conv1.state_dict())
        block.conv1 = adapter
    # the bias is added before or after the rounding of another sum
    torch.testing.assert_close(unet(**inputs), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_modulation_computed_before_gives_the_same(unet: UNet) -> None:
    inputs = make_inputs()
    modulation = unet.time_modulation(inputs["t"], inputs["class_labels"])
    assert modulation.shape == (3, unet.modulation_channels)
    expected = unet(**inputs)
    # t and the labels are not read then
    given = {**inputs, "t": inputs["t"] * 0, "class_labels": inputs["class_labels"] * 0, "modulation": modulation}
    assert torch.equal(unet(**given), expected)
    wanted = [3, unet.modulation_channels]
    with pytest.raises(ValueError, match=re.escape(f"modulation must have shape {wanted}, got [1, 5]")):
        unet(**inputs, modulation=torch.zeros(1, 5))


def test_first_conv_keeps_its_padding_mode_and_dilation(unet: UNet) -> None:
    """Circular convs make tiles without seams; the bias goes to the norm all the same."""
    inputs = make_inputs()
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1):
            module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    block = unet.down_blocks[0].layers[0].resnet
    block.conv1.dilation, block.conv1.padding = (2, 2), (2, 2)
    block.conv1._reversed_padding_repeated_twice = [2, 2, 2, 2]
    result = unet(**inputs)
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(result, unet(**inputs), rtol=1e-5, atol=1e-5)
