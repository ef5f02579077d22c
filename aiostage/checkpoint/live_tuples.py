"""Tuples of a live tree in which something is replaced: nothing can be put into them, so they are made anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any, TypeAlias

from aiostage.leaf import LinkedPath

__all__ = ["LiveTuple", "Where", "made_anew"]

_YIELD_EVERY = 64
"""Tuples between two yields. A guess, as where trees are compared."""

Where: TypeAlias = "tuple[Any, Any] | None"
"""A container or a :class:`LiveTuple`, and the key in it; None where no value can be put."""


class LiveTuple:
    """A tuple of the live tree with tensors or containers in it, which stay the same objects.

    Attributes:
        items: What is to be in it.
        wheres: Where it is.
        changes: Of each item that is replaced, its place and why it is.
    """

    __slots__ = ("_live", "changes", "items", "wheres")

    def __init__(self, live: tuple[Any, ...]) -> None:
        self._live = live
        self.items = list(live)
        self.wheres: list[Where] = []
        self.changes: list[tuple[LinkedPath, str]] = []

    def replace(self, index: int, value: Any, place: LinkedPath, reason: str) -> None:
        """Note that an item is replaced."""
        self.items[index] = value
        self.changes.append((place, reason))

    @property
    def stays(self) -> bool:
        """Whether it cannot be made anew: it is in what cannot be changed, or its class may make it otherwise."""
        cls = type(self._live)
        named = hasattr(cls, "_make") and not hasattr(self._live, "__dict__")
        return None in self.wheres or not (cls is tuple or named)

    def anew(self) -> tuple[Any, ...]:
        """Return a tuple of the same class with the items."""
        cls: Any = type(self._live)
        return tuple(self.items) if cls is tuple else cls._make(self.items)


def made_anew(
    changed: list[LiveTuple],
) -> Generator[None, None, tuple[list[tuple[Any, Any, Any]], list[tuple[LinkedPath, str]]]]:
    """Make tuples anew of which items are replaced, and those that they are in, yielding now and then.

    Args:
        changed: All of which an item is replaced. Those that they are in are added.

    Returns:
        What is to be put into containers: each with a key and the new tuple. And the changes that cannot be made; if
        there are any, nothing is to be put.
    """
    known: set[int] = set()
    for count, each in enumerate(changed):
        known.add(id(each))
        if count % _YIELD_EVERY == 0:
            yield
    inside: dict[int, list[LiveTuple]] = {}
    waiting: dict[int, int] = {}
    stay: list[LiveTuple] = []
    innermost: deque[LiveTuple] = deque()
    # Both lists grow meanwhile; a for loop over a list sees what is appended.
    for count, each in enumerate(changed):
        if each.stays:
            stay.append(each)
        for where in each.wheres:
            if where is not None and isinstance(where[0], LiveTuple):
                outer = where[0]
                inside.setdefault(id(outer), []).append(each)
                waiting[id(outer)] = waiting.get(id(outer), 0) + 1
                if id(outer) not in known:
                    known.add(id(outer))
                    changed.append(outer)
        if count % _YIELD_EVERY == 0:
            yield
    refused: list[tuple[LinkedPath, str]] = []
    met = set(map(id, stay))
    for count, each in enumerate(stay):
        refused += each.changes
        for inner in inside.get(id(each), ()):
            if id(inner) not in met:
                met.add(id(inner))
                stay.append(inner)
        if count % _YIELD_EVERY == 0:
            yield
    if refused:
        return [], refused
    for count, each in enumerate(changed):
        if id(each) not in waiting:
            innermost.append(each)
        if count % _YIELD_EVERY == 0:
            yield
    put: list[tuple[Any, Any, Any]] = []
    # From the innermost tuples outwards: each once all that are in it have been made.
    while innermost:
        each = innermost.popleft()
        new = each.anew()
        for where in each.wheres:
            assert where is not None  # noqa: S101 - it would stay
            container, key = where
            if not isinstance(container, LiveTuple):
                put.append((container, key, new))
                continue
            container.items[key] = new
            waiting[id(container)] -= 1
            if not waiting[id(container)]:
                innermost.append(container)
        yield
    return put, []
