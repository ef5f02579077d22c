"""Keys that are not text. DCP's own planner turns them into text when it loads values that are not tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from aiostage.dcp.unpickling import read_value

__all__ = ["KeyedLoadPlanner", "load_value", "paths_of"]


class KeyedLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, except that values come back under the keys that the live state dict has.

    DCP names leaves by their keys as text, and puts values that are no tensors back under that text: a dict of
    ``{3: 2}`` would get another key ``"3"`` beside its own, and could not be saved again.

    Args:
        weights_only: As for ``torch.load``. DCP's planner runs whatever code a checkpoint names.
    """

    def __init__(self, *, weights_only: bool = True) -> None:
        super().__init__()
        self._weights_only = weights_only

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Record under which keys the leaves are."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self._paths = _paths(state_dict)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value where it was."""
        found = read_value(value, weights_only=self._weights_only)
        name = read_item.dest_index.fqn
        # The live state dict was taken apart for this load, so all that leads to the value is there.
        _put(self.original_state_dict, self._paths.get(name) or self.mappings[name], found)


def paths_of(planner: LoadPlanner) -> dict[str, tuple[Any, ...]]:
    """Return the paths of values that a planner of DCP would put under keys of text, by the names that DCP gives them.

    Empty for a planner with a ``load_bytes`` of its own, which decides for itself.
    """
    if not isinstance(planner, DefaultLoadPlanner) or not planner.flatten_state_dict:
        return {}
    is_its_own = type(planner).load_bytes is not DefaultLoadPlanner.load_bytes
    return {} if is_its_own else _paths(planner.original_state_dict)


def load_value(planner: LoadPlanner, path: tuple[Any, ...], value: io.BytesIO) -> None:
    """Put a value under its own keys, for a planner of :func:`paths_of`. Like these planners, it may run code."""
    _put(planner.original_state_dict, path, read_value(value, weights_only=False))  # type: ignore[attr-defined]


def _put(state_dict: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        state_dict = state_dict[key]
    state_dict[path[-1]] = value


def _paths(state_dict: Mapping[Any, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the paths of leaves below keys that are not text, by the names that DCP gives the leaves."""
    found: dict[str, tuple[Any, ...]] = {}
    pending: list[tuple[Any, tuple[Any, ...], bool]] = [(state_dict, (), False)]
    while pending:
        value, path, odd = pending.pop()
        if isinstance(value, Mapping):
            pending += [(child, (*path, key), odd or type(key) is not str) for key, child in value.items()]
        elif isinstance(value, list) and _is_entered(value):
            pending += [(child, (*path, place), odd) for place, child in enumerate(value)]
        # DCP itself puts all other leaves back under the right keys.
        elif odd:
            found[".".join(map(str, path))] = path
    return found


def _is_entered(items: list[Any]) -> bool:
    """Return whether DCP looks for leaves inside a list. Otherwise it saves the list as one value."""
    pending: list[Any] = list(items)
    while pending:
        item = pending.pop()
        if isinstance(item, (torch.Tensor, Mapping)):
            return True
        if isinstance(item, list):
            pending += item
    return False
