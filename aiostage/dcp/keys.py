"""Keys that are no text, which DCP's own planner turns into text when it loads what is no tensor."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

__all__ = ["KeyedLoadPlanner"]


class KeyedLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, except that values come back under the keys that the live state dict has.

    DCP names leaves by their keys as text, and puts values that are no tensors back under that text: a dict of
    ``{3: 2}`` would get another key ``"3"`` beside its own, and could not be saved again.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Note under which keys the leaves are."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self._paths = _paths(state_dict)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value where it was."""
        path = self._paths.get(read_item.dest_index.fqn) if self.flatten_state_dict else None
        if path is None:
            super().load_bytes(read_item, value)
            return
        at: Any = self.original_state_dict
        for key in path[:-1]:
            at = at[key]
        # As the planner does itself: a checkpoint of DCP is trusted.
        at[path[-1]] = torch.load(value, weights_only=False)


def _paths(state_dict: Mapping[Any, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the keys that lead to leaves below keys that are no text, by the names that DCP gives the leaves."""
    found: dict[str, tuple[Any, ...]] = {}
    pending: list[tuple[Any, tuple[Any, ...], bool]] = [(state_dict, (), False)]
    while pending:
        value, path, odd = pending.pop()
        if isinstance(value, Mapping):
            pending += [(child, (*path, key), odd or type(key) is not str) for key, child in value.items()]
        elif isinstance(value, list) and _is_entered(value):
            pending += [(child, (*path, place), odd) for place, child in enumerate(value)]
        elif odd:
            found[".".join(map(str, path))] = path
    return found


def _is_entered(items: list[Any]) -> bool:
    """Return whether DCP looks for leaves in a list and does not take it as one."""
    pending: list[Any] = list(items)
    while pending:
        item = pending.pop()
        if isinstance(item, (torch.Tensor, Mapping)):
            return True
        if isinstance(item, list):
            pending += item
    return False
