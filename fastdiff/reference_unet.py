"""The textbook U-Net in plain PyTorch, to check the engine's against.

Written from the papers: Ho et al. 2020, "Denoising diffusion probabilistic models" (DDPM), section 4 and appendix B;
Nichol and Dhariwal 2021, "Improved denoising diffusion probabilistic models" (scale-shift norm); Dhariwal and Nichol
2021, "Diffusion models beat GANs on image synthesis" (ADM); Rombach et al. 2022, "High-resolution image synthesis with
latent diffusion models" (cross-attention). Tensors are NCHW, every formula is spelled out, and nothing of the engine
but the configuration is used, so that agreement with it is evidence.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.unet_config import UNetConfig


class ReferenceUNet(nn.Module):
    """The function of `fastdiff.UNet` of the same configuration; its state_dict has the same names and shapes.

    Weights are freshly initialised by PyTorch's defaults, none of them zero: `load_state_dict` takes those of a UNet.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        embedding_channels = 4 * config.model_channels
        self.time_embedding = TimeEmbedding(config, embedding_channels)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeddings, embedding_channels)
        channels = config.level_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels + config.condition_channels, channels, 3, padding=1)

        last = len(config.channel_mult) - 1
        skips = [channels]
        self.down_blocks = nn.ModuleList()
        for level, out_channels in enumerate(config.level_channels):
            down = DownLevel()
            for _ in range(config.num_res_blocks):
                down.layers.append(Layer(config, channels, out_channels, _attends(config, level)))
                channels = out_channels
                skips.append(channels)
            if level < last:
                down.downsample = _resampling(config, channels, "down")
                skips.append(channels)
            self.down_blocks.append(down)

        self.mid_layers = nn.ModuleList([Layer(config, channels, channels, attends) for attends in (True, False)])

        self.up_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            up = UpLevel()
            for _ in range(config.num_res_blocks + 1):
                out_channels = config.level_channels[level]
                up.layers.append(Layer(config, channels + skips.pop(), out_channels, _attends(config, level)))
                channels = out_channels
            if level > 0:
                up.upsample = _resampling(config, channels, "up")
            self.up_blocks.append(up)

        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """[B, out_channels, H, W] from x [B, in_channels, H, W] and t [B]; the other arguments as those of `UNet`."""
        embedding = self.time_embedding(t)
        if self.config.num_classes is not None:
            if class_labels is None:
                class_labels = torch.full((len(x),), self.config.num_classes, device=x.device)
            embedding = embedding + self.class_embedding(class_labels)
        if condition is not None:
            x = torch.cat([x, condition], dim=1)

        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            h = level(h, skips, embedding, encoder_hidden_states)
        for layer in self.mid_layers:
            h = layer(h, embedding, encoder_hidden_states)
        for level in self.up_blocks:
            h = level(h, skips, embedding, encoder_hidden_states)
        return self.conv_out(F.silu(self.norm_out(h)))


class TimeEmbedding(nn.Module):
    """Sines and cosines of t times 10000^(-i / (half - freq_shift)), then linear, SiLU, linear (DDPM, appendix B).

    The angles are float32 in any model: that is part of the function which models of this family were trained with.
    """

    def __init__(self, config: UNetConfig, embedding_channels: int) -> None:
        super().__init__()
        self.config = config
        self.linear_1 = nn.Linear(config.model_channels, embedding_channels)
        self.linear_2 = nn.Linear(embedding_channels, embedding_channels)

    def forward(self, t: Tensor) -> Tensor:
        half = self.config.model_channels // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float().outer(torch.exp(-math.log(10_000) * i / (half - self.config.freq_shift)))  # [B, half]
        waves = [angles.cos(), angles.sin()] if self.config.flip_sin_to_cos else [angles.sin(), angles.cos()]
        embedding = torch.cat(waves, dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class DownLevel(nn.Module):
    """The layers of one resolution on the way down, then the downsampling; adds every output to `skips`."""

    downsample: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(self, h: Tensor, skips: list[Tensor], embedding: Tensor, sequence: Tensor | None) -> Tensor:
        for layer in self.layers:
            h = layer(h, embedding, sequence)
            skips.append(h)
        if hasattr(self, "downsample"):
            h = self.downsample(h, embedding)
            skips.append(h)
        return h


class UpLevel(nn.Module):
    """The layers of one resolution on the way up, each fed the last of `skips` as well, then the upsampling."""

    upsample: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(self, h: Tensor, skips: list[Tensor], embedding: Tensor, sequence: Tensor | None) -> Tensor:
        for layer in self.layers:
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding, sequence)
        return self.upsample(h, embedding) if hasattr(self, "upsample") else h


