"""A model's keyword arguments: their tensors by path, and the rest of the tree with a mark where each tensor was.

Libraries nest conditioning (`added_cond_kwargs={"text_embeds": ..., "time_ids": ...}`), so that mappings, lists and
tuples are walked; anything else is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class TensorAt:
    """Stands where the tensor of this path was."""

    path: str


def _map(tree: Any, leaf: Callable[[Any, str], Any], path: str = "") -> Any:
    def child(name: Any) -> str:
        return f"{path}.{name}" if path else str(name)

    if isinstance(tree, Mapping):
        return {name: _map(value, leaf, child(name)) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [_map(value, leaf, child(index)) for index, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return leaf(tree, path)


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by path, "name" or "name.inner"."""
    found: dict[str, Tensor] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found[path] = value

    _map(tree, collect)
    return found


def without_tensors(tree: Any) -> Any:
    """The tree with a TensorAt in place of every tensor."""
    return _map(tree, lambda value, path: TensorAt(path) if isinstance(value, Tensor) else value)


def with_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `without_tensors`, with other tensors at the same paths."""
    return _map(tree, lambda value, path: tensors[value.path] if isinstance(value, TensorAt) else value)


def is_plain(tree: Any) -> bool:
    """True if all leaves are values whose repr says all there is to know, so that calls can be told apart by it."""
    plain = True

    def check(value: Any, path: str) -> None:
        nonlocal plain
        plain = plain and isinstance(value, (*PLAIN_TYPES, TensorAt))

    _map(tree, check)
    return plain


def model_inputs(
    model: Any,
    batch: int,
    device: torch.device,
    model_kwargs: Mapping[str, Any],
    uncond_kwargs: dict[str, Any],
    *,
    guided: bool,
    has_scale: bool,
) -> dict[str, Tensor]:
    """model_kwargs' tensors as "cond.PATH" and, where guided, joined with uncond_kwargs as "guided.PATH".

    Raises:
        ValueError: class_labels out of the model's range, or uncond_kwargs that do not go with model_kwargs.
    """
    null_class = getattr(model, "null_class", None)
    labels = model_kwargs.get("class_labels")
    # labels on a GPU are not looked at: that would be a host synchronisation
    if (
        null_class is not None
        and isinstance(labels, Tensor)
        and labels.device.type == "cpu"
        and labels.numel()
        and not (int(labels.min()) >= 0 and int(labels.max()) <= null_class)
    ):
        raise ValueError(
            f"class_labels must be in [0, {null_class}] ({null_class} is the null class), got {labels.tolist()}"
        )
    inputs = {f"cond.{path}": value.to(device) for path, value in tensors_of(model_kwargs).items()}
    if not guided:
        if uncond_kwargs and not has_scale:
            raise ValueError(f"uncond_kwargs {sorted(uncond_kwargs)} are given, but guidance_scale is not")
        return inputs
    if null_class is not None and isinstance(labels, Tensor) and "class_labels" not in uncond_kwargs:
        uncond_kwargs["class_labels"] = torch.full_like(labels, null_class)
    if not uncond_kwargs:
        raise ValueError(
            "guidance_scale needs uncond_kwargs, the model's unconditional inputs"
            + (" (or class_labels in model_kwargs)" if null_class is not None else "")
        )
    if unknown := sorted(set(uncond_kwargs) - set(model_kwargs)):
        raise ValueError(f"uncond_kwargs {unknown} have no counterpart in model_kwargs {sorted(model_kwargs)}")
    unconditional = tensors_of(uncond_kwargs)
    for path, value in tensors_of(model_kwargs).items():
        value = value.to(device)
        if value.ndim and value.shape[0] == batch:
            uncond = unconditional.get(path)
            if uncond is None or uncond.shape != value.shape:
                got = "none" if uncond is None else list(uncond.shape)
                raise ValueError(f"uncond_kwargs must hold {path} of shape {list(value.shape)}, got {got}")
            value = torch.cat([uncond.to(value), value])
        inputs[f"guided.{path}"] = value
    return inputs
