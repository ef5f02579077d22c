"""Noticing that containers, and memory without a version, changed while they were captured.

NumPy arrays, bytearrays and arrays are copied and compared in pieces.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import attrgetter, is_
from typing import Any, Protocol

import numpy as np

from aiostage._capture.nodes import AttributeSteps
from aiostage.leaf import Attribute, Path

__all__ = ["GONE", "ContainerChanges", "copy_buffer", "nbytes_of", "same_buffer"]

GONE = object()
"""Stands for the value of an attribute that an object does not have."""

_CHILDREN_PER_STEP = 2048
"""Children compared between two yields, at about 20 ns each."""

_CONTAINER_COST = 32
"""What a container costs, in terms of children."""

_RELEASED_AT_ONCE = 256
"""Containers released between two yields; each holds a list or two."""


class _HasPath(Protocol):
    def path(self, slot: int) -> Path: ...


class _AttributeNames:
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
        # Views of the containers, which show what these hold when they are compared; beside each what it held when it
        # was met, and the node and slot that give its path.
        self._keys: list[tuple[Collection[Any] | _AttributeNames, Sequence[Any], _HasPath, int]] = []
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
        # Views and not copies: what they show later is what is compared.
        self._keys.append((source.keys(), names, frame, slot))
        self._contents.append((source.values(), values, AttributeSteps(names), frame, slot))

    def add_names(
        self, source: dict[str, Any], names: Sequence[str], owns: Callable[[str], bool], frame: _HasPath, slot: int
    ) -> None:
        """Note the names of an object's attributes, without those that its class keeps for itself."""
        self._keys.append((_AttributeNames(source, owns), names, frame, slot))

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
                _same_now(source, before) if len(before) <= _CHILDREN_PER_STEP else (yield from _same(source, before))
            ):
                paths[frame.path(slot)] = None
            looked_at += len(before) + _CONTAINER_COST
            if looked_at >= _CHILDREN_PER_STEP:
                yield
                looked_at = 0
        for source, before, steps, frame, slot in self._contents:
            if len(source) != len(before):
                paths[frame.path(slot)] = None
            elif (
                not (
                    _same_now(source, before)
                    if len(before) <= _CHILDREN_PER_STEP
                    else (yield from _same(source, before))
                )
                and (path := frame.path(slot)) not in paths
            ):
                for step, now, then in zip(steps, source, before, strict=False):
                    # By identity everywhere: equality could call code of the values, and says of two tensors nothing at
                    # all.
                    if now is not then:
                        paths[(*path, step)] = None
            looked_at += len(before) + _CONTAINER_COST
            if looked_at >= _CHILDREN_PER_STEP:
                yield
                looked_at = 0
        for source, before, frame, slot in self._sets:
            # What was taken out and put back may stand elsewhere.
            # Iterating over a set that has not changed gives its members in one order, which is the cheap comparison.
            same = len(source) == len(before) and (yield from _same(source, before))
            if not (same or (yield from _same_members(source, before))):
                paths[frame.path(slot)] = None
            yield
        for item, slots, frame, slot in self._slots:
            for name, value in slots.items():
                # A slot may be a descriptor with code of its own; an error in it is the caller's to see.
                if getattr(item, name, GONE) is not value:
                    place = frame.path(slot)
                    paths[place if name.startswith("__") else (*place, Attribute(name))] = None
            looked_at += _CONTAINER_COST
            if looked_at >= _CHILDREN_PER_STEP:
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
    for start in range(0, len(before), _CHILDREN_PER_STEP):
        members.update(map(id, before[start : start + _CHILDREN_PER_STEP]))
        yield
    try:
        iterator = iter(now)
        while part := list(islice(iterator, _CHILDREN_PER_STEP)):
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
        for start in range(0, len(before), _CHILDREN_PER_STEP):
            part = before[start : start + _CHILDREN_PER_STEP]
            if not all(map(is_, islice(iterator, len(part)), part)):
                return False
            yield
    except RuntimeError:
        # "changed size during iteration": between two steps of this comparison.
        return False
    return True


_PIECE_BYTES = 2**18
"""Bytes copied or compared between two yields: up to a millisecond where the pages are new."""


_resize = ctypes.PyDLL(None).PyByteArray_Resize
_resize.argtypes = [ctypes.py_object, ctypes.c_ssize_t]


def nbytes_of(source: Any) -> int:
    """Return how many bytes of memory something holds."""
    return int(source.nbytes) if isinstance(source, np.ndarray) else len(source) * getattr(source, "itemsize", 1)


def copy_buffer(source: Any) -> Generator[None, None, Any]:
    """Return a copy as copy.deepcopy makes it, yielding between pieces."""
    if nbytes_of(source) <= _PIECE_BYTES:
        return source.copy(order="K") if isinstance(source, np.ndarray) else source[:]
    if isinstance(source, np.ndarray):
        array = np.empty_like(source, order="K", subok=False)
        for there, here in _pieces(array, source):
            there[...] = here
            yield
        return array
    copy: Any = source[:0]
    step = max(1, _PIECE_BYTES // getattr(source, "itemsize", 1))
    if type(source) is bytearray:
        # bytearray(n) writes n zeros at once, and one that grows is moved now and then, 20 ms for 500 MB.
        _resize(copy, len(source))
        stop = 0
        for start in range(0, len(copy), step):
            # A slice is a copy, made in one operation: the source may change its length between two steps, not within
            # one.
            part = source[start : start + step]
            copy[stop : stop + len(part)] = part
            stop += len(part)
            yield
        # What was not written is not shown: the source may have become shorter.
        del copy[stop:]
        return copy
    for start in range(0, len(source), step):
        copy += source[start : start + step]
        yield
    return copy


def same_buffer(source: Any, copy: Any) -> Generator[None, None, bool]:
    """Return whether something still holds what its copy does, yielding between pieces."""
    if isinstance(source, np.ndarray):
        if (source.shape, source.dtype) != (copy.shape, copy.dtype):
            return False
        for there, here in _pieces(copy, source):
            # As bytes and not by ==: a NaN is the same as before, and 0.0 is not -0.0.
            if there.tobytes() != here.tobytes():
                return False
            yield
        return True
    if len(source) != len(copy):
        return False
    step = max(1, _PIECE_BYTES // getattr(source, "itemsize", 1))
    for start in range(0, len(source), step):
        if source[start : start + step] != copy[start : start + step]:
            return False
        yield
    return True


def _pieces(copy: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> Generator[tuple[Any, Any], None, None]:
    """Yield the same parts of two arrays, none larger than a piece if the arrays can be cut so."""
    if source.nbytes <= _PIECE_BYTES or source.ndim == 0:
        yield copy, source
        return
    for order in ("C", "F"):
        contiguous = attrgetter(f"flags.{order.lower()}_contiguous")
        if contiguous(copy) and contiguous(source):
            flat: Any = copy.reshape(-1, order=order)
            other: Any = source.reshape(-1, order=order)
            step = max(1, _PIECE_BYTES // max(1, source.itemsize))
            for start in range(0, flat.size, step):
                yield flat[start : start + step], other[start : start + step]
            return
    for row, line in zip(copy, source, strict=True):
        if isinstance(line, np.ndarray) and isinstance(row, np.ndarray):
            yield from _pieces(row, line)
        else:
            yield copy, source
            return
