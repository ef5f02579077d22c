"""Tuples of a live tree: what is in them, and new ones, because nothing can be put into a tuple."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

from aiostage.format.nodes import LEFT_OUT
from aiostage.leaf import LinkedPath

__all__ = ["LiveTuple", "Where", "is_around", "made_anew", "merged"]

T = TypeVar("T")

Pair: TypeAlias = "tuple[tuple[Any, ...], tuple[Any, ...]]"
"""A live tuple and the loaded one."""

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

    def made(self) -> list[tuple[Any, Any, Any]]:
        """Make a tuple of the same class with the items; put it into the tuples around it.

        Returns:
            The containers around it, each with the key and the new tuple.
        """
        cls: Any = type(self._live)
        new = tuple(self.items) if cls is tuple else cls._make(self.items)
        put = []
        for where in self.wheres:
            assert where is not None  # noqa: S101 - it would stay
            container, key = where
            if isinstance(container, LiveTuple):
                container.items[key] = new
            else:
                put.append((container, key, new))
        return put


def inside_out(
    first: T, inside: Callable[[T], Iterable[T]], known: Container[Any], key: Callable[[T], Any] = id
) -> Iterator[T]:
    """Yield what is inside something, the innermost first, and itself last.

    Args:
        first: Such as a tuple. Nothing in it leads back to it.
        inside: Returns what is directly in one.
        known: The keys of what is left out. The caller puts in the key of each that is yielded: a hundred tuples, each
            of which contains the one before twice, have 2 ** 100 paths, and a hostile file can have such.
        key: Of what keeps its identity.
    """
    # Without recursion: tuples may be nested deeper than Python's stack.
    pending = [(first, iter(inside(first)))] if key(first) not in known else []
    while pending:
        outer, rest = pending[-1]
        inner = next((each for each in rest if key(each) not in known), None)
        if inner is not None:
            pending.append((inner, iter(inside(inner))))
            continue
        pending.pop()
        yield outer


def is_around(value: tuple[Any, ...], holds: Callable[[Any], bool], known: dict[int, bool]) -> bool:
    """Return whether a tuple, or one in it, has an item of which something holds.

    Args:
        value: The tuple.
        holds: Answers for an item that is no tuple.
        known: Of tuples that are kept alive, by their ids. All that is found out is put in, so that asking for each of
            many nested tuples looks at each once.
    """
    for each in inside_out(value, _tuples_in, known):
        known[id(each)] = any(known[id(item)] if isinstance(item, tuple) else holds(item) for item in each)
    return known[id(value)]


def _tuples_in(value: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    return (item for item in value if isinstance(item, tuple))


def merged(live: tuple[Any, ...], loaded: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return a loaded tuple with the live values where something was left out of it.

    Returns:
        The tuple; None if the live tuple has no value for what was left out.
    """
    if not is_around(loaded, _is_left_out, {}):
        return loaded
    made: dict[tuple[int, int], tuple[Any, ...]] = {}
    for pair in inside_out((live, loaded), _pairs_in, made, _ids):
        mine, theirs = pair
        items = list(theirs)
        if len(mine) == len(theirs):
            for index, (ours, item) in enumerate(zip(mine, theirs, strict=True)):
                items[index] = ours if item is LEFT_OUT else made.get((id(ours), id(item)), item)
        made[_ids(pair)] = tuple(items)
    found = made[id(live), id(loaded)]
    # Something is still left out if a live tuple has another length, or if there is no tuple in that place.
    return None if is_around(found, _is_left_out, {}) else found


def _is_left_out(item: Any) -> bool:
    return item is LEFT_OUT


def _pairs_in(pair: Pair) -> Iterator[Pair]:
    both = zip(*pair, strict=False)
    return ((ours, item) for ours, item in both if isinstance(ours, tuple) and type(item) is tuple)


def _ids(pair: Pair) -> tuple[int, int]:
    return id(pair[0]), id(pair[1])


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
    contents: dict[int, list[LiveTuple]] = {}
    added: set[int] = set()
    stay: list[LiveTuple] = []
    # The list grows meanwhile; a for loop over a list sees what is appended.
    for count, each in enumerate(changed):
        if each.stays:
            stay.append(each)
        for where in each.wheres:
            if where is not None and isinstance(where[0], LiveTuple):
                outer = where[0]
                contents.setdefault(id(outer), []).append(each)
                # One with changes of its own is in the list.
                if not outer.changes and id(outer) not in added:
                    added.add(id(outer))
                    changed.append(outer)
        if count % _YIELD_EVERY == 0:
            yield

    def inside(outer: LiveTuple) -> Iterator[LiveTuple]:
        return reversed(contents.get(id(outer), []))

    refused: list[tuple[LinkedPath, str]] = []
    put: list[tuple[Any, Any, Any]] = []
    done: set[int] = set()
    # Backwards, because what is around others was added behind them: what it has in it is then met in steps.
    for count, outer in enumerate(reversed(stay or changed)):
        for each in inside_out(outer, inside, done):
            done.add(id(each))
            if stay:
                refused += reversed(each.changes)
            else:
                put += each.made()
            if len(done) % _YIELD_EVERY == 0:
                yield
        if count % _YIELD_EVERY == 0:
            yield
    # All of it was met backwards; an error names it in the order of the tree.
    refused.reverse()
    return put, refused