class Layer(nn.Module):
    """A residual block and, where the configuration has it, attention to the pixels and to the sequence."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, attends: bool) -> None:
        super().__init__()
        self.resnet = ResidualBlock(config, in_channels, out_channels)
        if attends:
            self.attention = SelfAttention(config, out_channels)
            if config.cross_attention_dim is not None:
                self.cross_attention = CrossAttention(config, out_channels)

    def forward(self, x: Tensor, embedding: Tensor, sequence: Tensor | None) -> Tensor:
        x = self.resnet(x, embedding)
        if hasattr(self, "attention"):
            x = self.attention(x)
        if hasattr(self, "cross_attention"):
            x = self.cross_attention(x, sequence)
        return x


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))), the time scaling and shifting instead in ADM.

    resample: "down" halves both x and what the first conv sees by 2x2 means, "up" doubles both (ADM).
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, resample: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.resample = resample
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        time_channels = 2 * out_channels if config.use_scale_shift_norm else out_channels
        self.time_emb_proj = nn.Linear(4 * config.model_channels, time_channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2), F.interpolate(x, scale_factor=2)
        h = self.conv1(h)
        time = self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        if self.config.use_scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = F.dropout(F.silu(h), self.config.dropout, self.training)
        h = self.conv2(h)
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return x + h


class SelfAttention(nn.Module):
    """x plus the attention of its pixels to each other. `qkv` holds the rows of q, then k, then v."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.num_heads = config.heads(channels)
        self.norm = _attention_norm(config, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (F.linear(pixels, weight, bias) for weight, bias in zip(weights, biases))
        attended = self.proj_out(attention(q, k, v, self.num_heads))
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])


class CrossAttention(nn.Module):
    """x plus the attention of its pixels to a sequence [B, S, D]. `kv` holds the rows of k, then v."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        assert config.cross_attention_dim is not None
        self.num_heads = config.heads(channels)
        self.norm = _attention_norm(config, channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(config.cross_attention_dim, 2 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, sequence: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        weights, biases = self.kv.weight.chunk(2), self.kv.bias.chunk(2)
        k, v = (F.linear(sequence, weight, bias) for weight, bias in zip(weights, biases))
        attended = self.proj_out(attention(self.q(pixels), k, v, self.num_heads))
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, head by head (Vaswani et al. 2017, equation 1): q [B, N, C], k, v [B, S, C]."""
    heads = [tokens.unflatten(2, (num_heads, -1)).transpose(1, 2) for tokens in (q, k, v)]
    q, k, v = heads  # [B, heads, N or S, C / heads]
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)


class Downsample(nn.Module):
    """A strided 3x3 conv; without padding of its own, one row and column of zeros right and bottom."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=config.downsample_padding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Each pixel twice in both directions, then a 3x3 conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


def _attends(config: UNetConfig, level: int) -> bool:
    return config.level_resolutions[level] in config.attention_resolutions


def _attention_norm(config: UNetConfig, channels: int) -> nn.GroupNorm:
    eps = config.norm_eps if config.attention_norm_eps is None else config.attention_norm_eps
    return nn.GroupNorm(config.norm_num_groups, channels, eps)


def _resampling(config: UNetConfig, channels: int, direction: str) -> nn.Module:
    if config.resblock_updown:
        return ResidualBlock(config, channels, channels, direction)
    return Downsample(config, channels) if direction == "down" else Upsample(channels)
