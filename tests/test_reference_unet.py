"""The UNet and the textbook U-Net, written apart from each other, are the same function with the same gradients."""

import ast
import inspect
from dataclasses import replace

import pytest
import torch

import fastdiff.reference_unet
from fastdiff.reference_unet import ReferenceUNet
from fastdiff.unet import UNet, UNetConfig

BASE = UNetConfig(
    sample_size=8,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_num_groups=4,
)
CONFIGS = {
    "ddpm": replace(BASE, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6),
    "adm": replace(BASE, use_scale_shift_norm=True, resblock_updown=True, num_head_channels=8, out_channels=6),
    "classes": replace(BASE, num_classes=5, num_heads=2, downsample_padding=1),
    "classes_without_null": replace(BASE, num_classes=5, null_class=False),
    "sequence": replace(BASE, cross_attention_dim=6, num_heads=2, attention_norm_eps=1e-6),
    "condition": replace(BASE, condition_channels=2, in_channels=1, out_channels=1),
    "levels": replace(
        BASE, channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(8, 4, 2), use_scale_shift_norm=True
    ),
}


def inputs(config: UNetConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    size, generator = config.sample_size, torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    values = {"x": normal(3, config.in_channels, size, size), "t": torch.tensor([0, 17, 999])}
    if config.num_classes is not None:
        values["class_labels"] = torch.tensor([0, 4, config.num_class_embeddings - 1])
    if config.cross_attention_dim is not None:
        values["encoder_hidden_states"] = normal(3, 7, config.cross_attention_dim)
    if config.condition_channels:
        values["condition"] = normal(3, config.condition_channels, size, size)
    return values


def pair(config: UNetConfig, dtype: torch.dtype) -> tuple[UNet, ReferenceUNet]:
    """Both with the same weights, of which none is zero or one: each must count."""
    torch.manual_seed(0)
    reference = ReferenceUNet(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = UNet(config)
    ours.load_state_dict(reference.state_dict())
    return ours.to(dtype).eval(), reference.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_unet_equals_the_textbook(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    ours, reference = pair(config, dtype)
    arguments = inputs(config, dtype)
    expected, actual = reference(**arguments), ours(**arguments)
    assert expected.std() > 0.05
    # The same sums in another order: half a unit in the last place for each of about 40 sums in turn, a random walk
    # with gains of up to 4 in between, makes sqrt(40) * 4 = 25 units of the largest value; the largest of hundreds of
    # errors is up to four times the usual one.
    unit = torch.finfo(dtype).eps / 2
    bound = 100 * unit * expected.detach().abs().max()
    assert (actual - expected).abs().max() <= bound

    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    expected.backward(upstream)
    actual.backward(upstream)
    gradients = dict(reference.named_parameters())
    # The way back is as long as the way there. The gradient of a bias before a norm is nearly all rounding, so errors
    # are measured by the largest gradient of the model.
    scale = max(float(parameter.grad.abs().max()) for parameter in gradients.values())
    for parameter_name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[parameter_name].grad).abs().max()
        assert difference <= 200 * unit * scale, parameter_name


def test_the_textbook_takes_no_part_of_the_engine() -> None:
    tree = ast.parse(inspect.getsource(fastdiff.reference_unet))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {name for name in imported if name.startswith("fastdiff")} == {"fastdiff.unet_config"}


def test_without_labels_it_takes_the_null_class() -> None:
    config = CONFIGS["classes"]
    _, reference = pair(config, torch.float32)
    arguments = inputs(config, torch.float32)
    null = torch.full((3,), config.num_classes)
    expected = reference(arguments["x"], arguments["t"], null)
    assert torch.equal(reference(arguments["x"], arguments["t"]), expected)
    assert not torch.equal(reference(**arguments), expected)


def test_dropout_only_in_training() -> None:
    config = replace(BASE, dropout=0.5)
    _, reference = pair(config, torch.float32)
    arguments = inputs(config, torch.float32)
    still = reference(**arguments)
    assert torch.equal(reference(**arguments), still)
    assert not torch.equal(reference.train()(**arguments), still)
