"""Checks of the arguments of the public functions: one sentence with the name, the value and what is accepted."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(
    name: str, value: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise unless value is a tensor of this shape and device and of one of the dtypes.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape, dtype or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape) or value.dtype not in dtypes or value.device != device:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be a tensor of shape {list(shape)} and dtype {accepted} on {device}, "
            f"got {str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)} on {value.device}"
        )


def check_no_grad(**tensors: Tensor | None) -> None:
    """Raise if autograd would record an operation on these tensors.

    Raises:
        ValueError: grad mode is on and a tensor requires grad.
    """
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{name} requires grad, but the function works in place and has no backward: "
                    "call it under torch.no_grad() or detach the tensor"
                )


def expanded(name: str, value: Tensor, like: Tensor) -> Tensor:
    """`value` broadcast to the shape of `like`; raises ValueError where that cannot be."""
    try:
        return value.expand_as(like)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be broadcastable to the shape {list(like.shape)} of x, got {list(value.shape)}"
        ) from error


def strides_match(value: Tensor, like: Tensor) -> bool:
    """True if two tensors of one shape step alike along every axis that has more than one element."""
    return value.numel() == 0 or all(
        size == 1 or stride == expected for size, stride, expected in zip(value.shape, value.stride(), like.stride())
    )
