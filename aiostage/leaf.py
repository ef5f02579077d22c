"""Leaves and the paths that lead to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from aiostage.errors import shown

__all__ = ["Attribute", "Path", "StagedLeaf", "format_path"]

Path: TypeAlias = tuple[object, ...]
"""The keys, indices and attribute names that lead from the root of a state dict to a leaf."""

LinkedPath: TypeAlias = "tuple[object, LinkedPath] | None"
"""A path while a tree is walked, last step first: siblings share what leads to them, and few are asked for it."""


class Attribute(str):
    """An attribute name in a path. It equals the plain string; only its rendering differs from a key's."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class StagedLeaf:
    """One staged tensor and where it belongs.

    Attributes:
        path: Keys, indices and attribute names from the root.
        tensor: The staged copy, in host memory.
    """

    path: Path
    tensor: torch.Tensor


def format_path(path: Path) -> str:
    """Render a path the way Python would spell the access.

    Args:
        path: Keys, indices and attribute names from the root.

    Returns:
        For example ``state_dict['model']['0.weight']`` or ``state_dict['tokenizer'].table[3]``.
    """
    steps = (f".{step}" if isinstance(step, Attribute) else f"[{shown(step)}]" for step in path)
    return "state_dict" + "".join(steps)


def unlinked(path: LinkedPath) -> Path:
    """Return a linked path as a path."""
    steps = []
    while path is not None:
        step, path = path
        steps.append(step)
    return tuple(reversed(steps))
