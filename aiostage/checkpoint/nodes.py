"""The table of nodes that a manifest spells: what refers to what, and which tensors a tree over it needs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch

from aiostage.checkpoint.values import MAPPINGS
from aiostage.errors import CheckpointCorruptError, HostMemoryError, StagingError

__all__ = ["LEFT_OUT", "LOOKED_INTO", "NodeTable", "reading", "shown"]

_CHUNK = 64
_NO_HOST_MEMORY = "DefaultCPUAllocator: "
"""What PyTorch's errors contain that say so; they have no class of their own."""

_MAPPINGS = frozenset(MAPPINGS.values())

LOOKED_INTO = _MAPPINGS | {"list", "tuple"}
"""Kinds of containers that live trees are compared in key by key; others are values, and replaced as a whole."""


class _LeftOut:
    """Stands where a child was that nobody wants."""

    def __repr__(self) -> str:
        return "<left out>"


LEFT_OUT = _LeftOut()


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Say of whatever goes wrong with the nodes of a manifest that the manifest is wrong.

    Not of what no file is to blame for: want of memory, a device that has failed, a kernel that PyTorch does not have.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        if isinstance(error, (CheckpointCorruptError, StagingError)):
            raise
        if isinstance(error, (torch.OutOfMemoryError, NotImplementedError)):
            raise
        if isinstance(error, torch.AcceleratorError):
            raise StagingError(
                f"a device has failed while a checkpoint was read: {error}", remedy="The checkpoint may be intact."
            ) from error
        if _NO_HOST_MEMORY in str(error):
            raise HostMemoryError(f"no memory for a tensor: {error}", path=path) from error
        raise CheckpointCorruptError(f"its nodes do not describe a tree: {error!r}.", path=path) from error


class NodeTable:
    """The nodes of a tree.

    Attributes:
        forms: What describes each node, as JSON.
        children: What each contains: JSON scalars, and references to nodes. Of mappings, keys and values by turns.
        root: The tree, a child like others.
        kinds: The version of the kinds of objects that it may have, as the file says.
        reached: Whether each is part of the tree, once :meth:`tensor_names` has looked.
    """

    def __init__(self) -> None:
        self.forms: list[dict[str, Any]] = []
        self.children: list[list[Any]] = []
        self.root: Any = None
        self.kinds: Any = 0
        self.reached = bytearray()

    @classmethod
    def read(cls, lines: Sequence[Any]) -> Generator[None, None, NodeTable]:
        """Join the lines of a manifest, yielding now and then.

        Raises:
            ValueError: If they are no table. Other exceptions are possible too.
        """
        table = cls()
        for count, line in enumerate(lines[:-1]):
            if line.get("is") != "more":
                table.forms.append(line)
                table.children.append([])
            children = table.children[-1]
            if "of" in line:
                children += line["of"]
            for pair in line.get("pairs", ()):
                key, value = pair
                children += (key, value)
            for item in line.get("items", {}).items():
                children += item
            if count % _CHUNK == 0:
                yield
        table.root = lines[-1]["root"]
        table.kinds = lines[-1].get("kinds", 0)
        yield from table._check()
        return table

    def _check(self) -> Generator[None, None, None]:
        """Raise a ValueError if a node has no kind, refers to nothing, or is a mapping with a key and no value."""
        self.node(self.root)
        for index, (form, children) in enumerate(zip(self.forms, self.children, strict=True)):
            if type(form["is"]) is not str or (form["is"] in _MAPPINGS and len(children) % 2):
                raise ValueError(f"node {index} is no {form['is']!r}")
            for count, child in enumerate((*children, *form.get("attributes", {}).values())):
                self.node(child)
                if count % _CHUNK == 0:
                    yield

    def node(self, child: Any) -> int | None:
        """Return the number of the node that a child refers to, or None if it is a scalar.

        Raises:
            ValueError: If it refers to nothing.
        """
        if type(child) is not list:
            return None
        (index,) = child
        if type(index) is not int or not 0 <= index < len(self.forms):
            raise ValueError(f"there is no node {index!r}")
        return index

    def wanted(self) -> Iterator[dict[str, Any]]:
        """Iterate over what describes the nodes that are reached."""
        return compress(self.forms, self.reached)

    def edges(self, index: int) -> Iterator[tuple[Any, Any]]:
        """Iterate over keys and children of a mapping, list or tuple."""
        children = self.children[index]
        if self.forms[index]["is"] in _MAPPINGS:
            return zip(children[::2], children[1::2], strict=True)
        return iter(enumerate(children))

    def tensor_names(self) -> Generator[None, None, dict[str, bool]]:
        """Find the tensors of files that the tree needs, yielding now and then.

        Returns:
            For each name whether all that refers to it are leaves of its elements in index order, reached through
            nothing but dicts, lists and tuples, so that the bytes of the file can go straight into a live tensor.
        """
        # 1 for nodes that are reached plainly, 2 for those also reached in another way, and all below them.
        reached = self.reached = bytearray(len(self.forms))
        pending: list[tuple[int, int]] = []
        root = self.node(self.root)
        if root is not None:
            pending.append((root, 1))
        found: dict[str, bool] = {}
        count = 0
        while pending:
            index, how = pending.pop()
            if reached[index] >= how:
                continue
            reached[index] = how
            form = self.forms[index]
            if form["is"] == "tensor":
                name = form["name"]
                found[name] = found.get(name, True) and how == 1 and "offset" not in form
            yield from self._add_children(pending, index, how)
            count += 1
            if count % _CHUNK == 0:
                yield
        return found

    def _add_children(self, pending: list[tuple[int, int]], index: int, how: int) -> Generator[None, None, None]:
        form = self.forms[index]
        mapping, plain = form["is"] in _MAPPINGS, form["is"] in LOOKED_INTO
        for place, child in enumerate(self.children[index]):
            node = self.node(child)
            if node is not None:
                # Keys are values too.
                pending.append((node, how if plain and not (mapping and place % 2 == 0) else 2))
            if place % _CHUNK == _CHUNK - 1:
                yield
        for child in form.get("attributes", {}).values():
            node = self.node(child)
            if node is not None:
                pending.append((node, 2))


def shown(key: object) -> object:
    """Return a key as part of a path; one that is a node, as tuples are, by its number."""
    return f"<node {key[0]}>" if isinstance(key, list) else key
