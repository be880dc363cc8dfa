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
