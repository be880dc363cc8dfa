"""The shape of a U-Net as a validated, JSON-serialisable configuration, and the named ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a UNet. Raises ValueError, naming the field, where the values do not fit together.

    sample_size: height and width of the training images; it decides at which levels `attention_resolutions` lie.
    model_channels, channel_mult: level i works at sample_size / 2^i with model_channels * channel_mult[i] channels.
    num_res_blocks: residual blocks per level on the way down; one more on the way up.
    attention_resolutions: sizes with self-attention after each residual block (the middle always has it).
    num_heads or num_head_channels: heads of every attention, or channels per head; neither: one head.
    dropout: probability, in [0, 1), inside the residual blocks.
    num_classes: None, or the number of classes.
    null_class: with classes, whether label `num_classes` exists and means "no class".
    condition_channels: channels of an image, of the size of the noisy one, that the first convolution also sees: the
        enlarged low-resolution image of super-resolution (Saharia et al. 2022, SR3).
    cross_attention_dim: None, or the channels D of a sequence that every attention also attends to.
    use_scale_shift_norm: the time embedding scales and shifts the second norm of a residual block; else it is added.
    resblock_updown: resample inside residual blocks (ADM) instead of by strided and upsampled convs (DDPM).
    norm_num_groups, norm_eps: of every GroupNorm; attention_norm_eps: of those in attention (None: norm_eps).
    flip_sin_to_cos, freq_shift: time embedding [cos, sin] instead of [sin, cos], and
        frequencies 10000^(-i / (model_channels/2 - freq_shift)).
    downsample_padding: 1, or 0 to pad right and bottom only (DDPM).
    """

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int | None = None
    num_head_channels: int | None = None
    dropout: float = 0.0
    num_classes: int | None = None
    null_class: bool = True
    condition_channels: int = 0
    cross_attention_dim: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    attention_norm_eps: float | None = None
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    downsample_padding: int = 1

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise ValueError(f"{name} must be a tuple of positive integers, got {value!r}")
            # JSON has no tuples: a list is taken as one.
            object.__setattr__(self, name, tuple(value))
            for item in value:
                _require_positive_int(f"each item of {name}", item)
        if not self.channel_mult:
            raise ValueError("channel_mult must have at least one level, got ()")
        for name in (
            "sample_size",
            "in_channels",
            "out_channels",
            "model_channels",
            "num_res_blocks",
            "norm_num_groups",
        ):
            _require_positive_int(name, getattr(self, name))
        for name in ("num_heads", "num_head_channels", "num_classes", "cross_attention_dim"):
            if getattr(self, name) is not None:
                _require_positive_int(name, getattr(self, name))
        if not isinstance(self.null_class, bool):
            raise ValueError(f"null_class must be True or False, got {self.null_class!r}")
        if type(self.condition_channels) is not int or self.condition_channels < 0:
            raise ValueError(f"condition_channels must be an integer of at least 0, got {self.condition_channels!r}")
        self._validate_ranges()
        self._validate_divisibility()

    def _validate_ranges(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        if self.attention_norm_eps is not None and not self.attention_norm_eps > 0:
            raise ValueError(f"attention_norm_eps must be positive or None, got {self.attention_norm_eps}")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding must be 0 or 1, got {self.downsample_padding!r}")
        if self.num_heads is not None and self.num_head_channels is not None:
            raise ValueError(
                f"num_heads and num_head_channels exclude each other, got {self.num_heads} and {self.num_head_channels}"
            )
        if self.model_channels % 2:
            raise ValueError(f"model_channels must be even (half sines, half cosines), got {self.model_channels}")
        if not 0 <= self.freq_shift < self.model_channels // 2:
            raise ValueError(f"freq_shift must be in [0, model_channels / 2), got {self.freq_shift}")

    def _validate_divisibility(self) -> None:
        if self.sample_size % self.downsampling_factor:
            raise ValueError(
                f"sample_size must be divisible by {self.downsampling_factor} for {len(self.channel_mult)} levels of"
                f" channel_mult, got {self.sample_size}"
            )
        for resolution in self.attention_resolutions:
            if resolution not in self.level_resolutions:
                raise ValueError(
                    f"attention_resolutions must be among {self.level_resolutions} (sample_size {self.sample_size},"
                    f" {len(self.channel_mult)} levels), got {resolution}"
                )
        for channels in self.level_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups must divide {channels} channels, got {self.norm_num_groups}")
        attended = [c for c, r in zip(self.level_channels, self.level_resolutions) if r in self.attention_resolutions]
        for channels in [*attended, self.level_channels[-1]]:
            for name in ("num_heads", "num_head_channels"):
                value = getattr(self, name)
                if value is not None and channels % value:
                    raise ValueError(f"{name} must divide the {channels} channels of an attention, got {value}")

    @property
    def num_class_embeddings(self) -> int:
        """The classes and, where there is one, the null class; 0 for an unconditional model."""
        return 0 if self.num_classes is None else self.num_classes + self.null_class

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, from full resolution down."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """Size of each level for images of sample_size."""
        return tuple(self.sample_size // 2**level for level in range(len(self.channel_mult)))

    @property
    def downsampling_factor(self) -> int:
        """Height and width of an input must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> int:
        """Number of heads of an attention with that many channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        return self.num_heads or 1

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that survives JSON unchanged."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """The inverse of `to_dict`; raises ValueError for unknown or missing fields."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"UNetConfig has no field {', '.join(unknown)}; its fields are {', '.join(names)}")
        if "sample_size" not in values:
            raise ValueError(f"UNetConfig needs the field sample_size, got only {', '.join(sorted(values)) or 'none'}")
        return cls(**values)


PRESETS = {
    # 8x8 grey-scale handwritten digits.
    "digits": UNetConfig(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        model_channels=48,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_head_channels=24,
        num_classes=10,
        norm_num_groups=8,
    ),
    # DDPM, section 4 and appendix B: 35.7 M parameters; the layout of google/ddpm-cifar10-32.
    "cifar10": UNetConfig(
        sample_size=32, dropout=0.1, norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0
    ),
    # Improved DDPM (ImageNet 64x64, 128 base channels), with the scale-shift norm that ADM keeps.
    "imagenet64": UNetConfig(
        sample_size=64,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
        use_scale_shift_norm=True,
    ),
}
