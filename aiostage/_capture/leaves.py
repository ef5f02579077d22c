"""The leaves of one capture: their specs, addresses and versions, inspected in bulk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from itertools import compress, repeat
from operator import attrgetter, is_, is_not, rshift
from typing import Any, TypeVar

import torch

from aiostage import _private
from aiostage._capture.composites import Composite, composite_of, traits_of
from aiostage._capture.faithful import PLAIN_CLASSES, Inspection, LeafGuard, Refusal, Spec, fit, is_nested

__all__ = ["LEAVES_PER_STEP", "NO_VERSION", "Leaves", "Positions", "Replaced", "Table", "changed"]

V = TypeVar("V")

LEAVES_PER_STEP = 256
"""Leaves inspected between two yields: well below a millisecond of work."""

_FEW_PARTS = 8
"""Up to so many parts, going through some objects once for each of them costs less than a step of Python for each."""

_COMPOSITES_PER_STEP = 64
"""Leaves inspected between two yields where some are of other classes: a DTensor takes five microseconds, twice."""

_RELEASED_PER_STEP = 2048
"""Entries of a column dropped between two yields, at some 20 nanoseconds each."""

VERSIONS_UNAVAILABLE = -2
"""Stands for the version of any tensor where PyTorch has none."""

NO_VERSION = -1
"""Stands for the version of tensors that have none (inference tensors)."""

_address = torch.Tensor.data_ptr
_storage = torch.Tensor.untyped_storage
_storage_nbytes = torch.UntypedStorage.nbytes
_grad = attrgetter("grad")


class Table(defaultdict[int, dict[int, V]]):
    """A dict of numbers, kept in parts by ranges of them. Made as ``Table(dict)``.

    A dict of a million entries is moved as a whole when it has no room for the next one, which holds the event loop for
    30 ms. None of these parts gets so large.
    """

    __slots__ = ()

    bits = 16
    """A range is of so many bits."""

    def find(self, key: int) -> V | None:
        """Return the value of a key, or None if there is none."""
        part = self.get(key >> self.bits)
        return None if part is None else part.get(key)

    def put(self, key: int, value: V) -> None:
        """Set the value of a key."""
        self[key >> self.bits][key] = value


class Positions(Table[int]):
    """Numbers of objects by their identities, in parts by the mebibyte of memory that the objects lie in.

    CPython's allocator takes memory from the system a mebibyte at a time, so objects that were made one after the other
    have one part or two.
    """

    __slots__ = ()

    bits = 20

    def add(self, objects: Sequence[object], start: int) -> bool:
        """Number some objects from ``start`` on, unless one of them has a number or is among them twice.

        Returns:
            Whether they were numbered; not if they lie in too many parts.
        """
        # Without a step of Python for each.
        numbers = dict(zip(map(id, objects), range(start, start + len(objects)), strict=True))
        where = list(map(rshift, numbers, repeat(self.bits)))
        places = set(where)
        if len(numbers) < len(objects) or len(places) > _FEW_PARTS:
            return False
        parts = {place: dict(compress(numbers.items(), map(place.__eq__, where))) for place in places}
        if not all(self[place].keys().isdisjoint(part) for place, part in parts.items()):
            return False
        for place, part in parts.items():
            self[place].update(part)
        return True


class Replaced(Exception):
    """A leaf has got other memory between the step in which it was met and its inspection."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Leaves:
    """Every tensor that a walk has met, in the order of meeting.

    Columns of equal length: ``tensors``, and what was noted of each in the step in which it was met: ``addresses`` of
    the first element, ``versions``, ``storages`` (None for a leaf that has none) and ``storage_sizes`` in bytes. Copies
    by address hold the storages: a tensor may be given another one meanwhile. ``specs`` follows at inspection; it is
    None for a leaf that is taken apart, copied already, or met before.

    Attributes:
        composites: How leaves are taken apart, and the indices of their parts.
        gradients: The index of its gradient for each leaf that has one.
        given: Copies that were made already.
        replaced: Copies for tensors met again that are not those of the tensors.
        owners: For a part, a gradient, and a tensor met again: the leaf that it belongs to.
        owned: The parts and gradients that the tree itself does not lead to, in order.
        aliases: For a tensor met again: the index that it was met at first.
        attributed: Leaves with attributes of their own, which the walk sees to.
        positions: Indices by identity, after :meth:`index`.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.specs: list[Spec | None] = []
        self.addresses: list[int] = []
        self.versions: list[int] = []
        self.storages: list[torch.UntypedStorage | None] = []
        self.storage_sizes: list[int] = []
        self.composites: dict[int, tuple[Composite, tuple[int, ...]]] = {}
        self.gradients: dict[int, int] = {}
        self.given: dict[int, torch.Tensor] = {}
        self.replaced: dict[int, torch.Tensor] = {}
        self.owners: Table[int] = Table(dict)
        self.owned: list[int] = []
        self.aliases: Table[int] = Table(dict)
        self.attributed: set[int] = set()
        self.positions = Positions(dict)
        # Of tensors and of what has no references; no circle goes through these lists that release() does not cut.
        _private.untrack_all(
            (self.tensors, self.specs, self.addresses, self.versions, self.storages, self.storage_sizes)
        )
        self._count = 0
        self._indexed = 0
        self._inspected = self._unlike = False
        self._recognized = True
        self._chunks: list[LeafGuard] = []
        self._apart: dict[int, Composite] = {}

    def __len__(self) -> int:
        return self._count or len(self.tensors)

    def append(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add tensors, and note what they are now; :meth:`inspect` finds out which of them were met before."""
        self.tensors += tensors
        versions, addresses, sizes, storages = _columns_of(tensors)
        self.versions += versions
        self.addresses += addresses
        self.storage_sizes += sizes
        self.storages += storages

    def inspect_some(self, inspection: Inspection, since: int, *, only_known: bool = False) -> bool:
        """Fill the specs of some leaves noted so far, as long as they are plain tensors in one piece.

        A look at what was noted just now is cheap, because it is in the processor's caches.

        Args:
            inspection: What to inspect them with.
            since: The first leaf that was noted in this step; earlier ones may have got other memory since.
            only_known: Whether to leave alone what is not what it was at the last inspection.

        Returns:
            Whether there were some.
        """
        start = len(self.specs)
        # Whole chunks only: they are what is recognized the next time. The rest is left to inspect().
        if self._unlike or len(self.tensors) - start < LEAVES_PER_STEP:
            return False
        chunk = self.tensors[start : start + LEAVES_PER_STEP]
        if self._recognize(chunk, start, inspection):
            return True
        if only_known:
            return False
        with _private.without_torch_function():
            # Leaves that were noted in an earlier step may have got other memory in between; those of this step cannot.
            before = chunk[: max(0, since - start)]
            self._unlike = self._replaced(start, before) is not None or not self._inspect_plain(
                chunk, start, inspection
            )
        return not self._unlike

    def _recognize(self, chunk: Sequence[torch.Tensor], start: int, inspection: Inspection) -> bool:
        """Fill the specs of a chunk if it is what it was at the last inspection, and say whether it is."""
        known = inspection.chunks.get(start)
        # Another address means other memory; the guard knows nothing of the size of a storage.
        if (
            known is None
            or self.addresses[start : start + LEAVES_PER_STEP] != known.addresses
            or self.storage_sizes[start : start + LEAVES_PER_STEP] != known.sizes
            or any(map(is_nested, chunk))
            or not known.recognizes(chunk)
            or _have_gradients(chunk)
        ):
            self._recognized = False
            return False
        # All that a spec says was the same at the last staging, and the guard has found nothing else by now.
        self.specs += known.specs
        self._chunks.append(known)
        return True

    def index(self) -> Generator[None, None, None]:
        """Fill :attr:`positions`, yielding between small steps."""
        while self._indexed < len(self.tensors):
            start = self._indexed
            chunk = self.tensors[start : start + LEAVES_PER_STEP]
            # An id stays with its tensor as long as self.tensors refers to it, which is until the staging is over.
            if self.positions.add(chunk, start):
                self._indexed = start + len(chunk)
                yield
                continue
            for index, tensor in enumerate(chunk, start):
                first = self.positions.find(id(tensor))
                if first is None:
                    self.positions.put(id(tensor), index)
                elif first != index:
                    # The leaf that was met first is staged; this one gets the same tensor when the tree is built.
                    self.aliases.put(index, first)
                    self.owners.put(index, first)
                    # It may have been inspected before the index got here.
                    if index < len(self.specs):
                        self.specs[index] = None
            self._indexed = min(start + LEAVES_PER_STEP, len(self.tensors))
            yield

    def index_of(self, identity: int) -> int:
        """Return the index of a leaf that is indexed, by its identity."""
        return self.positions[identity >> Positions.bits][identity]

    def add(self, tensor: torch.Tensor, owner: int) -> int:
        """Return the index of a tensor that belongs to a leaf; it is added unless it was met before."""
        # At once: the caller is inside a step and needs the answer. What was indexed before is not looked at again.
        for _ in self.index():
            pass
        found = self.positions.find(id(tensor))
        if found is not None:
            return found
        index = len(self.tensors)
        self.append((tensor,))
        self.owners.put(index, owner)
        self.owned.append(index)
        return index

    def releasing(self) -> Generator[None, None, None]:
        """Empty the columns that only copies and comparisons need, when both are over, yielding between small steps."""
        self._count = len(self)
        columns: tuple[list[Any], ...] = (self.tensors, self.storages, self.versions, self.storage_sizes)
        for column in columns:
            while column:
                del column[-_RELEASED_PER_STEP:]
                yield
        while self.positions:
            self.positions.popitem()
            yield

    def release(self) -> None:
        """Drop every tensor."""
        self._count = len(self)
        # Copies that run still hold the lists of those that they read.
        self.tensors = []
        self.storages = []
        for held in (self.composites, self.given, self.replaced, self.gradients, self._apart, self.positions):
            held.clear()

    def composite_of(self, index: int, tensor: torch.Tensor) -> Composite | None:
        """Return how a leaf of a tensor subclass is taken apart, or None if it is one piece of memory."""
        if type(tensor) in PLAIN_CLASSES:
            return None
        with _private.without_torch_function():
            found = composite_of(tensor, "dense")
        if found is not None:
            self._apart[index] = found
        return found

    def inspect(self, inspection: Inspection) -> Generator[None, None, None]:
        """Fill the specs, in chunks with a yield after each; parts of composites become leaves on the way.

        May be called again when more were appended.

        Raises:
            Refusal: If a leaf cannot be staged faithfully; ``len(self.specs)`` is then its index.
            Replaced: If a leaf has got other memory since it was met.
        """
        start = len(self.specs)
        # Only of the first call: what later calls add has owners, and whether it was met before is not told by
        # addresses.
        self._recognized = self._recognized and not self._inspected
        self._inspected = True
        while start < len(self.tensors):
            chunk = self.tensors[start : start + LEAVES_PER_STEP]
            if not self._recognize(chunk, start, inspection):
                replaced = self._replaced(start, chunk)
                if replaced is not None:
                    raise Replaced(replaced)
                with _private.without_torch_function():
                    if not self._inspect_plain(chunk, start, inspection):
                        chunk = chunk[: _leaves_in_step(chunk)]
                        self._inspect_each(chunk, start, inspection)
            start += len(chunk)
            yield
        # The index finds tensors that were met twice. Where all leaves begin at different addresses there can be none,
        # and an index of 50,000 takes some milliseconds.
        if not (self._recognized and (yield from self._are_apart(inspection))):
            yield from self.index()

    def _replaced(self, start: int, chunk: Sequence[torch.Tensor]) -> int | None:
        """Return the first leaf of a chunk that has got other memory since it was met.

        What is found out about it now is about the new memory. Read from the old one it could reach beyond its end.
        """
        part = slice(start, start + len(chunk))
        _, addresses, sizes, storages = _columns_of(chunk)
        noted = self.addresses[part], self.storage_sizes[part], self.storages[part]
        if (addresses, sizes) == noted[:2] and all(map(is_, storages, noted[2])):
            return None
        rows = zip(zip(addresses, sizes, map(id, storages), strict=True), *noted, strict=True)
        for index, (now, address, size, storage) in enumerate(rows, start):
            if now != (address, size, id(storage)):
                return index
        return None

    def _are_apart(self, inspection: Inspection) -> Generator[None, None, bool]:
        """Return whether the addresses alone, which are last time's, tell that no tensor was met twice."""
        chunks, answer = inspection.apart
        # Compared by what they are: other trees may have had more of them, or some of them and others.
        if chunks != self._chunks:
            met = {0}
            for start in range(0, len(self.addresses), LEAVES_PER_STEP):
                # Zero counts as met: leaves without memory all have that address, and may be the same tensor.
                met.update(self.addresses[start : start + LEAVES_PER_STEP])
                yield
            answer = len(met) == len(self.addresses) + 1
            inspection.apart = self._chunks, answer
        return answer

    def _inspect_plain(self, chunk: Sequence[torch.Tensor], start: int, inspection: Inspection) -> bool:
        """Fill the specs of a chunk in bulk; return False if some are no plain tensors in one piece."""
        part = slice(start, start + len(chunk))
        if inspection.needs_versions and VERSIONS_UNAVAILABLE in self.versions[part]:
            return False
        if not set(map(type, chunk)) <= PLAIN_CLASSES:
            return False
        table, sizes = inspection.table, self.storage_sizes[part]
        # Layers repeat: a chunk of the same form as an earlier one has its specs, and only the sizes of its storages
        # are left to check.
        like = inspection.form_of(chunk)
        if like is not None:
            specs = like.specs if fit(like.specs, chunk, sizes) else None
        else:
            specs = table.specs(chunk, sizes) if table.are_dense(chunk) else None
        if specs is None or _have_gradients(chunk):
            return False
        inspection.remember(start, chunk, specs, self.addresses[part], sizes, like)
        self.specs += specs
        return True

    def _inspect_each(self, chunk: Sequence[torch.Tensor], start: int, inspection: Inspection) -> None:
        """Fill the specs of a chunk, looking at each leaf."""
        table = inspection.table
        meanings = table.meanings(chunk)
        if inspection.needs_versions and VERSIONS_UNAVAILABLE in self.versions[start : start + len(chunk)]:
            raise Refusal(
                "this PyTorch counts no versions, so a change to it during the staging could not be noticed.",
                "Use StagingOptions(detect_torn=False), and leave the source alone until it is captured.",
            )
        simple = True
        for index, (tensor, meaning) in enumerate(zip(chunk, meanings, strict=True), start):
            # Taken apart already if the walk has looked at its attributes; a second time could give other parts.
            composite = self._apart.get(index) or composite_of(tensor, meaning)
            spec = None
            if composite is not None:
                self._add_parts(index, composite)
            else:
                spec = table.spec(tensor, by_value=meaning == "value")
            # A Parameter's gradient is not copied, as copy.deepcopy does not.
            # Asked only of leaves of the graph: for others PyTorch warns, and keeps none as a rule.
            gradient = tensor.grad if tensor.is_leaf and type(tensor) is not torch.nn.Parameter else None
            if gradient is not None:
                _check_gradient(tensor, gradient)
                self.gradients[index] = self.add(gradient, index)
            simple = (
                simple
                and spec is not None
                and gradient is None
                and meaning == "dense"
                and type(tensor) in PLAIN_CLASSES
                and tensor.requires_grad == spec.requires_grad
            )
            self.specs.append(spec)
        if simple:
            part = slice(start, start + len(chunk))
            specs: list[Spec] = self.specs[part]  # type: ignore[assignment]
            inspection.remember(start, chunk, specs, self.addresses[part], self.storage_sizes[part])

    def _add_parts(self, index: int, composite: Composite) -> None:
        self.composites[index] = (composite, tuple(self.add(part, index) for part in composite.parts))


