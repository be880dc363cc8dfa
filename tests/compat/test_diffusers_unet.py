"""UNet2DModel configurations in use, at reduced width, become a fastdiff.UNet with equal output, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

from fastdiff.compat.diffusers.unet import load_diffusers_unet, save_diffusers_unet, to_diffusers_unet  # noqa: E402

DDPM = {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "norm_num_groups": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "ddpm-cifar10-32": {
        **DDPM,
        "sample_size": 32,
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
    },
    # also ddpm-ema-church-256, -bedroom-256 and -cat-256
    "ddpm-celebahq-256": {
        **DDPM,
        "sample_size": 64,
        "block_out_channels": (16, 16, 32, 32, 64, 64),
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        "downsample_padding": 0,
    },
    "ldm-celebahq-256": {
        "sample_size": [16, 16],
        "block_out_channels": (16, 32, 48, 64),
        "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
        "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "dropout": 0.1,
        "act_fn": "swish",
    },
    "consistency-imagenet64": {
        "sample_size": 16,
        "block_out_channels": (16, 32, 48, 64),
        "layers_per_block": 3,
        "down_block_types": ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
        "up_block_types": (*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "attn_norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 7,
    },
}
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


def random_model(**options: Any) -> torch.nn.Module:
    """A UNet2DModel in which no weight is zero or one, so that every one of them counts."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def outputs(theirs: torch.nn.Module, ours: UNet) -> tuple[torch.Tensor, torch.Tensor]:
    config = ours.config
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, dtype=theirs.dtype)
    t = torch.tensor([17, 999])
    labels = None if config.num_classes is None else torch.tensor([0, config.num_class_embeddings - 1])
    with torch.no_grad():
        return ours(x, t, labels), theirs(x, t, class_labels=labels).sample


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_families_give_equal_output_and_come_back(family: str, dtype: torch.dtype) -> None:
    theirs = random_model(**FAMILIES[family]).to(dtype)
    ours = load_diffusers_unet(theirs)
    actual, expected = outputs(theirs, ours)
    assert expected.std() > 0.1
    # The same sums in another order: at most 4.8e-6 in float32 and 7.7e-15 in float64 over three inputs a family.
    assert (actual - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_come_back_weight_by_weight(family: str) -> None:
    theirs = random_model(**FAMILIES[family])
    back = to_diffusers_unet(load_diffusers_unet(theirs))
    ours, expected = back.state_dict(), theirs.state_dict()
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    x, labels = torch.randn(2, 3, 32, 32), None if theirs.class_embedding is None else torch.tensor([0, 6])
    with torch.no_grad():
        same = [model(x, torch.tensor([5, 500]), class_labels=labels).sample for model in (theirs, back)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(sample_size=8, model_channels=16, channel_mult=(1, 2), attention_resolutions=(), norm_num_groups=4),
        UNetConfig(
            sample_size=8,
            in_channels=1,
            out_channels=2,
            model_channels=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            num_heads=2,
            num_classes=5,
            use_scale_shift_norm=True,
            resblock_updown=True,
            norm_num_groups=8,
        ),
    ],
    ids=["ddpm", "adm"],
)
def test_a_model_of_ours_survives_a_folder(config: UNetConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_diffusers_unet(unet, tmp_path / "model")
    loaded = load_diffusers_unet(tmp_path / "model", null_class=config.num_classes is not None)
    assert loaded.null_class == unet.null_class
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in unet.state_dict().items())
    assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "model").eval()
    actual, expected = outputs(theirs, loaded)
    assert (actual - expected).abs().max() <= 1e-5


def test_a_pipeline_folder_and_an_old_checkpoint_are_read(tmp_path: Path) -> None:
    theirs = random_model(**SMALL)
    theirs.save_pretrained(tmp_path / "unet")
    # the names of attention before diffusers 0.14
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    actual, expected = outputs(theirs, load_diffusers_unet(str(tmp_path)))
    assert (actual - expected).abs().max() <= 1e-5


def test_a_hub_name_comes_from_the_cache_when_offline(tmp_path: Path) -> None:
    theirs = random_model(**SMALL)
    repository = tmp_path / "models--someone--small"
    commit = "0123456789" * 4
    theirs.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = load_diffusers_unet("someone/small", torch_dtype=torch.float64, **options)
    assert loaded.conv_in.weight.dtype == torch.float64
    actual, expected = outputs(theirs.double(), loaded)
    assert (actual - expected).abs().max() <= 2e-14
    with pytest.raises(OSError, match="someone/other"):
        load_diffusers_unet("someone/other", **options)


