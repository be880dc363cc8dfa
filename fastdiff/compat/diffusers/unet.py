"""diffusers' UNet2DModel as a fastdiff.UNet with the same weights, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from fastdiff.compat.diffusers.unet_config import diffusers_config, unet_config
from fastdiff.unet import UNet

# From our names to those of UNet2DModel; the merged projections of attention come after.
RENAMES = (
    (r"\.layers\.(\d+)\.resnet\.", r".resnets.\1."),
    (r"\.layers\.(\d+)\.attention\.", r".attentions.\1."),
    (r"^mid_layers\.(\d+)\.resnet\.", r"mid_block.resnets.\1."),
    (r"^mid_layers\.0\.attention\.", "mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"^norm_out\.", "conv_norm_out."),
)


def load_diffusers_unet(
    path_or_model: str | Path | UNet2DModel, *, null_class: bool = False, **from_pretrained: Any
) -> UNet:
    """A fastdiff.UNet that computes what a diffusers UNet2DModel computes, with a copy of its weights.

    path_or_model: a UNet2DModel; a folder with its config.json and weights, or one with such a `unet` folder in it (a
        saved pipeline); or a name on the Hugging Face hub, downloaded unless HF_HUB_OFFLINE is set.
    null_class: the last class embedding means "no class", as in models that fastdiff trains; it becomes the model's
        `null_class`. diffusers does not record it.
    from_pretrained: options of UNet2DModel.from_pretrained: torch_dtype, revision, variant, cache_dir, subfolder, ...

    The result has the dtype, device and mode of the UNet2DModel: float32, on the CPU and in eval mode where it is read
    from a path. Raises ValueError naming an option of the configuration that a fastdiff.UNet cannot reproduce, or
    weights that do not fit; OSError where nothing is found; TypeError for another kind of model.
    """
    if isinstance(path_or_model, (str, Path)):
        description, options = _description(path_or_model, from_pretrained)
        if description.get("_class_name", "UNet2DModel") != "UNet2DModel":
            raise ValueError(f"{path_or_model} must hold a UNet2DModel, got a {description['_class_name']}")
        # before the weights, which may be gigabytes
        config = unet_config(description, null_class=null_class)
        theirs = UNet2DModel.from_pretrained(path_or_model, **options)
    elif isinstance(path_or_model, UNet2DModel):
        if from_pretrained:
            raise ValueError(f"{', '.join(from_pretrained)} go with a path, not with a UNet2DModel")
        theirs = path_or_model
        config = unet_config(theirs.config, null_class=null_class)
    else:
        raise TypeError(
            f"path_or_model must be a path, a hub name or a UNet2DModel, got {type(path_or_model).__name__}"
        )
    with torch.device("meta"):
        model = UNet(config)
    model.load_state_dict(_our_weights(theirs.state_dict(), list(model.state_dict())), assign=True)
    return model.to(memory_format=torch.channels_last).train(theirs.training)


def to_diffusers_unet(unet: UNet) -> UNet2DModel:
    """The diffusers UNet2DModel that computes what a fastdiff.UNet computes, with a copy of its weights.

    Raises ValueError naming a field of `unet.config` that UNet2DModel has nothing for: cross_attention_dim,
    condition_channels, another attention_norm_eps than norm_eps, channel_mult that does not start with 1, num_heads
    where heads differ in size.
    """
    options = diffusers_config(unet.config)
    with torch.device("meta"):
        model = UNet2DModel(**options)
    model.load_state_dict(_their_weights(unet.state_dict()), assign=True)
    return model.train(unet.training)


def save_diffusers_unet(unet: UNet, folder: str | Path) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors, which `UNet2DModel.from_pretrained(folder)` reads.

    Raises ValueError like `to_diffusers_unet`.
    """
    to_diffusers_unet(unet).save_pretrained(folder)


def _description(path: str | Path, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a model, and the options that found it: in the folder itself or in its `unet`."""
    try:
        return UNet2DModel.load_config(path, **options), options
    except OSError:
        if "subfolder" in options:
            raise
        options = {**options, "subfolder": "unet"}
        return UNet2DModel.load_config(path, **options), options


def _their_names(name: str) -> list[str]:
    """What UNet2DModel calls one of our weights: one name, or those of q, k and v that it holds in this order."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"] if ".qkv." in name else [name]


def _our_weights(state: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    sources = {name: _their_names(name) for name in names}
    known = {source for group in sources.values() for source in group}
    if missing := sorted(known - set(state)):
        raise ValueError(f"the UNet2DModel lacks the weights {', '.join(missing[:5])} of its configuration")
    if unknown := sorted(set(state) - known):
        # adapters, fused projections
        raise ValueError(f"the UNet2DModel holds weights that its configuration does not: {', '.join(unknown[:5])}")
    # cat copies, also a single tensor
    return {name: torch.cat([state[source] for source in group]) for name, group in sources.items()}


def _their_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for name, value in state.items():
        targets = _their_names(name)
        for target, part in zip(targets, value.chunk(len(targets))):
            converted[target] = part.clone(memory_format=torch.contiguous_format)
    return converted
