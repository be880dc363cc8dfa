"""Launches of one group-norm kernel on CPU tensors, for the static checks."""

from unittest.mock import MagicMock, patch

import torch

GROUP_NORM_KERNELS = {
    "group_norm": ("_group_norm_kernel", "_group_norm_moments_kernel", "_group_norm_normalise_kernel"),
    "group_norm_backward": (
        "_group_norm_backward_kernel",
        "_group_norm_backward_sums_kernel",
        "_group_norm_backward_dx_kernel",
    ),
}


def launch_group_norm(
    module: str, kernel: str, shape: tuple[int, ...], dtype: torch.dtype, *, num_groups: int = 32, everything: bool
) -> None:
    from fastdiff.kernels.group_norm import _group_norm_silu_op
    from fastdiff.kernels.group_norm_backward import group_norm_silu_backward_op

    batch, channels = shape[:2]
    x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    weight, statistics = torch.empty(channels), torch.empty(batch, num_groups)
    scale, shift = torch.empty(batch, 2 * channels, dtype=dtype).chunk(2, dim=1)
    rows = (torch.empty(batch, channels, dtype=dtype), scale, shift) if everything else (None, None, None)
    others = {name: MagicMock() for name in GROUP_NORM_KERNELS[module] if name != kernel}
    with patch.multiple(f"fastdiff.kernels.{module}", **others):
        if module == "group_norm":
            _group_norm_silu_op(x, num_groups, weight, weight, 1e-5, *rows, True)
        else:
            group_norm_silu_backward_op(
                x, x, num_groups, weight, weight, *rows, statistics, statistics, True, everything
            )
