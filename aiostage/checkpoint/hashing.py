"""What a file may have hashed: elements of sets and keys of mappings. A save refuses what a load would refuse.

Tuples hash all that they contain whenever they are hashed, by recursion in C without a bound, and a few nodes that
refer to one another twice describe an exponential number of elements. Numbers have hashes that can be chosen, so that
each lookup in a set of them meets all others.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import chain
from typing import Any

from aiostage.checkpoint.values import MAPPINGS

__all__ = ["MAX_HASHED_DEPTH", "MAX_HASHED_SIZE", "Collisions", "TooLongToHashError", "check_hashed"]

MAX_HASHED_DEPTH = 100
"""Levels of tuples in an element of a set or in a key."""

MAX_HASHED_SIZE = 10_000
"""Objects in one element or key, each counted as often as it is met."""

_MAX_HASHED = 1 << 25
"""Objects in all elements and keys together; a second or so."""

_MAX_COLLISIONS = 64
"""Different objects of one hash in a set or a mapping. By chance there are two at the most."""

_MAPPINGS = frozenset(MAPPINGS.values())
_SETS = frozenset(("set", "frozenset"))
# Their elements are hashed once, or never.
_CHEAP = _MAPPINGS | {"set", "list", "deque", "tensor"}
_CHUNK = 64


class TooLongToHashError(ValueError):
    """An element of a set or a key is too deep or too large, or too many have one hash.

    Attributes:
        container: The number of the node that it is an element or a key of; -1 if its caller knows.
    """

    def __init__(self, message: str, container: int = -1) -> None:
        super().__init__(message)
        self.container = container


def check_hashed(forms: Sequence[dict[str, Any]], children: Sequence[Sequence[Any]]) -> Generator[None, None, None]:
    """Refuse nodes that take too long to hash and are to be hashed, yielding now and then.

    Args:
        forms: What describes each node.
        children: What each contains: scalars, and lists with the number of a node.

    Raises:
        TooLongToHashError: If there is one, or if there are too many in total.
    """
    if not any(form["is"] in _SETS or form["is"] in _MAPPINGS for form in forms):
        return
    # What contains itself is mutable, and such are not hashed by what they contain.
    depths, sizes = [1] * len(forms), [1] * len(forms)
    for index, form in enumerate(forms):
        if form["is"] not in _CHEAP:
            depth = size = 0
            for count, child in enumerate(chain(children[index], form.get("attributes", {}).values())):
                size += 1
                if type(child) is list and child[0] < index:
                    depth = max(depth, depths[child[0]])
                    size += sizes[child[0]]
                if count % _CHUNK == _CHUNK - 1:
                    yield
            depths[index] = depth + 1
            sizes[index] = min(size, MAX_HASHED_SIZE) + 1
        if index % _CHUNK == 0:
            yield
    total = 0
    for index, form in enumerate(forms):
        step = 1 if form["is"] in _SETS else 2 if form["is"] in _MAPPINGS else 0
        for place in range(0, len(children[index]) if step else 0, step or 1):
            child = children[index][place]
            if type(child) is list:
                total += sizes[child[0]]
                if depths[child[0]] > MAX_HASHED_DEPTH or sizes[child[0]] > MAX_HASHED_SIZE or total > _MAX_HASHED:
                    raise TooLongToHashError(
                        f"node {child[0]} is hashed and too large for it: more than {MAX_HASHED_DEPTH} levels, more "
                        f"than {MAX_HASHED_SIZE} objects, or more than {_MAX_HASHED} with others",
                        index,
                    )
            if place % _CHUNK == 0:
                yield
        if index % _CHUNK == 0:
            yield


class Collisions:
    """Counts the hashes of what goes into one set or mapping."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def add(self, keys: Iterable[Any]) -> list[Any]:
        """Count the hashes of keys; return the keys.

        Raises:
            TooLongToHashError: If too many different ones have the same hash.
            TypeError: If one has none.
        """
        keys = list(keys)
        for key in keys:
            if type(key) is not str:
                # As text, because the hashes of numbers are what may be chosen here too.
                found = f"{hash(key):x}"
                count = self._found[found] = self._found.get(found, 0) + 1
                if count > _MAX_COLLISIONS:
                    raise TooLongToHashError(f"more than {_MAX_COLLISIONS} elements or keys have the same hash")
        return keys
