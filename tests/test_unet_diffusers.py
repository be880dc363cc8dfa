"""Configured accordingly, the UNet equals diffusers' UNet2DModel with the same weights."""

import pytest
import torch

from fastdiff.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

from fastdiff.compat.diffusers.unet import load_diffusers_unet, to_diffusers_unet  # noqa: E402

DDPM = UNetConfig(
    sample_size=16,
    model_channels=32,
    channel_mult=(1, 2, 2),
    attention_resolutions=(8,),
    num_res_blocks=2,
    norm_num_groups=8,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
)
ADM = UNetConfig(
    sample_size=16,
    in_channels=1,
    out_channels=2,
    model_channels=32,
    channel_mult=(1, 2),
    attention_resolutions=(8,),
    num_res_blocks=1,
    num_head_channels=8,
    num_classes=10,
    use_scale_shift_norm=True,
    norm_num_groups=16,
)
ADM_RESBLOCK_UPDOWN = UNetConfig.from_dict({**ADM.to_dict(), "resblock_updown": True, "attention_resolutions": [16, 8]})


def diffusers_model(config: UNetConfig) -> torch.nn.Module:
    """The UNet2DModel of the same shape."""
    attention = [resolution in config.attention_resolutions for resolution in config.level_resolutions]
    plain = "ResnetDownsampleBlock2D" if config.resblock_updown else "DownBlock2D"
    down = ["AttnDownBlock2D" if attend else plain for attend in attention]
    return diffusers.UNet2DModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.level_channels,
        layers_per_block=config.num_res_blocks,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        downsample_type="resnet" if config.resblock_updown else "conv",
        upsample_type="resnet" if config.resblock_updown else "conv",
        downsample_padding=config.downsample_padding,
        attention_head_dim=config.num_head_channels,
        norm_num_groups=config.norm_num_groups,
        # Without it, UNet2DModel with scale_shift leaves out the norm of the middle attention.
        attn_norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        resnet_time_scale_shift="scale_shift" if config.use_scale_shift_norm else "default",
        num_class_embeds=None if config.num_classes is None else config.num_classes + 1,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
    )


@pytest.mark.parametrize("config", [DDPM, ADM, ADM_RESBLOCK_UPDOWN], ids=["ddpm", "adm", "adm_resblock_updown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_equals_unet2dmodel_with_the_same_weights(config: UNetConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = diffusers_model(config).eval()
    # Nothing may stay zero or one: every weight of every layer must count.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours, theirs = load_diffusers_unet(theirs, null_class=config.num_classes is not None).to(dtype), theirs.to(dtype)
    assert ours.config == config

    x = torch.randn(3, config.in_channels, 16, 16, dtype=dtype)
    t = torch.tensor([0, 17, 999])
    labels = None if config.num_classes is None else torch.tensor([0, 9, 10])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=labels).sample
        actual = ours(x.to(memory_format=torch.channels_last), t, labels)
    assert expected.std() > 0.1
    # The same sums in another order. float32: 2^-24 per layer, times outputs up to 4, times a random walk over the 40
    # layers with gains around 4 make 6e-6. float64: 1e-14, as both embed the timestep by the same float32 angles.
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert (actual - expected).abs().max() <= bound


def test_cifar10_preset_takes_the_weights_of_the_ddpm_cifar10_layout() -> None:
    with torch.device("meta"):
        ours = UNet.preset("cifar10")
        theirs = diffusers_model(ours.config)
        shapes = {name: value.shape for name, value in to_diffusers_unet(ours).state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
