"""Objects that give and take their state as a dict: ``Stateful`` in ``torch.distributed.checkpoint``."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch

__all__ = ["stateful_in", "states_of"]

_PLAIN = (torch.Tensor, dict, list, tuple, str, int, float)


def states_of(tree: Any) -> Any:
    """Return a tree with the states of Stateful objects in their places: of the tree itself, or of values of a dict.

    Raises:
        Exception: What a ``state_dict`` method raises.
    """
    if _is_stateful(tree):
        return tree.state_dict()
    found = {key: value for key, value in tree.items() if _is_stateful(value)} if isinstance(tree, dict) else {}
    if not found:
        return tree
    replaced = copy(tree)
    for key, value in found.items():
        replaced[key] = value.state_dict()
    return replaced


def stateful_in(tree: Any) -> frozenset[int]:
    """Return the ids of Stateful objects: the tree itself, or values of a dict."""
    if _is_stateful(tree):
        return frozenset({id(tree)})
    return (
        frozenset(id(value) for value in tree.values() if _is_stateful(value))
        if isinstance(tree, dict)
        else frozenset()
    )


def _is_stateful(value: Any) -> bool:
    # What torch calls Stateful, without importing torch.distributed.checkpoint for it.
    return not isinstance(value, (*_PLAIN, type)) and all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )
