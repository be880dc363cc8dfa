"""The U-Net of the DDPM and ADM family, channels-last.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models" (DDPM); Nichol and Dhariwal 2021, "Improved
denoising diffusion probabilistic models" (scale-shift norm); Dhariwal and Nichol 2021, "Diffusion models beat GANs on
image synthesis" (ADM).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.kernels.checks import check_tensor
from fastdiff.unet_blocks import (
    CrossAttention,
    Downsample,
    GroupNormSiLU,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedding,
    Upsample,
    zero_init,
)
from fastdiff.unet_config import PRESETS, UNetConfig

ModulationOf = Callable[[Any], Tensor]
__all__ = ["PRESETS", "UNet", "UNetConfig"]


class UNetLayer(nn.Module):
    """One residual block, then self-attention and cross-attention where the configuration has them.

    `forward(x, modulation, encoder_hidden_states, dropout_keys=None)`: x [B, in_channels, H, W] -> [B, out_channels, H,
    W]; modulation is that of the residual block, dropout_keys as of UNet here and in all below.
    """

    resnet: ResidualBlock

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, *, attention: bool) -> None:
        super().__init__()
        self.resnet = _residual_block(config, in_channels, out_channels)
        self.attention: SelfAttention | None = None
        self.cross_attention: CrossAttention | None = None
        if not attention:
            return
        num_heads, num_groups = config.heads(out_channels), config.norm_num_groups
        eps = config.norm_eps if config.attention_norm_eps is None else config.attention_norm_eps
        self.attention = SelfAttention(out_channels, num_heads=num_heads, num_groups=num_groups, eps=eps)
        if config.cross_attention_dim is not None:
            self.cross_attention = CrossAttention(
                out_channels, config.cross_attention_dim, num_heads=num_heads, num_groups=num_groups, eps=eps
            )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        encoder_hidden_states: Tensor | None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        x = self.resnet(x, modulation, dropout_keys)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, encoder_hidden_states)
        return x


class DownBlock(nn.Module):
    """The layers of one resolution on the way down, then the downsampling that leaves it (None at the last).

    `forward(x, modulation_of, encoder_hidden_states, dropout_keys=None)` -> the output of every layer and of the
    downsampling, in order: each is a skip connection, and the last goes on.
    """

    def __init__(self, layers: list[UNetLayer], downsample: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.downsample = downsample

    def forward(
        self,
        x: Tensor,
        modulation_of: ModulationOf,
        encoder_hidden_states: Tensor | None,
        dropout_keys: Tensor | None = None,
    ) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            x = layer(x, modulation_of(layer.resnet), encoder_hidden_states, dropout_keys)
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(_resampled(self.downsample, x, modulation_of, dropout_keys))
        return outputs


class UpBlock(nn.Module):
    """The layers of one resolution on the way up, each fed one skip, then the upsampling (None at the last).

    `forward(x, skips, modulation_of, encoder_hidden_states, dropout_keys=None)` -> Tensor; takes what it needs off the
    end of `skips`.
    """

    def __init__(self, layers: list[UNetLayer], upsample: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.upsample = upsample

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        modulation_of: ModulationOf,
        encoder_hidden_states: Tensor | None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, modulation_of(layer.resnet), encoder_hidden_states, dropout_keys)
        return x if self.upsample is None else _resampled(self.upsample, x, modulation_of, dropout_keys)


def _resampled(module: nn.Module, x: Tensor, modulation_of: ModulationOf, dropout_keys: Tensor | None) -> Tensor:
    return module(x, modulation_of(module), dropout_keys) if isinstance(module, ResidualBlock) else module(x)


class _Precomputed:
    """Hands out the parts of `UNet.time_modulation` [B, M] in the order in which the residual blocks ask."""

    def __init__(self, modulation: Tensor) -> None:
        self._rest = modulation

    def __call__(self, block: ResidualBlock) -> Tensor:
        part, self._rest = self._rest.tensor_split((block.modulation_channels,), dim=1)
        return part


class UNet(nn.Module):
    """The U-Net of the DDPM and ADM family. Weights are channels-last, and so is the output for any input layout.

    `null_class`: the label that means "no class" (num_classes), or None for a model without it. `modulation_channels`:
    those of `time_modulation`.
    """

    # for fastdiff.compilation.repeated_blocks
    _repeated_blocks = ("UNetLayer",)

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.level_channels[0]
        embedding_channels = 4 * config.model_channels
        self.time_embedding = TimestepEmbedding(
            config.model_channels,
            embedding_channels,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        self.class_embedding: nn.Embedding | None = None
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeddings, embedding_channels)
        self.conv_in = nn.Conv2d(config.in_channels + config.condition_channels, channels, kernel_size=3, padding=1)

        levels = list(zip(config.level_channels, config.level_resolutions))
        skip_channels = [channels]
        self.down_blocks = nn.ModuleList()
        for level, (out_channels, resolution) in enumerate(levels):
            attention = resolution in config.attention_resolutions
            layers = []
            for _ in range(config.num_res_blocks):
                layers.append(UNetLayer(config, channels, out_channels, attention=attention))
                channels = out_channels
                skip_channels.append(channels)
            downsample = None
            if level < len(levels) - 1:
                downsample = _downsample(config, channels)
                skip_channels.append(channels)
            self.down_blocks.append(DownBlock(layers, downsample))

        self.mid_layers = nn.ModuleList(
            [UNetLayer(config, channels, channels, attention=attention) for attention in (True, False)]
        )

        self.up_blocks = nn.ModuleList()
        for level, (out_channels, resolution) in reversed(list(enumerate(levels))):
            attention = resolution in config.attention_resolutions
            layers = []
            for _ in range(config.num_res_blocks + 1):
                layers.append(UNetLayer(config, channels + skip_channels.pop(), out_channels, attention=attention))
                channels = out_channels
            self.up_blocks.append(UpBlock(layers, _upsample(config, channels) if level > 0 else None))

        self.norm_out = GroupNormSiLU(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv_out = zero_init(nn.Conv2d(channels, config.out_channels, kernel_size=3, padding=1))
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        self.modulation_channels = sum(block.modulation_channels for block in blocks)
        for number, block in enumerate(blocks):
            block.dropout.layer = number
        # The layout of a conv's weight decides that of its output, even for an input in NCHW.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to the types of torch 2.11

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> UNet:
        """A freshly initialised UNet of a named configuration: "digits", "cifar10" or "imagenet64".

        `overrides` replace fields of its UNetConfig: `UNet.preset("imagenet64", num_classes=1000)`. Raises ValueError
        for an unknown name or field, or for values that do not fit.
        """
        if name not in PRESETS:
            raise ValueError(f"preset name must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(UNetConfig.from_dict({**PRESETS[name].to_dict(), **overrides}))

    @property
    def null_class(self) -> int | None:
        """The label that means "no class", None for a model without classes or without that one."""
        return self.config.num_classes if self.config.null_class else None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        condition: Tensor | None = None,
        modulation: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Predict from the noisy images x [B, in_channels, H, W] at timesteps t [B] (integer or floating).

        class_labels: int64 or int32 [B] in 0..num_classes, the last being the null class; None means the null class for
        all, and is an error where the model has classes but not that one. Their range is checked on the CPU only: on a
        GPU that would synchronise the host with the device.
        encoder_hidden_states: [B, S, cross_attention_dim]; needed exactly when the model has cross-attention.
        condition: [B, condition_channels, H, W] of any float dtype; needed exactly when the model has such channels.
        modulation: [B, modulation_channels], `time_modulation(t, class_labels)` computed before; t and class_labels are
        then not read.
        dropout_keys: int64 [B, 3], the seed of each image, its index in the data set and the epoch: dropout depends on
        these and the layer (`fastdiff.kernels.dropout`), not on the batch. By default it draws from torch's generator.
        Without effect in eval mode or without dropout.
        H and W must be multiples of `config.downsampling_factor`; they need not be sample_size.

        Returns [B, out_channels, H, W], channels-last, in the dtype of the weights (or of autocast). Raises ValueError
        for inputs that do not fit the configuration.
        """
        self._validate_inputs(x, t, class_labels, encoder_hidden_states)
        self._validate_condition(x, condition)
        if dropout_keys is not None:
            check_tensor("dropout_keys", dropout_keys, (x.shape[0], 3), (torch.int64,), x.device)
        modulation_of: Any
        if modulation is None:
            embedding = self._embedding(t, class_labels)

            def modulation_of(block: ResidualBlock) -> Tensor:
                return block.modulation(embedding)

        elif modulation.shape != (x.shape[0], self.modulation_channels):
            expected = [x.shape[0], self.modulation_channels]
            raise ValueError(f"modulation must have shape {expected}, got {list(modulation.shape)}")
        else:
            modulation_of = _Precomputed(modulation)
        if condition is not None:
            x = torch.cat([x, condition.to(x.dtype)], dim=1)
        skips = [self.conv_in(x)]
        for block in self.down_blocks:
            skips += block(skips[-1], modulation_of, encoder_hidden_states, dropout_keys)
        h = skips[-1]
        for layer in self.mid_layers:
            h = layer(h, modulation_of(layer.resnet), encoder_hidden_states, dropout_keys)
        for block in self.up_blocks:
            # a list of its own: FSDP hands a block a copy, so what it takes off one is not gone from ours
            count = len(block.layers)  # type: ignore[arg-type]
            taken, skips = skips[-count:], skips[:-count]
            h = block(h, taken, modulation_of, encoder_hidden_states, dropout_keys)
        return self.conv_out(self.norm_out(h))

    @property
    def precomputes(self) -> bool:
        """Whether a caller may use `time_modulation`: not where something stands between a call and this forward.

        That is a subclass's forward, or one of the instance, or hooks, FSDP's among them: they may change t, or have to
        see every call.
        """
        plain = type(self).forward is UNet.forward and "forward" not in vars(self)
        return plain and not (self._forward_hooks or self._forward_pre_hooks)

    def time_modulation(self, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """All that the network makes of timesteps t [N] and class_labels [N]: [N, modulation_channels].

        It does not depend on the images: a sampler asks for all its steps at once, and `forward` takes a step's part.
        """
        embedding = self._embedding(t, class_labels)
        # they run in the order of their registration
        blocks = (module for module in self.modules() if isinstance(module, ResidualBlock))
        return torch.cat([block.modulation(embedding) for block in blocks], dim=1)

    def _embedding(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """[N, 4 * model_channels], with the SiLU that every residual block starts with: once is enough."""
        embedding = self.time_embedding(t)
        if self.class_embedding is not None:
            if class_labels is None:
                embedding = embedding + self.class_embedding.weight[-1]
            else:
                embedding = embedding + self.class_embedding(class_labels)
        return F.silu(embedding)

    def _validate_inputs(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None, encoder_hidden_states: Tensor | None
    ) -> None:
        config = self.config
        if x.dim() != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"x must have shape [B, {config.in_channels}, H, W], got {list(x.shape)}")
        batch, _, height, width = x.shape
        factor = config.downsampling_factor
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"the height and width of x must be positive multiples of {factor}, got {height} x {width}"
            )
        weight = self.conv_in.weight
        if x.device != weight.device:
            raise ValueError(f"x must be on {weight.device} like the model, got {x.device}")
        if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x must be {weight.dtype} like the model (or autocast to it), got {x.dtype}")
        if not isinstance(t, Tensor):
            raise TypeError(f"t must be a tensor of shape [{batch}], got {type(t).__name__}")
        if t.shape != (batch,):
            raise ValueError(f"t must have shape [{batch}], one timestep per image of x, got {list(t.shape)}")
        if class_labels is None:
            if config.num_classes is not None and not config.null_class:
                raise ValueError("class_labels are needed by a model without a null class (null_class=False), got None")
        else:
            if config.num_classes is None:
                raise ValueError("class_labels must be None for a model without classes (num_classes=None), got labels")
            if class_labels.shape != (batch,) or class_labels.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"class_labels must be int64 or int32 of shape [{batch}],"
                    f" got {class_labels.dtype} of shape {list(class_labels.shape)}"
                )
            # torch.compile cannot branch on values
            if class_labels.device.type == "cpu" and batch and not torch.compiler.is_compiling():
                low, high = class_labels.aminmax()
                last = config.num_class_embeddings - 1
                if low < 0 or high > last:
                    raise ValueError(f"class_labels must be in [0, {last}], got {class_labels.tolist()}")
        dim = config.cross_attention_dim
        if dim is None:
            if encoder_hidden_states is not None:
                raise ValueError(
                    "encoder_hidden_states must be None for a model without cross-attention (cross_attention_dim=None),"
                    f" got shape {list(encoder_hidden_states.shape)}"
                )
            return
        if encoder_hidden_states is None:
            raise ValueError(f"encoder_hidden_states must have shape [{batch}, S, {dim}], got None")
        shape = encoder_hidden_states.shape
        if len(shape) != 3 or shape[0] != batch or shape[2] != dim:
            raise ValueError(f"encoder_hidden_states must have shape [{batch}, S, {dim}], got {list(shape)}")

    def _validate_condition(self, x: Tensor, condition: Tensor | None) -> None:
        channels = self.config.condition_channels
        expected = [x.shape[0], channels, *x.shape[2:]]
        got = None if condition is None else list(condition.shape)
        if (channels or condition is not None) and (not channels or got != expected):
            accepted = f"have shape {expected}" if channels else "be None for a model with condition_channels=0"
            raise ValueError(f"condition must {accepted}, got {got}")


def _residual_block(config: UNetConfig, in_channels: int, out_channels: int, **resample: Any) -> ResidualBlock:
    return ResidualBlock(
        in_channels,
        out_channels,
        4 * config.model_channels,
        num_groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        use_scale_shift_norm=config.use_scale_shift_norm,
        **resample,
    )


def _downsample(config: UNetConfig, channels: int) -> nn.Module:
    if config.resblock_updown:
        return _residual_block(config, channels, channels, resample="down")
    return Downsample(channels, padding=config.downsample_padding)


def _upsample(config: UNetConfig, channels: int) -> nn.Module:
    if config.resblock_updown:
        return _residual_block(config, channels, channels, resample="up")
    return Upsample(channels)
