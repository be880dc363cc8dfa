"""GroupNorm and SiLU in one kernel in a diffusers model, by changing the classes of its modules in place, and back.

A swapped module keeps everything it holds: weights, names, configuration. Its class alone says how it runs. What pays
is the kernel for channels-last tensors: on a CPU, and in other layouts, a module runs as before.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from fastdiff.kernels.dispatch import use_triton
from fastdiff.kernels.group_norm import group_norm_silu
from fastdiff.kernels.layout import is_channels_last

# Models that call conv_norm_out, then conv_act, then nothing else with either.
WITH_CONV_NORM_OUT = (UNet2DModel, UNet2DConditionModel, Encoder, Decoder)


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm that keeps the memory format of its input [B, C, *spatial]; `fuse_norms` makes it of one.

    `forward(input, channel_bias=None, scale=None, shift=None, silu=False)` takes what `group_norm_silu` takes.
    """

    def forward(
        self,
        input: Tensor,
        channel_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor:
        alone = channel_bias is None and scale is None and not silu
        if alone and not (_is_fused(self, input) and is_channels_last(input)):
            return nn.GroupNorm.forward(self, input)
        return group_norm_silu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            channel_bias=channel_bias,
            scale=scale,
            shift=shift,
            silu=silu,
        )


class FusedGroupNormSiLU(FusedGroupNorm):
    """A FusedGroupNorm with the SiLU that comes after it; that one is an `AppliedSiLU`."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return FusedGroupNorm.forward(self, input, silu=_is_fused(self, input))


class AppliedSiLU(nn.SiLU):
    """The SiLU that a FusedGroupNormSiLU has already applied."""

    def forward(self, input: Tensor) -> Tensor:
        return input if _is_fused(self, input) else nn.SiLU.forward(self, input)


class FusedResnetBlock2D(ResnetBlock2D):
    """diffusers' ResnetBlock2D with two fused norms; `fuse_norms` makes it of one.

    conv1's bias and the time embedding are added where the second norm reads its input.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        # An embedding that is not projected is added as it is, whatever its shape.
        raw_embedding = temb is not None and self.time_emb_proj is None
        if raw_embedding or not (_is_fused(self, input_tensor) and is_channels_last(input_tensor)):
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)  # type: ignore[arg-type]
        hidden_states = self.norm1(input_tensor, silu=True)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)

        hidden_states, bias = _without_bias(self.conv1, hidden_states)
        scale = shift = None
        if self.time_emb_proj is not None:
            embedding = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))  # [B, C] or [B, 2C]
            if self.time_embedding_norm == "scale_shift":
                scale, shift = embedding.chunk(2, dim=1)
            else:
                bias = embedding if bias is None else embedding + bias
        hidden_states = self.norm2(hidden_states, channel_bias=bias, scale=scale, shift=shift, silu=True)

        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


ORIGINALS: dict[type, type] = {
    FusedGroupNorm: nn.GroupNorm,
    FusedGroupNormSiLU: nn.GroupNorm,
    AppliedSiLU: nn.SiLU,
    FusedResnetBlock2D: ResnetBlock2D,
}


def fuse_norms(model: nn.Module) -> None:
    """Make a diffusers model normalise channels-last CUDA tensors with `group_norm_silu`; `unfuse_norms` undoes it.

    Fused are ResnetBlock2D, the last norm and SiLU of a U-Net or a VAE, and every other GroupNorm without its
    activation. Left as they are: subclasses, modules that somebody hooked or gave a forward of their own, blocks with
    another activation than SiLU, norms without weights.
    """
    for module in model.modules():
        if type(module) is ResnetBlock2D and _can_fuse(module):
            module.__class__ = FusedResnetBlock2D
        elif type(module) in WITH_CONV_NORM_OUT:
            norm, activation = module.conv_norm_out, module.conv_act
            if _is_norm(norm) and _is_plain(activation, nn.SiLU):
                norm.__class__, activation.__class__ = FusedGroupNormSiLU, AppliedSiLU
    for module in model.modules():
        if _is_norm(module):
            module.__class__ = FusedGroupNorm


def unfuse_norms(model: nn.Module) -> None:
    """Give every module that `fuse_norms` changed its class back."""
    for module in model.modules():
        module.__class__ = ORIGINALS.get(type(module), type(module))


def _is_fused(module: nn.Module, input: Tensor) -> bool:
    # An offloading library may hold on to the method of a class that the module no longer has.
    return type(module) in ORIGINALS and use_triton(input)


def _is_plain(module: Any, kind: type) -> bool:
    """Of this very class, and a call runs nothing but the forward of that class."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return type(module) is kind and "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def _is_norm(module: Any) -> bool:
    return _is_plain(module, nn.GroupNorm) and module.affine


def _can_fuse(block: ResnetBlock2D) -> bool:
    return (
        _is_norm(block.norm1)
        and _is_norm(block.norm2)
        and _is_plain(block.nonlinearity, nn.SiLU)
        # a VAE's blocks have other names for "no embedding"
        and (block.time_embedding_norm in ("default", "scale_shift") or block.time_emb_proj is None)
    )


def _without_bias(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(x) without its bias, and the bias [C]; an adapter's or a hooked conv is called as it is."""
    if not _is_plain(conv, nn.Conv2d):
        return conv(x), None
    return conv._conv_forward(x, conv.weight, None), conv.bias
