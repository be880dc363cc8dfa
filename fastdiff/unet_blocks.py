"""The layers of the U-Net: time embedding, normalisation, residual blocks, attention and resampling.

Activations are channels-last throughout: `[B, C, H, W]` tensors whose memory is `[B, H, W, C]`, so attention reads them
as `[B, H*W, C]` without a copy. Layers return channels-last for channels-last inputs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import upsampled_conv
from fastdiff.kernels.dropout import dropout
from fastdiff.kernels.group_norm import group_norm_silu

MAX_PERIOD = 10_000.0


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep, then a two-layer MLP (DDPM, appendix B; "Attention is all you need", 3.5).

    `forward(t)`: t [B], any integer or floating dtype -> [B, embedding_channels] in the dtype of the weights.

    The angles are always float32: in half precision, timesteps above 256 (bfloat16) or 2048 (float16) would collide.
    The frequencies are computed on the device in each call, not kept in a buffer: `module.to(torch.bfloat16)` would
    round it.
    """

    def __init__(
        self, model_channels: int, embedding_channels: int, *, flip_sin_to_cos: bool, freq_shift: float
    ) -> None:
        super().__init__()
        self.num_frequencies = model_channels // 2
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift
        self.linear_1 = nn.Linear(model_channels, embedding_channels)
        self.linear_2 = nn.Linear(embedding_channels, embedding_channels)

    def forward(self, t: Tensor) -> Tensor:
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(MAX_PERIOD) * index / (self.num_frequencies - self.freq_shift))
        angles = t.float()[:, None] * frequencies[None, :]  # [B, num_frequencies]
        sin, cos = angles.sin(), angles.cos()
        embedding = torch.cat([cos, sin] if self.flip_sin_to_cos else [sin, cos], dim=1)
        return self.linear_2(F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


class GroupNormSiLU(nn.Module):
    """GroupNorm, then an optional scale-shift, then SiLU: `silu(group_norm(x + bias) * (1 + scale) + shift)`.

    `forward(x, bias=None, scale=None, shift=None)`: x [B, C, H, W]; bias [C] or [B, C], scale and shift [B, C]; these
    two come together. Returns [B, C, H, W] in x's dtype and memory format, on a GPU in one operation. `silu=False`
    leaves the activation out.
    """

    def __init__(self, num_groups: int, num_channels: int, *, eps: float, silu: bool = True) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(
        self, x: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            channel_bias=bias,
            scale=scale,
            shift=shift,
            silu=self.silu,
        )

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.weight.numel()}, eps={self.eps}, silu={self.silu}"


