"""Noticing that the source changed while it was captured: its leaves, its containers, and memory without a version.

NumPy arrays, bytearrays and arrays are copied and compared in pieces. Of the storages that copies read, what cannot be
kept from changing is looked for before each piece.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import attrgetter, is_
from typing import Any, Protocol

import numpy as np
import torch

from aiostage import _private
from aiostage._capture.faithful import Inspection, Spec
from aiostage._capture.leaves import Leaves, changed
from aiostage._capture.nodes import READS_PER_STEP, AttributeSteps
from aiostage.leaf import Attribute, Path

__all__ = [
    "GONE",
    "Changes",
    "ContainerChanges",
    "Sources",
    "copy_buffer",
    "detached_alias",
    "nbytes_of",
    "read_items",
    "same_buffer",
]

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
        """Drop everything, yielding between small steps."""
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


def read_items(source: dict[Any, Any], keys: list[Any], values: list[Any]) -> Generator[None, None, set[type]]:
    """Note the keys and values of a mapping as they are at one moment, yielding between parts of a large one.

    Returns:
        The classes of the keys.
    """
    if len(source) <= READS_PER_STEP:
        keys += source
        values += source.values()
        return set(map(type, keys))
    _private.untrack_all((keys, values))
    key_iterator, value_iterator = iter(source), iter(source.values())
    classes: set[type] = set()
    try:
        # Two iterators over one dict: both raise if it changes size between two steps. A change that keeps the size may
        # mix two moments here; the keys and values are compared at capture, which then differ.
        while part := list(islice(key_iterator, READS_PER_STEP)):
            keys += part
            values += islice(value_iterator, READS_PER_STEP)
            classes.update(map(type, part))
            yield
    except RuntimeError:
        # It changed size meanwhile: record it again, in one step.
        keys[:], values[:] = source.keys(), source.values()
        return set(map(type, keys))
    return classes


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


class Changes:
    """The changes that make a capture torn.

    Before later work is ordered behind the copies of some leaves, these are compared: what was changed until then is
    torn, and what is changed afterwards is that work, which the copies do not see.

    Args:
        leaves: Inspected.
        containers: What was noted of the containers.
        path_of: Returns the path of a leaf.
        inspection: What the leaves were inspected with.
    """

    def __init__(
        self, leaves: Leaves, containers: ContainerChanges, path_of: Callable[[int], Path], inspection: Inspection
    ) -> None:
        self._leaves = leaves
        self._containers = containers
        self._path_of = path_of
        self._inspection = inspection
        self._torn: dict[Path, None] = {}
        self._settled: set[int] = set()
        self._over = False

    @property
    def paths(self) -> Collection[Path]:
        """Where the changes found so far are."""
        return self._torn.keys()

    def compare(self, leaves: Collection[int] | None = None) -> Generator[None, None, None]:
        """Look for changes, for the last time where it looks, yielding between small steps.

        Args:
            leaves: Where to look, by their numbers; None for all of them and for the containers.
        """
        # The last comparison has been made: the source may change since.
        if self._over:
            return
        for index in (yield from changed(self._leaves, self._inspection)):
            # A leaf that has been settled may have been changed since by work that waits for its copy.
            if index not in self._settled and (leaves is None or index in leaves):
                self._torn[self._path_of(index)] = None
        if leaves is not None:
            self._settled.update(leaves)
            return
        self._torn |= dict.fromkeys((yield from self._containers.changed()))
        self._over = True


_ALIASES_PER_STEP = 256
"""Aliases made between two yields, at about a microsecond each."""

_data_ptr = torch.UntypedStorage.data_ptr
_nbytes = torch.UntypedStorage.nbytes


class Sources:
    """The leaves that are copied, with the storages that they had when they were met.

    Another coroutine may give a tensor other memory at any time, so no copy reads through the caller's tensor objects:
    it reads at the address that was noted, in the storage that was noted and that is referred to here. What remains is
    ``resize_`` of that storage itself. It is looked for before each piece of a copy; in the middle of one nothing in
    Python can keep it away.

    Args:
        leaves: Inspected. Its lists are kept, not copied; releasing the leaves gives those other ones.
        specs: What each leaf is to become.

    Attributes:
        addresses: Where the leaves begin.
        lost: The numbers of leaves that could not be read because their memory had been replaced. Added to by any
            thread.
    """

    def __init__(self, leaves: Leaves, specs: Sequence[Spec | None]) -> None:
        # The lists of the leaves themselves, without a copy. A staging that is dropped while threads still copy
        # replaces them (Leaves.release) and does not empty them; they are emptied once no copy runs (Leaves.releasing).
        self.addresses = leaves.addresses
        self.lost: set[int] = set()
        self._specs = specs
        self._tensors = leaves.tensors
        self._storages = leaves.storages
        self._sizes = leaves.storage_sizes

    def spec(self, index: int) -> Spec:
        """Return the spec of a leaf that has memory."""
        spec = self._specs[index]
        assert spec is not None  # noqa: S101 - a plan places leaves with memory only
        return spec

    def alias(self, index: int) -> torch.Tensor | None:
        """Return a plain tensor over the noted memory of a leaf, or None, and note it, if the leaf has another now.

        Called on the event loop, where no coroutine can change the leaf meanwhile.
        """
        alias = detached_alias(self._tensors[index])
        spec = self.spec(index)
        if (
            alias.untyped_storage() is not self._storages[index]
            or alias.data_ptr() != self.addresses[index]
            or alias.dtype is not spec.dtype
            or alias.shape != spec.shape
            or alias.stride() != spec.stride
            or not self.is_there(index)
        ):
            self.lost.add(index)
            return None
        return alias

    def aliases(self, indices: Sequence[int]) -> Generator[None, None, dict[int, torch.Tensor]]:
        """Return the aliases of leaves by their numbers, without the lost ones, yielding between small steps."""
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(indices), _ALIASES_PER_STEP):
            for index in indices[start : start + _ALIASES_PER_STEP]:
                alias = self.alias(index)
                if alias is not None:
                    found[index] = alias
            yield
        return found

    def is_there(self, index: int) -> bool:
        """Return whether a leaf's storage still has the memory that was noted; if not, note that it is lost."""
        # Called in threads right before each piece is read. Between this and the read Python code may still resize the
        # storage; that is the rest of which the class speaks.
        storage, size = self._storages[index], self._sizes[index]
        # Memory can go away, or move, only together with the storage's pointer or size.
        if storage is not None and storage.nbytes() == size and 0 <= self.addresses[index] - storage.data_ptr() <= size:
            return True
        self.lost.add(index)
        return False

    def are_there(self, indices: Sequence[int]) -> list[bool] | None:
        """Return which small leaves' storages still have the memory that was noted; None if all of them have."""
        if isinstance(indices, range):
            part = slice(indices.start, indices.stop)
            storages, sizes, addresses = self._storages[part], self._sizes[part], self.addresses[part]
        else:
            storages = [self._storages[index] for index in indices]
            sizes = [self._sizes[index] for index in indices]
            addresses = [self.addresses[index] for index in indices]
        # Most leaves begin where their storages do. Both are asked: a storage that was resized twice may be back at its
        # address with fewer bytes.
        if list(map(_data_ptr, storages)) == addresses and list(map(_nbytes, storages)) == sizes:  # type: ignore[arg-type]
            return None
        there = list(map(self.is_there, indices))
        return None if all(there) else there


def detached_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of torch's own class over the same memory, without history and without calling a subclass."""
    with _private.without_torch_function():
        return tensor.detach()
