"""Group normalisation in float64, with a bound of what float32 arithmetic may make of it; shared by its tests."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

U = 2.0**-24
# A thread adds up to 64 elements one after the other, then neighbours and warps in pairs, or as many steps of Welford's
# update: at most this many roundings, each of u times the sum of the sizes of what is added.
ROUNDINGS = 80
# In the small planes of the gradients' tests 8 one after the other and 10 in pairs, of terms with 6 roundings.
GRADIENT_ROUNDINGS = 24


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arguments of `group_norm_silu`."""

    x: Tensor
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float = 0.01
    channel_bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    silu: bool = True

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def requiring_grad(self, dtype: torch.dtype | None = None) -> "Inputs":
        """Leaves of the same values and strides."""
        leaves = {
            name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in self.tensors().items()
        }
        return replace(self, **leaves)

    def arguments(self) -> tuple[tuple, dict]:
        positional = (self.x, self.num_groups, self.weight, self.bias, self.eps)
        names = ("channel_bias", "scale", "shift", "silu")
        return positional, {name: getattr(self, name) for name in names}


def make_inputs(
    shape: tuple[int, ...],
    num_groups: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    channel_bias: str = "none",
    scaled: bool = False,
    silu: bool = True,
    seed: int = 0,
) -> Inputs:
    """Normals around 3; scale and shift are the halves of one projection. channel_bias: "none", "C" or "B, C"."""
    torch.manual_seed(seed)
    batch, channels = shape[:2]
    x = channels_last((torch.randn(shape, device=device) * 2 + 3).to(dtype))
    halves = torch.randn(batch, 2 * channels, device=device).to(dtype).chunk(2, dim=1)
    return Inputs(
        x=x,
        num_groups=num_groups,
        weight=torch.randn(channels, device=device),
        bias=torch.randn(channels, device=device),
        channel_bias={
            "none": None,
            "C": torch.randn(channels, device=device),
            "B, C": torch.randn(batch, channels, device=device).to(dtype),
        }[channel_bias],
        scale=halves[0] if scaled else None,
        shift=halves[1] if scaled else None,
        silu=silu,
    )


def channels_last(x: Tensor) -> Tensor:
    """A dense copy, for any number of spatial axes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def spread(value: Tensor, ndim: int) -> Tensor:
    return value.reshape(-1, value.shape[-1], *[1] * (ndim - 2))


def formula(inputs: Inputs) -> Tensor:
    """The result in float64, differentiable."""
    y, _ = _formula(inputs)
    return y


def _formula(inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    x = inputs.x.double()
    ndim = x.ndim
    h = x if inputs.channel_bias is None else x + spread(inputs.channel_bias.double(), ndim)
    groups = h.reshape(h.shape[0], inputs.num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    std = (groups.var(2, unbiased=False, keepdim=True) + inputs.eps).sqrt()
    xhat = ((groups - mean) / std).reshape(h.shape)
    factor, offset = spread(inputs.weight.double(), ndim), spread(inputs.bias.double(), ndim)
    if inputs.scale is not None:
        factor = factor * (1 + spread(inputs.scale.double(), ndim))
        offset = offset * (1 + spread(inputs.scale.double(), ndim)) + spread(inputs.shift.double(), ndim)
    z = factor * xhat + offset
    y = z * torch.sigmoid(z) if inputs.silu else z
    size = (groups.abs().mean(2, keepdim=True) / std).expand_as(groups).reshape(h.shape)
    rstd = (1 / std).expand_as(groups).reshape(h.shape)
    return y, {"xhat": xhat, "factor": factor, "offset": offset, "z": z, "size": size, "rstd": rstd}


def assert_forward(y: Tensor, inputs: Inputs) -> None:
    """The mean is off by ROUNDINGS u mean|h|, h - mean by another rounding of either, and the variance, relatively, by
    ROUNDINGS u, half of it in rstd; then a handful of roundings of z and of SiLU, whose slope is below 1.1."""
    assert y.dtype == inputs.x.dtype
    expected, terms = _formula(inputs)
    xhat_error = ROUNDINGS * U * (terms["size"] + terms["xhat"].abs())
    z_error = terms["factor"].abs() * xhat_error + 8 * U * (terms["z"].abs() + terms["offset"].abs())
    bound = 1.1 * z_error + 8 * U * expected.abs() + storage(y.dtype, expected)
    excess = ((y.double() - expected).abs() / bound).max().item() if y.numel() else 0.0
    assert excess <= 1, f"{excess} times the bound"


def storage(dtype: torch.dtype, value: Tensor) -> Tensor:
    """Half a unit in the last place, and half of the smallest subnormal number."""
    limits = torch.finfo(dtype)
    return value.abs() * limits.eps / 2 + limits.tiny * limits.eps / 2


def expected_gradients(inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """By autograd of the formula, in float64."""
    leaves = inputs.requiring_grad(torch.float64)
    tensors = leaves.tensors()
    return dict(zip(tensors, torch.autograd.grad(formula(leaves), list(tensors.values()), dy.double())))


def gradient_bounds(inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """GRADIENT_ROUNDINGS u of the sum of the sizes of all terms of a gradient, twice for it holds sums of sums."""
    _, terms = _formula(inputs)
    xhat, factor, rstd = terms["xhat"], terms["factor"].abs(), terms["rstd"]
    # the slope of SiLU is below 1.1, and its own slope below 1/2 times the error of z in units of u
    size = dy.double().abs() * (1.1 + 0.5 * (terms["z"].abs() + factor * (terms["size"] + xhat.abs())))
    axes = [0, *range(2, inputs.x.ndim)]
    per_sample = axes[1:]

    def over_group(value: Tensor) -> Tensor:
        groups = value.reshape(value.shape[0], inputs.num_groups, -1)
        return groups.mean(2, keepdim=True).expand_as(groups).reshape(value.shape)

    reach = xhat.abs() + terms["size"]
    dx = rstd * (factor * size + over_group(factor * size) + reach * over_group(factor * size * reach))
    weight, bias = (spread(value.double().abs(), inputs.x.ndim) for value in (inputs.weight, inputs.bias))
    scale = 1.0 if inputs.scale is None else 1 + spread(inputs.scale.double().abs(), inputs.x.ndim)
    sizes = {
        "x": dx,
        "weight": (scale * size * reach).sum(axes),
        "bias": (scale * size).sum(axes),
        "scale": (size * (weight * reach + bias)).sum(per_sample),
        "shift": size.sum(per_sample),
        "channel_bias": dx.sum(
            axes if inputs.channel_bias is not None and inputs.channel_bias.ndim == 1 else per_sample
        ),
    }
    return {name: 2 * GRADIENT_ROUNDINGS * U * value for name, value in sizes.items()}


def assert_gradients(gradients: dict[str, Tensor], inputs: Inputs, dy: Tensor) -> None:
    expected, bounds = expected_gradients(inputs, dy), gradient_bounds(inputs, dy)
    assert gradients.keys() <= expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs.tensors()[name].dtype, name
        bound = bounds[name] + storage(gradient.dtype, expected[name])
        excess = ((gradient.double() - expected[name]).abs() / bound).max().item()
        assert excess <= 1, f"{name}: {excess} times the bound"