def resize(x: Tensor, direction: Literal["down", "up"]) -> Tensor:
    """Halve (2x2 mean) or double (nearest neighbour) the height and width of x [B, C, H, W]."""
    if direction == "down":
        return F.avg_pool2d(x, kernel_size=2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class KeyedDropout(nn.Dropout):
    """nn.Dropout, which draws from torch's generator, or dropout by keys: `forward(x, keys=None)`, keys int64 [B, 3].

    `layer` is the number of this dropout in the network (`fastdiff.kernels.dropout`).
    """

    layer = 0

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        if keys is None or not self.training or self.p == 0:
            return super().forward(x)
        return dropout(x, self.p, keys, self.layer)


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, time embedding, norm, SiLU, dropout, conv, plus the input (DDPM, appendix B).

    `forward(x, modulation, dropout_keys=None)`: x [B, in_channels, H, W] -> [B, out_channels, H, W], or half or double
    the size with `resample`; dropout_keys as of UNet. `modulation` [B, modulation_channels] is
    `self.modulation(embedding)` of an embedding [B, embedding_channels] that has been through its SiLU: it does not
    depend on x and can be had for all timesteps at once.

    With `use_scale_shift_norm` the embedding scales and shifts the second norm (ADM, "adaptive group normalization")
    instead of being added before it. The second conv starts at zero, so that the block starts as its shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        num_groups: int,
        eps: float,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = resample
        self.norm1 = GroupNormSiLU(num_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.modulation_channels = out_channels * (2 if use_scale_shift_norm else 1)
        self.time_emb_proj = nn.Linear(embedding_channels, self.modulation_channels)
        self.norm2 = GroupNormSiLU(num_groups, out_channels, eps=eps)
        self.dropout = KeyedDropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1))
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None
        )

    def modulation(self, embedding: Tensor) -> Tensor:
        """[B, M]: what the second norm gets from the embedding: scale and shift, or what is added before it.

        The first conv leaves its bias to the norm, which adds it in the same pass: where something is added anyway, the
        bias is in here.
        """
        modulation = self.time_emb_proj(embedding)
        bias = None if self.use_scale_shift_norm else _left_bias(self.conv1)
        return modulation if bias is None else modulation + bias

    def forward(self, x: Tensor, modulation: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        if self.resample is not None:
            h, x = resize(h, self.resample), resize(x, self.resample)
        bias = _left_bias(self.conv1)
        h = self.conv1(h) if bias is None else self.conv1._conv_forward(h, self.conv1.weight, None)
        if self.use_scale_shift_norm:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm2(h, bias=bias, scale=scale, shift=shift)
        else:
            h = self.norm2(h, bias=modulation)
        h = self.conv2(self.dropout(h, dropout_keys))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels, plus the input (DDPM, appendix B; several heads as in ADM).

    `forward(x)`: x [B, C, H, W] -> [B, C, H, W]. The rows of `qkv` are all of q, then k, then v, each head by head.
    """

    def __init__(self, channels: int, *, num_heads: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNormSiLU(num_groups, channels, eps=eps, silu=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(self.norm(x))
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))  # [B, HW, 3, heads, C/heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, HW, C/heads]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return x + from_tokens(self.proj_out(attended), x)


class CrossAttention(nn.Module):
    """Multi-head attention of the pixels to a sequence, plus the input (latent diffusion, section 3.3).

    `forward(x, encoder_hidden_states)`: x [B, C, H, W], encoder_hidden_states [B, S, D] -> [B, C, H, W].
    """

    def __init__(self, channels: int, cross_attention_dim: int, *, num_heads: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNormSiLU(num_groups, channels, eps=eps, silu=False)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(cross_attention_dim, 2 * channels)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        q = self.q(to_tokens(self.norm(x))).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(encoder_hidden_states).unflatten(2, (2, self.num_heads, -1))  # [B, S, 2, heads, C/heads]
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return x + from_tokens(self.proj_out(attended), x)


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 conv.

    `forward(x)`: x [B, C, H, W] -> [B, C, H/2, W/2]. `padding=0` pads right and bottom only, as the TensorFlow code of
    DDPM does ("SAME"); 1 pads all four sides.
    """

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)
        self.pad_right_bottom = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_right_bottom else x)


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then a 3x3 conv.

    `forward(x)`: x [B, C, H, W] -> [B, C, 2H, 2W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if upsampled_conv.pays(x) and _is_plain(self.conv) and upsampled_conv.computes(self.conv):
            return upsampled_conv.upsampled_conv(x, self.conv.weight, self.conv.bias)
        return self.conv(resize(x, "up"))


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]; a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def from_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H*W, C] -> channels-last [B, C, H, W] with the height and width of `like`; a view."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _left_bias(conv: nn.Module) -> Tensor | None:
    """The bias that a conv leaves to the norm after it; None where the conv must be called as it is."""
    return conv.bias if _is_plain(conv) else None  # type: ignore[return-value]


def _is_plain(conv: nn.Module) -> bool:
    """Whether all there is to a conv are its weights.

    Not where somebody watches it with hooks, has given it another forward, or has put another module in its place, an
    adapter for one.
    """
    if type(conv) is not nn.Conv2d or "forward" in conv.__dict__:
        return False
    return not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks)


def zero_init(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """Set weight and bias to zero and return the module: the residual branch starts as nothing (as in DDPM's code)."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
