"""Noticing that containers changed while they were captured."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import is_
from typing import Any, Protocol

from aiostage._capture.buffers import same_buffer
from aiostage._capture.nodes import AttributeSteps
from aiostage.leaf import Attribute, Path

__all__ = ["GONE", "ContainerChanges"]

GONE = object()
"""Stands for the value of an attribute that an object does not have."""

_CHUNK = 2048
"""Children compared between two yields, at about 20 ns each."""

_CONTAINER_COST = 32
"""What a container costs, in terms of children."""

_RELEASED_AT_ONCE = 256
"""Containers let go of between two yields; each holds a list or two."""


class _HasPath(Protocol):
    def path(self, slot: int) -> Path: ...


class _Names:
    """The names of an object's attributes now, without those that its class keeps for itself."""

    __slots__ = ("_attributes", "_owns")

    def __init__(self, attributes: dict[str, Any], owns: Callable[[str], bool]) -> None:
        self._attributes = attributes
        self._owns = owns

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._attributes if not self._owns(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ContainerChanges:
    """What every container held when the walk met it, to be compared when capture completes.

    Comparing in pieces is enough: a part found unchanged held its value during the whole time from the walk until it
    was compared, so at the end of the copies all parts held their values together.
    """

    def __init__(self) -> None:
        self._keys: list[tuple[Collection[Any] | _Names, Sequence[Any], _HasPath, int]] = []
        self._contents: list[tuple[Collection[Any], Sequence[Any], Sequence[object], _HasPath, int]] = []
        self._sets: list[tuple[set[Any], Sequence[Any], _HasPath, int]] = []
        self._slots: list[tuple[object, Mapping[str, Any], _HasPath, int]] = []
        self._buffers: list[tuple[Any, Any, _HasPath, int]] = []

    def add_mapping(
        self, source: dict[Any, Any], keys: Sequence[Any], values: Sequence[Any], frame: _HasPath, slot: int
    ) -> None:
        """Note the keys and values of a mapping."""
        # An OrderedDict has an order of its own, which dict's methods do not know.
        cls = OrderedDict if isinstance(source, OrderedDict) else dict
        self._keys.append((cls.keys(source), keys, frame, slot))
        self._contents.append((cls.values(source), values, keys, frame, slot))

    def add_attributes(
        self, source: dict[str, Any], names: Sequence[str], values: Sequence[Any], frame: _HasPath, slot: int
    ) -> None:
        """Note the attributes of an object, which is what the path leads to."""
        self._keys.append((source.keys(), names, frame, slot))
        self._contents.append((source.values(), values, AttributeSteps(names), frame, slot))

    def add_names(
        self, source: dict[str, Any], names: Sequence[str], owns: Callable[[str], bool], frame: _HasPath, slot: int
    ) -> None:
        """Note the names of an object's attributes, without those that its class keeps for itself."""
        self._keys.append((_Names(source, owns), names, frame, slot))

    def add_sequence(self, source: list[Any] | deque[Any], items: Sequence[Any], frame: _HasPath, slot: int) -> None:
        """Note the items of a sequence."""
        self._contents.append((source, items, range(len(items)), frame, slot))

    def add_set(self, source: set[Any], members: Sequence[Any], frame: _HasPath, slot: int) -> None:
        """Note the members of a set, in the order in which it has them."""
        self._sets.append((source, members, frame, slot))

    def add_slots(self, source: object, slots: Mapping[str, Any], frame: _HasPath, slot: int) -> None:
        """Note the attributes that an object keeps in slots."""
        self._slots.append((source, slots, frame, slot))

    def add_buffer(self, source: Any, copy: Any, frame: _HasPath, slot: int) -> None:
        """Note what memory without a version held: its copy."""
        self._buffers.append((source, copy, frame, slot))

    def releasing(self) -> Generator[None, None, None]:
        """Let go of everything, yielding between small steps."""
        columns: tuple[list[Any], ...] = (self._keys, self._contents, self._sets, self._slots, self._buffers)
        for column in columns:
            while column:
                del column[-_RELEASED_AT_ONCE:]
                yield

    def changed(self) -> Generator[None, None, list[Path]]:
        """Return the paths of what is another object now, yielding between small steps.

        Where something was added, removed or moved it is the path of the container.
        """
        paths: dict[Path, None] = {}
        looked_at = 0
        for source, before, frame, slot in self._keys:
            if len(source) != len(before) or not (
                _same_now(source, before) if len(before) <= _CHUNK else (yield from _same(source, before))
            ):
                paths[frame.path(slot)] = None
            looked_at += len(before) + _CONTAINER_COST
            if looked_at >= _CHUNK:
                yield
                looked_at = 0
        for source, before, steps, frame, slot in self._contents:
            if len(source) != len(before):
                paths[frame.path(slot)] = None
            elif (
                not (_same_now(source, before) if len(before) <= _CHUNK else (yield from _same(source, before)))
                and (path := frame.path(slot)) not in paths
            ):
                for step, now, then in zip(steps, source, before, strict=False):
                    if now is not then:
                        paths[(*path, step)] = None
            looked_at += len(before) + _CONTAINER_COST
            if looked_at >= _CHUNK:
                yield
                looked_at = 0
        for source, before, frame, slot in self._sets:
            # What was taken out and put back may stand elsewhere.
            same = len(source) == len(before) and (yield from _same(source, before))
            if not (same or (yield from _same_members(source, before))):
                paths[frame.path(slot)] = None
            yield
        for item, slots, frame, slot in self._slots:
            for name, value in slots.items():
                if getattr(item, name, GONE) is not value:
                    place = frame.path(slot)
                    paths[place if name.startswith("__") else (*place, Attribute(name))] = None
            looked_at += _CONTAINER_COST
            if looked_at >= _CHUNK:
                yield
                looked_at = 0
        for buffer, copy, frame, slot in self._buffers:
            if not (yield from same_buffer(buffer, copy)):
                paths[frame.path(slot)] = None
        return list(paths)


def _same_members(now: set[Any], before: Sequence[Any]) -> Generator[None, None, bool]:
    """Return whether a set has the members that it had, in whatever order."""
    if len(now) != len(before):
        return False
    members: set[int] = set()
    for start in range(0, len(before), _CHUNK):
        members.update(map(id, before[start : start + _CHUNK]))
        yield
    try:
        iterator = iter(now)
        while part := list(islice(iterator, _CHUNK)):
            if not members.issuperset(map(id, part)):
                return False
            yield
    except RuntimeError:
        # "changed size during iteration": between two steps of this comparison.
        return False
    return True


def _same_now(now: Iterable[Any], before: Sequence[Any]) -> bool:
    return all(map(is_, now, before))


def _same(now: Iterable[Any], before: Sequence[Any]) -> Generator[None, None, bool]:
    try:
        iterator = iter(now)
        for start in range(0, len(before), _CHUNK):
            part = before[start : start + _CHUNK]
            if not all(map(is_, islice(iterator, len(part)), part)):
                return False
            yield
    except RuntimeError:
        # "changed size during iteration": between two steps of this comparison.
        return False
    return True
