"""Names of devices, checked against this machine."""

import torch


def existing_device(device: torch.device | str) -> torch.device:
    """The device with its index ("cuda" -> "cuda:0"); ValueError if this machine does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # of what torch says, the first line; AssertionError is its word for a build without CUDA
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device must be one that this machine has, got {str(device)!r}: {reason}") from error


def resolve_device(name: str) -> torch.device:
    """The device of that name, for "auto" the GPU where there is one; ValueError if it is not one this machine has."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of this machine's {torch.cuda.device_count()} GPUs or cpu, got {name!r}")
    return device
