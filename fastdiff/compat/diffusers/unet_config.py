"""The configuration of diffusers' UNet2DModel as a UNetConfig, and back; what one of them lacks is named."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel

from fastdiff.unet_config import UNetConfig

# Options with one accepted meaning: only these values can be reproduced.
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
TRANSLATED = {
    "sample_size",
    "in_channels",
    "out_channels",
    "time_embedding_dim",
    "freq_shift",
    "flip_sin_to_cos",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "dropout",
    "attention_head_dim",
    "norm_num_groups",
    "attn_norm_num_groups",
    "norm_eps",
    "num_class_embeds",
    # of a learned time embedding only
    "num_train_timesteps",
}
# Whether a block has attention, and how it resamples (None: its option says).
BLOCKS: dict[str, dict[str, tuple[bool, str | None]]] = {
    "down": {
        "DownBlock2D": (False, "conv"),
        "ResnetDownsampleBlock2D": (False, "resnet"),
        "AttnDownBlock2D": (True, None),
    },
    "up": {
        "UpBlock2D": (False, "conv"),
        "ResnetUpsampleBlock2D": (False, "resnet"),
        "AttnUpBlock2D": (True, None),
    },
}


def unet_config(config: Mapping[str, Any], *, null_class: bool = False) -> UNetConfig:
    """The UNetConfig of a UNet2DModel's configuration (`model.config`, or its config.json).

    null_class: the last of `num_class_embeds` means "no class"; diffusers does not record that.
    Raises ValueError naming the first option that a fastdiff.UNet cannot reproduce.
    """
    options = {**_defaults(), **{name: value for name, value in config.items() if not name.startswith("_")}}
    for name, accepted in ACCEPTED.items():
        if options[name] not in accepted:
            raise _unsupported(name, options[name], " or ".join(map(repr, accepted)))
    for name in sorted(set(options) - set(ACCEPTED) - TRANSLATED):
        default = _defaults().get(name)
        if options[name] != default:
            raise _unsupported(name, options[name], repr(default))

    channels, levels = list(options["block_out_channels"]), len(options["block_out_channels"])
    if any(width % channels[0] for width in channels):
        raise _unsupported("block_out_channels", channels, "multiples of the first")
    if options["time_embedding_dim"] not in (None, 4 * channels[0]):
        raise _unsupported("time_embedding_dim", options["time_embedding_dim"], f"None or {4 * channels[0]}")
    scale_shift = options["resnet_time_scale_shift"] == "scale_shift"
    groups = options["norm_num_groups"]
    # Without this option a scale-shift model has no norm in its middle attention.
    middle = options["attn_norm_num_groups"] or (None if scale_shift else groups)
    if middle != groups:
        raise _unsupported("attn_norm_num_groups", options["attn_norm_num_groups"], f"norm_num_groups, {groups}")
    sample_size = _square(options["sample_size"])
    attention, resblock_updown = _blocks(options)
    head_dim = options["attention_head_dim"]
    for width in {channels[level] for level in range(levels) if attention[level]} | {channels[-1]}:
        if head_dim is not None and width % head_dim:
            raise _unsupported("attention_head_dim", head_dim, f"a divisor of {width} channels")
    num_classes = options["num_class_embeds"]
    if null_class and num_classes is None:
        raise ValueError("null_class must be False for a model without classes (num_class_embeds=None), got True")
    return UNetConfig(
        sample_size=sample_size,
        in_channels=options["in_channels"],
        out_channels=options["out_channels"],
        model_channels=channels[0],
        channel_mult=tuple(width // channels[0] for width in channels),
        num_res_blocks=options["layers_per_block"],
        attention_resolutions=tuple(sample_size // 2**level for level in range(levels) if attention[level]),
        num_head_channels=head_dim,
        dropout=options["dropout"],
        num_classes=None if num_classes is None else num_classes - null_class,
        null_class=num_classes is None or null_class,
        use_scale_shift_norm=scale_shift,
        resblock_updown=resblock_updown,
        norm_num_groups=groups,
        norm_eps=options["norm_eps"],
        flip_sin_to_cos=options["flip_sin_to_cos"],
        freq_shift=options["freq_shift"],
        downsample_padding=options["downsample_padding"],
    )


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """The options of the UNet2DModel that a UNetConfig describes.

    Raises ValueError naming the first field that UNet2DModel has nothing for.
    """
    if config.cross_attention_dim is not None:
        raise _not_in_diffusers("cross_attention_dim", config.cross_attention_dim, "None")
    if config.condition_channels:
        raise _not_in_diffusers("condition_channels", config.condition_channels, "0")
    if config.condition_channels:
        raise _not_in_diffusers("condition_channels", config.condition_channels, "0")
    if config.attention_norm_eps not in (None, config.norm_eps):
        raise _not_in_diffusers("attention_norm_eps", config.attention_norm_eps, f"norm_eps, {config.norm_eps}")
    if config.channel_mult[0] != 1:
        raise _not_in_diffusers("channel_mult", config.channel_mult, "1 first")
    attention = [resolution in config.attention_resolutions for resolution in config.level_resolutions]
    plain, kind = ("ResnetDownsampleBlock2D", "resnet") if config.resblock_updown else ("DownBlock2D", "conv")
    down = ["AttnDownBlock2D" if attend else plain for attend in attention]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.level_channels,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "downsample_type": kind,
        "upsample_type": kind,
        "downsample_padding": config.downsample_padding,
        "dropout": config.dropout,
        "attention_head_dim": _head_dim(config, attention),
        "norm_num_groups": config.norm_num_groups,
        "attn_norm_num_groups": config.norm_num_groups if config.use_scale_shift_norm else None,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "num_class_embeds": config.num_class_embeddings or None,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
    }


def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(UNet2DModel.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def _blocks(options: Mapping[str, Any]) -> tuple[list[bool], bool]:
    """Which levels have attention, from full resolution down, and whether residual blocks resample."""
    down, up = _parsed(options, "down"), _parsed(options, "up")
    if [attend for attend, _ in up] != [attend for attend, _ in reversed(down)]:
        raise _unsupported("up_block_types", options["up_block_types"], "attention where down_block_types have it")
    # The last block of either way resamples nothing.
    kinds = {kind for _, kind in [*down[:-1], *up[:-1]]}
    if len(kinds) > 1:
        raise ValueError(
            "down_block_types, up_block_types, downsample_type and upsample_type must all resample by convolutions or"
            f" all by residual blocks, got {list(options['down_block_types'])} ({options['downsample_type']}) and"
            f" {list(options['up_block_types'])} ({options['upsample_type']})"
        )
    return [attend for attend, _ in down], kinds == {"resnet"}


def _parsed(options: Mapping[str, Any], way: str) -> list[tuple[bool, str]]:
    blocks = []
    for name in options[f"{way}_block_types"]:
        # an old prefix that diffusers still accepts
        found = BLOCKS[way].get(name.removeprefix("UNetRes"))
        if found is None:
            raise _unsupported(f"{way}_block_types", name, ", ".join(BLOCKS[way]))
        blocks.append((found[0], found[1] or options[f"{way}sample_type"]))
    return blocks


def _square(sample_size: Any) -> int:
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    if len(sides) != 1:
        # a level of a UNetConfig is named by one size
        raise _unsupported("sample_size", sample_size, "one number (or register_to_config(sample_size=...) first)")
    return int(sides.pop())


def _head_dim(config: UNetConfig, attention: list[bool]) -> int | None:
    """Channels per head in every attention, None for a single head."""
    if config.num_head_channels is not None or config.num_heads in (None, 1):
        return config.num_head_channels
    widths = [width for width, attend in zip(config.level_channels, attention) if attend] + [config.level_channels[-1]]
    sizes = {width // config.heads(width) for width in widths}
    if len(sizes) > 1:
        raise _not_in_diffusers("num_heads", config.num_heads, "heads of one size (num_head_channels)")
    return sizes.pop()


def _unsupported(name: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"a fastdiff.UNet cannot reproduce {name}={value!r} of a UNet2DModel: it must be {accepted}")


def _not_in_diffusers(name: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"UNet2DModel has no counterpart of {name}={value!r}: it must be {accepted}")
