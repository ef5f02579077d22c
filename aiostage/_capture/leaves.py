"""The leaves of one capture: their specs, addresses and versions, inspected in bulk."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Generator, Sequence
from operator import is_
from typing import Any

import torch

from aiostage._capture.faithful import PLAIN_CLASSES, Composite, Spec, SpecTable, take_apart
from aiostage._loop.collection import untrack_all

try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:  # Without it every leaf is inspected anew in each staging: slower, never wrong.
    TensorGuards: Any = None
else:
    TensorGuards = _TensorGuards

__all__ = ["NO_VERSION", "Inspection", "Leaves", "NotPlain", "changed"]

CHUNK = 256
"""Leaves inspected between two yields: well below a millisecond of work."""

NO_VERSION = -1
"""Stands for the version of tensors that have none (inference tensors)."""

_address = torch.Tensor.data_ptr
_version = torch.Tensor._version.__get__  # type: ignore[attr-defined]
_storage_nbytes = torch.UntypedStorage.nbytes
_is_nested = torch.Tensor.is_nested.__get__  # type: ignore[attr-defined]
_DENSE = {"dense"}


class NotPlain(Exception):
    """There is something in the tree that only the general walk can copy."""


class _Chunk:
    """What one chunk of leaves looked like last time, with a guard that recognizes it at C speed."""

    __slots__ = ("addresses", "check", "specs")

    def __init__(self, specs: list[Spec], addresses: list[int]) -> None:
        self.specs = specs
        self.addresses = addresses
        untrack_all((specs, addresses))
        self.check: Callable[..., bool] | None = None

    def recognizes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the tensors are like those that the specs are of."""
        return (
            self.check is not None
            and len(tensors) == len(self.specs)
            # The guard asks for strides before it looks at the class, and a nested tensor ends the process for that.
            and not any(map(_is_nested, tensors))
            and self.check(*tensors)
        )

    def guard(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the guard. It costs as much as a look does, and pays once the same leaves have come twice."""
        specs = self.specs
        # Checks class, dispatch keys, dtype, device, sizes, strides and requires_grad of each, and that they differ.
        self.check = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(spec.shape) for spec in specs],
            dynamic_dims_strides=[list(spec.stride) for spec in specs],
        ).check


class Inspection:
    """How a stager looks at leaves, and what it remembers of the last look.

    Args:
        device_of: Answers which device a tensor is on, None for host memory. None: every tensor is in host memory.
    """

    def __init__(self, device_of: Callable[[torch.Tensor], torch.device | None] | None) -> None:
        self.table = SpecTable(device_of)
        self.chunks: dict[int, _Chunk] = {}
        self.apart: bool | None = None
        """Whether no two leaves of all chunks begin at one address; None: not looked at since the last change."""


class Leaves:
    """Every distinct tensor object that a walk has met, in the order of meeting.

    Columns of equal length once inspected: ``tensors``, ``specs`` (None for a leaf that is taken apart or already
    copied), ``addresses`` of the first element, ``versions``, ``storages`` (None for a leaf that has none) and
    ``storage_sizes`` in bytes. Copies by address hold the storages: a tensor may be given another one meanwhile.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.specs: list[Spec | None] = []
        self.addresses: list[int] = []
        self.versions: list[int] = []
        self.storages: list[torch.UntypedStorage | None] = []
        self.storage_sizes: list[int] = []
        self.composites: dict[int, tuple[Composite, tuple[int, ...]]] = {}
        self.gradients: list[tuple[int, int]] = []
        self.given: dict[int, torch.Tensor] = {}
        self.owners: dict[int, int] = {}
        # Of tensors and of what has no references; no circle goes through these lists that release() does not cut.
        untrack_all((self.tensors, self.specs, self.addresses, self.versions, self.storages, self.storage_sizes))
        self._count = 0
        self._early: dict[int, int] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._seen: set[int] = set()
        self._noted = 0
        self._index: dict[int, int] = {}
        self._apart: dict[int, Composite] = {}

    def __len__(self) -> int:
        return self._count or len(self.tensors)

    def extend(self, tensors: Sequence[torch.Tensor]) -> int | None:
        """Add tensors if none was met before and none has attributes; return the index of the first, else None."""
        identities = set(map(id, tensors))
        if len(identities) < len(tensors) or not self._seen.isdisjoint(identities) or _have_attributes(tensors):
            return None
        start = len(self.tensors)
        self._seen |= identities
        self.tensors += tensors
        self._noted += len(tensors)
        return start

    def append(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add tensors that may have been met before; :meth:`inspect` will tell.

        Raises:
            NotPlain: If one has attributes.
        """
        # An ordinary tensor refers to its class alone.
        if len(gc.get_referents(*tensors)) > len(tensors) and _have_attributes(tensors):
            raise NotPlain
        self.tensors += tensors

    def copy_now(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a host copy of one tensor, made at once, for an object that copies itself.

        Its whole storage is copied, so that whatever else lies in it can stay tied to this copy.
        """
        self._early[id(tensor)] = _versions([tensor])[0]
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if not _is_simple(tensor):
                return copy.deepcopy(tensor)
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                copied = storage.clone() if storage.device.type == "cpu" else storage.cpu()  # type: ignore[no-untyped-call]
                self._storages[storage._cdata] = copied
            return _same_over(self._storages[storage._cdata], tensor)

    def release(self) -> None:
        """Let go of every tensor."""
        self._count = len(self)
        # Copies that run still hold the lists of those that they read.
        self.tensors = []
        self.storages = []
        for held in (self.composites, self.given, self.gradients, self._apart, self._storages):
            held.clear()
        self._seen.clear()
        self._index.clear()

    def add(self, tensor: torch.Tensor) -> tuple[int, bool]:
        """Return the index of a tensor, and whether it was met for the first time."""
        identity = id(tensor)
        if self._noted < len(self.tensors):
            self._seen.update(map(id, self.tensors[self._noted :]))
            self._noted = len(self.tensors)
        if identity in self._seen:
            if identity not in self._index:
                done = len(self._index)
                self._index.update(zip(map(id, self.tensors[done:]), range(done, len(self.tensors)), strict=True))
            return self._index[identity], False
        self._seen.add(identity)
        self.tensors.append(tensor)
        self._noted += 1
        return len(self.tensors) - 1, True

    def composite(self, index: int) -> Composite | None:
        """Return how a leaf of a tensor subclass is taken apart, or None if it is one piece of memory."""
        tensor = self.tensors[index]
        if type(tensor) in PLAIN_CLASSES:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            found = take_apart(tensor, "dense")
        if found is not None:
            self._apart[index] = found
        return found

    def inspect(self, inspection: Inspection) -> Generator[None, None, None]:
        """Fill the columns, in chunks with a yield after each; parts of composites become leaves on the way.

        Raises:
            Refusal: If a leaf cannot be staged faithfully; ``len(self.specs)`` is then its index.
            NotPlain: If a tensor was appended twice.
        """
        start, unsure, recognized = 0, self._noted < len(self.tensors), True
        while start < len(self.tensors):
            chunk = self.tensors[start : start + CHUNK]
            known = inspection.chunks.get(start)
            if known is not None and not self.given and known.recognizes(chunk):
                addresses = list(map(_address, chunk))
                # Another address means other memory, whose size the guard knows nothing of.
                if addresses == known.addresses:
                    self.specs += known.specs
                    self.addresses += addresses
                    self.versions += _versions(chunk)
                    self._note_storages(chunk)
                    start += len(chunk)
                    yield
                    continue
            recognized, inspection.apart = False, None
            with torch._C.DisableTorchFunctionSubclass():
                simple = self._inspect_slowly(chunk, start, inspection.table)
            self._note_storages(chunk)
            yield
            if simple and TensorGuards is not None:
                specs: list[Any] = self.specs[start:]
                addresses = self.addresses[start:]
                if known is not None and known.specs == specs and known.addresses == addresses:
                    known.guard(chunk)
                else:
                    inspection.chunks[start] = _Chunk(specs, addresses)
                yield
            start += len(chunk)
        if unsure and not (recognized and (yield from self._are_apart(inspection))):
            yield from self._check_distinct()

    def _are_apart(self, inspection: Inspection) -> Generator[None, None, bool]:
        """Return whether the addresses alone, which are last time's, tell that no tensor was met twice."""
        if inspection.apart is None:
            met = {0}
            for start in range(0, len(self.addresses), CHUNK):
                met.update(self.addresses[start : start + CHUNK])
                yield
            inspection.apart = len(met) == len(self.addresses) + 1
        return inspection.apart

    def _check_distinct(self) -> Generator[None, None, None]:
        for start in range(0, len(self.tensors), CHUNK):
            self._seen.update(map(id, self.tensors[start : start + CHUNK]))
            yield
        if len(self._seen) < len(self.tensors):
            raise NotPlain

    def _inspect_slowly(self, chunk: Sequence[torch.Tensor], start: int, table: SpecTable) -> bool:
        """Fill the columns for one chunk; return whether every leaf is a plain tensor in one piece."""
        versions, meanings = _versions(chunk), table.meanings(chunk)
        if set(meanings) == _DENSE and not self.given and set(map(type, chunk)) <= PLAIN_CLASSES:
            specs = table.specs(chunk)
            if specs is not None:
                self.specs += specs
                self.addresses += map(_address, chunk)
                self.versions += versions
                return True
        simple = True
        for offset, (tensor, meaning) in enumerate(zip(chunk, meanings, strict=True)):
            index = start + offset
            if self._storages and index not in self.given and _is_simple(tensor):
                storage = self._storages.get(tensor.untyped_storage()._cdata)
                if storage is not None:
                    self.given[index] = _same_over(storage, tensor)
            composite = None if index in self.given else self._apart.get(index) or take_apart(tensor, meaning)
            if composite is not None:
                self._add_parts(index, composite)
            if index in self.given or composite is not None:
                simple = False
                self.specs.append(None)
                self.addresses.append(0)
            else:
                spec = table.spec(tensor, by_value=meaning == "value")
                if type(tensor) is not torch.nn.Parameter and spec.requires_grad and tensor.grad is not None:
                    simple = False
                    self._add_gradient(index, tensor.grad)
                simple = (
                    simple
                    and meaning == "dense"
                    and type(tensor) in PLAIN_CLASSES
                    and tensor.requires_grad == spec.requires_grad
                )
                self.specs.append(spec)
                self.addresses.append(tensor.data_ptr())
            # What was copied at once must not have changed since that copy.
            self.versions.append(self._early.get(id(tensor), versions[offset]))
        return simple

    def _note_storages(self, chunk: Sequence[torch.Tensor]) -> None:
        storages, sizes = _storages(chunk)
        self.storages += storages
        self.storage_sizes += sizes

    def _add_parts(self, index: int, composite: Composite) -> None:
        parts = []
        for part in composite.parts:
            position, new = self.add(part)
            if new:
                self.owners[position] = index
            parts.append(position)
        self.composites[index] = (composite, tuple(parts))

    def _add_gradient(self, index: int, gradient: torch.Tensor) -> None:
        position, new = self.add(gradient)
        if new:
            self.owners[position] = index
        self.gradients.append((index, position))


def _have_attributes(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether some tensor may have attributes of its own.

    ``vars`` would answer too, but gives every tensor that has none a dictionary to keep.
    """
    return dict in map(type, gc.get_referents(*tensors)) and any(map(vars, tensors))


def _is_simple(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a plain view of one storage."""
    return (
        type(tensor) in PLAIN_CLASSES
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and torch._C._has_storage(tensor)
    )


def _same_over(storage: torch.UntypedStorage, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor like another one over a copy of its storage."""
    result = torch.empty(0, dtype=tensor.dtype, device="cpu")
    result.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    requires_grad = tensor.requires_grad and tensor.is_leaf
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(result, requires_grad)
    return result.requires_grad_(requires_grad)


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        with torch._C.DisableTorchFunctionSubclass():
            return [NO_VERSION if tensor.is_inference() else tensor._version for tensor in tensors]


def _storages(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.UntypedStorage | None], list[int]]:
    """Return the storage of each tensor, None where it has none, and its size in bytes."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            storages: list[Any] = list(map(torch.Tensor.untyped_storage, tensors))
        except RuntimeError:
            # Some have none: wrapper subclasses and sparse tensors.
            storages = [tensor.untyped_storage() if torch._C._has_storage(tensor) else None for tensor in tensors]
            return storages, [storage.nbytes() if storage is not None else 0 for storage in storages]
    # These objects live as long as the memory that they stand for, and the collector has no business with them.
    untrack_all(storages)
    return storages, list(map(_storage_nbytes, storages))


def changed(leaves: Leaves) -> Generator[None, None, list[int]]:
    """Return the indices of leaves that were written to, or given other memory, since they were inspected.

    Yields between chunks.
    """
    found: list[int] = []
    for start in range(0, len(leaves.versions), CHUNK):
        part = slice(start, start + CHUNK)
        tensors = leaves.tensors[part]
        before = (leaves.versions[part], leaves.storages[part], leaves.storage_sizes[part])
        storages, sizes = _storages(tensors)
        now = (_versions(tensors), storages, sizes)
        if now[0] != before[0] or now[2] != before[2] or not all(map(is_, now[1], before[1])):
            columns = zip(*before, *now, strict=True)
            found += [
                start + offset for offset, (v, s, n, w, t, m) in enumerate(columns) if (v, n) != (w, m) or s is not t
            ]
        found += _moved(leaves, start)
        yield
    return found


def _moved(leaves: Leaves, start: int) -> list[int]:
    """Return which leaves of a chunk begin at another address than they did."""
    part = slice(start, start + CHUNK)
    tensors, addresses, specs = leaves.tensors[part], leaves.addresses[part], leaves.specs[part]
    if None not in specs and list(map(_address, tensors)) == addresses:
        return []
    columns = zip(tensors, addresses, specs, strict=True)
    return [
        start + offset
        for offset, (tensor, address, spec) in enumerate(columns)
        if spec is not None and _address(tensor) != address
    ]