def test_the_weights_are_a_copy_in_the_same_mode() -> None:
    theirs = random_model(**SMALL).train()
    ours = load_diffusers_unet(theirs)
    assert ours.training
    assert all(parameter.requires_grad for parameter in ours.parameters())
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    with torch.no_grad():
        for parameter in [*ours.parameters(), *to_diffusers_unet(ours).parameters()]:
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


def test_class_embeddings_have_a_null_class_only_where_told() -> None:
    theirs = random_model(**SMALL, num_class_embeds=4)
    plain, guided = load_diffusers_unet(theirs), load_diffusers_unet(theirs, null_class=True)
    assert (plain.config.num_classes, plain.null_class) == (4, None)
    assert (guided.config.num_classes, guided.null_class) == (3, 3)
    assert to_diffusers_unet(plain).config.num_class_embeds == to_diffusers_unet(guided).config.num_class_embeds == 4
    with pytest.raises(ValueError, match="class_labels are needed by a model without a null class"):
        plain(torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"null_class must be False .*num_class_embeds=None"):
        load_diffusers_unet(random_model(**SMALL), null_class=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("center_input_sample", True),
        ("time_embedding_type", "fourier"),
        ("time_embedding_dim", 64),
        ("down_block_types", ("SkipDownBlock2D", "AttnDownBlock2D")),
        ("up_block_types", ("AttnUpBlock2D", "SkipUpBlock2D")),
        ("up_block_types", ("UpBlock2D", "AttnUpBlock2D")),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 2),
        ("block_out_channels", (8, 12)),
        ("downsample_type", "fir"),
        ("upsample_type", None),
        ("act_fn", "relu"),
        ("attention_head_dim", 3),
        ("attn_norm_num_groups", 2),
        ("resnet_time_scale_shift", "spatial"),
        ("add_attention", False),
        ("class_embed_type", "timestep"),
        ("sample_size", None),
        ("sample_size", (8, 16)),
        ("something_new", 1),
    ],
)
def test_what_a_unet_cannot_reproduce_is_named(option: str, value: Any, tmp_path: Path) -> None:
    # A file: diffusers itself refuses to build some of these.
    config = dict(diffusers.UNet2DModel(**SMALL).config)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel", option: value}))
    with pytest.raises(ValueError, match=f"cannot reproduce {option}="):
        load_diffusers_unet(tmp_path)


def test_combinations_and_other_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot reproduce attn_norm_num_groups=None"):
        load_diffusers_unet(diffusers.UNet2DModel(**SMALL, resnet_time_scale_shift="scale_shift"))
    # the upsampling out of the attention level by residual blocks, the downsampling into it by convolutions
    with pytest.raises(ValueError, match="must all resample by convolutions or all by residual blocks"):
        load_diffusers_unet(diffusers.UNet2DModel(**SMALL, upsample_type="resnet"))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="must hold a UNet2DModel, got a AutoencoderKL"):
        load_diffusers_unet(tmp_path)
    with pytest.raises(TypeError, match="or a UNet2DModel, got Linear"):
        load_diffusers_unet(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="revision go with a path"):
        load_diffusers_unet(diffusers.UNet2DModel(**SMALL), revision="main")
    fused = diffusers.UNet2DModel(**SMALL)
    fused.mid_block.attentions[0].fuse_projections()
    with pytest.raises(ValueError, match=r"weights that its configuration does not: mid_block.*to_qkv"):
        load_diffusers_unet(fused)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("cross_attention_dim", {"cross_attention_dim": 4}),
        ("condition_channels", {"condition_channels": 1}),
        ("attention_norm_eps", {"attention_norm_eps": 1e-3}),
        ("channel_mult", {"channel_mult": (2, 4)}),
        ("num_heads", {"num_heads": 2, "attention_resolutions": (8, 4)}),
    ],
)
def test_what_diffusers_has_nothing_for_is_named(field: str, options: dict[str, Any]) -> None:
    config = {"sample_size": 8, "model_channels": 8, "channel_mult": (1, 2), "attention_resolutions": ()}
    unet = UNet(UNetConfig(**{**config, "norm_num_groups": 4, **options}))
    with pytest.raises(ValueError, match=f"no counterpart of {field}="):
        to_diffusers_unet(unet)