def _check_gradient(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
    """Refuse a gradient that PyTorch puts on no copy: ``tensor.data = ...`` leaves one that does not fit any more."""
    if gradient.shape != tensor.shape or gradient.dtype is not tensor.dtype:
        raise Refusal(
            f"its gradient is {gradient.dtype} {tuple(gradient.shape)}, and it is {tensor.dtype} "
            f"{tuple(tensor.shape)} by now.",
            "Set its grad to None, or to a gradient that fits.",
        )


def _leaves_in_step(tensors: Sequence[torch.Tensor]) -> int:
    """Return how many of some leaves to look at in one step."""
    return len(tensors) if set(map(type, tensors)) <= PLAIN_CLASSES else min(len(tensors), _COMPOSITES_PER_STEP)


def _have_gradients(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether some tensor has a gradient, without a call of Python for each."""
    return any(map(is_not, map(_grad, tensors), repeat(None)))


Columns = tuple[list[int], list[int], list[int], list[torch.UntypedStorage | None]]
"""Versions, addresses, sizes of storages in bytes, and storages."""


def _columns_of(tensors: Sequence[torch.Tensor]) -> Columns:
    """Return what is noted of tensors, without a call of Python for each."""
    version = _private.version_of
    try:
        with _private.without_torch_function():
            # Most of the time of many small tensors is waiting for memory, less of it where short calls come first.
            addresses = list(map(_address, tensors))
            storages: list[Any] = list(map(_storage, tensors))
            sizes = list(map(_storage_nbytes, storages))
            versions = (
                list(map(version.__get__, tensors)) if version is not None else [VERSIONS_UNAVAILABLE] * len(tensors)
            )
            return versions, addresses, sizes, storages
    except Exception:
        # Some have no version, no address or no storage.
        return _columns_of_each(tensors)


def _columns_of_each(tensors: Sequence[torch.Tensor]) -> Columns:
    columns: Columns = ([], [], [], [])
    version = _private.version_of
    with _private.without_torch_function():
        for tensor in tensors:
            # Wrapper subclasses and sparse tensors have no storage.
            storage = tensor.untyped_storage() if _private.has_storage(tensor) else None
            number = VERSIONS_UNAVAILABLE
            if version is not None:
                number = NO_VERSION if tensor.is_inference() else version.__get__(tensor)
            # One row after the other: what a tensor lacks is noted as 0 or None, and its parts are leaves with columns
            # of their own.
            row = (number, _address_or_none(tensor), storage.nbytes() if storage is not None else 0, storage)
            for column, value in zip(columns, row, strict=True):
                column.append(value)  # type: ignore[attr-defined]
    return columns


def _address_or_none(tensor: torch.Tensor) -> int:
    try:
        with _private.without_torch_function():
            return _address(tensor)
    except Exception:
        # What it is is found at its inspection; its parts are leaves themselves.
        return 0


def changed(leaves: Leaves, inspection: Inspection | None = None) -> Generator[None, None, list[int]]:
    """Return the indices of leaves that are not what they were when they were noted, yielding between chunks.

    Args:
        leaves: Noted and inspected.
        inspection: What they were inspected with, whose guards compare shapes and strides at C speed.
    """
    found: list[int] = []
    start, count = 0, len(leaves.versions)
    while start < count:
        tensors = leaves.tensors[start : start + LEAVES_PER_STEP]
        if leaves.composites:
            tensors = tensors[: _leaves_in_step(tensors)]
        part = slice(start, start + len(tensors))
        # In bulk first. Only a chunk in which something differs is looked at leaf by leaf.
        now = versions, addresses, sizes, storages = _columns_of(tensors)
        if not (
            versions == leaves.versions[part]
            and addresses == leaves.addresses[part]
            and sizes == leaves.storage_sizes[part]
            and all(map(is_, storages, leaves.storages[part]))
            and _same_forms(leaves, start, tensors, inspection)
        ):
            # With the columns as read above: all questions about one chunk are answered in one step.
            found += _changed_among(leaves, start, tensors, now)
        start += len(tensors)
        yield
    return found


def _same_forms(leaves: Leaves, start: int, tensors: Sequence[torch.Tensor], inspection: Inspection | None) -> bool:
    """Return whether the leaves of a chunk, whose memory is the same, show it as they did."""
    if leaves.gradients or _private.have_attributes(tensors):
        return False
    known = inspection.chunks.get(start) if inspection is not None else None
    if known is None or known.specs != leaves.specs[start : start + len(tensors)]:
        return False
    return not any(map(is_nested, tensors)) and known.recognizes(tensors) and not _have_gradients(tensors)


def _changed_among(
    leaves: Leaves,
    start: int,
    tensors: Sequence[torch.Tensor],
    now: Columns,
) -> list[int]:
    """Return which leaves of a chunk have changed."""
    found = []
    with _private.without_torch_function():
        for index, (tensor, version, address, size, storage) in enumerate(zip(tensors, *now, strict=True), start):
            if (
                version != leaves.versions[index]
                or address != leaves.addresses[index]
                or size != leaves.storage_sizes[index]
                or storage is not leaves.storages[index]
                or not _same_form(tensor, leaves.specs[index])
                or not _same_parts(leaves, index)
                or not _same_gradient(leaves, index, tensor)
                or _has_new_attributes(leaves, index, tensor)
            ):
                found.append(index)
    return found


def _same_form(tensor: torch.Tensor, spec: Spec | None) -> bool:
    """Return whether a leaf in one piece shows its memory as it did."""
    if spec is None:
        return True
    return (
        type(tensor) is spec.cls
        and (tensor.shape, tensor.stride(), tensor.dtype) == (spec.shape, spec.stride, spec.dtype)
        and (tensor.requires_grad and tensor.is_leaf) == spec.requires_grad
    )


def _same_parts(leaves: Leaves, index: int) -> bool:
    """Return whether a leaf consists of the tensors that it was taken apart into, which are leaves themselves."""
    if index not in leaves.composites:
        return True
    composite, numbers = leaves.composites[index]
    # The class can change without a trace in the parts: __class__ may be assigned.
    if traits_of(leaves.tensors[index]) != composite.traits:
        return False
    try:
        parts = composite.find_parts()
    except Exception:
        # It is of another kind by now.
        return False
    for part, number in zip(parts, numbers, strict=True):
        noted = leaves.tensors[number]
        # Some are made anew each time that they are asked for.
        if part is not noted and (part.shape, _address_or_none(part)) != (noted.shape, _address_or_none(noted)):
            return False
    return True


def _has_new_attributes(leaves: Leaves, index: int, tensor: torch.Tensor) -> bool:
    """Return whether a leaf that had no attributes has some; those that it had are compared by the walk."""
    if type(tensor) not in PLAIN_CLASSES or leaves.aliases.find(index) is not None or index in leaves.attributed:
        return False
    return _private.have_attributes((tensor,))


def _same_gradient(leaves: Leaves, index: int, tensor: torch.Tensor) -> bool:
    if type(tensor) is torch.nn.Parameter or not tensor.is_leaf or leaves.aliases.find(index) is not None:
        return True
    noted = leaves.gradients.get(index)
    return tensor.grad is (None if noted is None else leaves.tensors[noted])
