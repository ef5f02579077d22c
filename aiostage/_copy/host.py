"""Copying a batch from source tensors in host memory to an arena, outside the event loop and the GIL.

Each leaf goes in the cheapest of three ways: large ones one by one, small ones many at once, and what torch has to
convert value by value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby, pairwise, repeat
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aiostage import _private
from aiostage._capture.faithful import PLAIN_CLASSES, Spec
from aiostage._capture.plan import RUN_LEAVES, Batch, LeafRange, LeafRun
from aiostage._capture.versions import Sources, detached_alias
from aiostage._copy.rectangles import pairs_of_values
from aiostage._device.bits import without_bits, writing_to
from aiostage._loop.workers import Job
from aiostage._memory.arena import ColdPages
from aiostage._platform.threads import yield_core

__all__ = ["Gather", "HostCopy", "copy_tensors", "one_thread"]

_PIECES_AT_ONCE = 128
"""Parts of leaves noted between two yields, at two microseconds each."""

_MOVED_BYTES = 256 * 1024
"""From this size on a leaf is copied by a call of its own, whose cost does not show there."""


class HostCopy:
    """The copies of one batch, ready to run in a worker thread: each leaf in the cheapest of three ways.

    Args:
        sources: The leaves, kept alive until the copy has run.
        staged: Where their staged copies are once they are built.
        memory: One-dimensional uint8, the whole arena, kept alive like the sources.
    """

    __slots__ = ("_conversions", "_gathers", "_memory", "_moves", "_sources")

    def __init__(
        self,
        sources: Sources,
        staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        memory: np.ndarray[Any, Any],
    ) -> None:
        self._sources = sources
        self._memory = memory
        self._moves = ByteCopies(sources)
        self._gathers = Gathers(sources)
        self._conversions = Conversions(sources, staged)

    def fill(self, batch: Batch) -> Generator[None, None, None]:
        """Take note of what to copy, yielding between small steps."""
        # Runs of one spec follow each other in the arena too.
        for spec, runs in groupby(filter(_is_whole, batch.runs), _spec):
            yield from self._add_leaves(spec, list(runs))
        for number, piece in enumerate(batch.pieces):
            self._add_piece(self._sources.spec(piece.index), piece)
            if number % _PIECES_AT_ONCE == 0:
                yield

    @property
    def ready(self) -> bool:
        """Whether it can run before the staged leaves of the batch are built: it writes to the arena alone."""
        return self._conversions.ready

    def run(self, job: Job, cold: ColdPages | None = None) -> bool:
        """Copy. Blocks; the GIL is released meanwhile.

        Args:
            job: The job that this is a step of; once it is cancelled, no further piece is copied.
            cold: Chooses the pages of what is written to; None where it has pages already.

        Returns:
            Whether all was copied.
        """
        ways: tuple[ByteCopies | Gathers | Conversions, ...] = (self._moves, self._gathers, self._conversions)
        for way in ways:
            for place in way.pieces():
                # A thread that has just been woken, the event loop's for one, would otherwise wait until the scheduler
                # takes this one's core away: up to 4 ms where all cores are busy, measured on Linux 6.18.
                yield_core()
                # Asked after the generator has said where it will write and before it does: nothing is written behind a
                # cancellation, and at most one piece is under way when it comes.
                if job.cancelled:
                    return False
                if cold is not None and place is not None:
                    cold.before(*place)
            if cold is not None:
                cold.before()
        return not job.cancelled

    def _add_leaves(self, spec: Spec, runs: Sequence[LeafRun]) -> Generator[None, None, None]:
        """Add whole leaves of one spec."""
        indices = _joined(runs)
        if not (_is_memory(spec) and spec.cls in PLAIN_CLASSES):
            self._conversions.add_leaves((yield from self._sources.aliases(indices)).items())
            return
        start, stop = runs[0].offset, runs[-1].offset + runs[-1].nbytes
        addresses = self._sources.addresses
        if isinstance(indices, range):
            begins = addresses[indices.start : indices.stop]
        else:
            begins = [addresses[index] for index in indices]
        small = spec.nbytes < _MOVED_BYTES
        if not (small and self._gathers.add(indices, begins, spec.nbytes, self._memory[start:stop])):
            base = self._memory.ctypes.data
            self._moves.add(indices, range(base + start, base + stop, spec.nbytes), begins, spec.nbytes)

    def _add_piece(self, spec: Spec, piece: LeafRange) -> None:
        """Add a part of a leaf."""
        if _is_memory(spec):
            size = spec.dtype.itemsize
            address = self._sources.addresses[piece.index] + piece.start * size
            destination = self._memory.ctypes.data + piece.offset
            self._moves.add([piece.index], [destination], [address], piece.length * size)
            return
        alias = self._sources.alias(piece.index)
        if alias is not None:
            stop = piece.offset + piece.length * spec.target.itemsize
            made = torch.from_numpy(self._memory[piece.offset : stop]).view(spec.target)
            for part, source in pairs_of_values(alias, spec, piece.start, made):
                self._conversions.add(piece.index, part, source)


_is_whole = attrgetter("is_whole")
_spec = attrgetter("spec")


def _joined(runs: Sequence[LeafRun]) -> Sequence[int]:
    """Return the numbers of the leaves in some runs, as a range if they are one."""
    ranges = [run.indices for run in runs if isinstance(run.indices, range)]
    if len(ranges) == len(runs) and all(after.start == before.stop for before, after in pairwise(ranges)):
        return range(ranges[0].start, ranges[-1].stop)
    return list(chain.from_iterable(run.indices for run in runs))


def _is_memory(spec: Spec) -> bool:
    """Return whether copying the leaf's bytes copies its value."""
    return spec.target is spec.dtype and not spec.by_value


_MOVE_BYTES = 2 * 2**20
"""How much is moved in one call: 0.2 ms into warm memory, and up to 10 ms where a virtual machine has to ask its host
for every page."""


class ByteCopies:
    """Bytes on their way from address to address.

    Args:
        sources: Keeps what is read alive. The caller that adds moves keeps their destinations alive.
    """

    __slots__ = ("_moves", "_sources")

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._moves: list[tuple[int, int, int, int]] = []

    def add(self, indices: Iterable[int], destinations: Iterable[int], begins: Iterable[int], nbytes: int) -> None:
        """Add stretches of one size, in bytes, by the leaves that they are of and the addresses where they begin."""
        self._moves += zip(indices, destinations, begins, repeat(nbytes), strict=False)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield where the next piece goes and its size, and move it then. Blocks, without the GIL."""
        for index, destination, source, nbytes in self._moves:
            start = 0
            while start < nbytes:
                # Each piece ends where a huge page may, so that one thread finds all of its memory.
                at_once = min(_MOVE_BYTES - (destination + start) % _MOVE_BYTES, nbytes - start)
                yield destination + start, at_once
                if not self._sources.is_there(index):
                    break
                # ctypes releases the GIL for the call. Both ends are kept alive: the source by sources, the destination
                # by the array that HostCopy has.
                ctypes.memmove(destination + start, source + start, at_once)
                start += at_once


_GATHER_BYTES = 2 * 2**20
"""How much is gathered in one call."""

_GATHER_LEAVES = 256
"""How many leaves are gathered in one call at most. Each is looked at before it, at 0.4 microseconds, with the GIL:
meanwhile an event loop that has just given it away waits."""

_MOST_ELEMENTS = 2**62
"""Well below what torch counts elements with."""


class Gathers:
    """Leaves that are small, many of one size together.

    Args:
        sources: Keeps them alive.
    """

    __slots__ = ("_gathers", "_sources")

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._gathers: list[tuple[Sequence[int], Gather]] = []

    def add(
        self, indices: Sequence[int], addresses: Sequence[int], nbytes: int, destination: np.ndarray[Any, Any]
    ) -> bool:
        """Add leaves, unless torch could not count what lies between them.

        Args:
            indices: Their numbers.
            addresses: Where they begin.
            nbytes: Size of each, in bytes, more than 0.
            destination: One-dimensional uint8 of ``len(addresses) * nbytes`` elements.

        Returns:
            Whether they were added.
        """
        gather = Gather.over(addresses, nbytes, destination)
        if gather is not None:
            self._gathers.append((indices, gather))
        return gather is not None

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield where the next piece goes and its size, and copy it then, in one thread. Blocks, without the GIL."""
        with one_thread():
            for indices, gather in self._gathers:
                at_once = max(1, min(_GATHER_BYTES // gather.nbytes, _GATHER_LEAVES))
                for start in range(0, len(gather), at_once):
                    destination = gather.destination[start : start + at_once]
                    yield destination.data_ptr(), destination.nbytes
                    there = self._sources.are_there(indices[start : start + at_once])
                    if there is None:
                        gather.run(start, start + at_once)
                    else:
                        for row in (number for number, is_there in enumerate(there, start) if is_there):
                            gather.run(row, row + 1)


class Gather:
    """Rows of equal size, each anywhere in host memory, to be written one after another.

    To torch the memory from the first row to the last is one tensor whose rows overlap, one beginning wherever a row
    could; ``index_select`` then takes those that are wanted, and touches nothing else. What it needs is a list of
    numbers. Concatenation takes as many tensor objects apart, under the GIL, at three to four times the cost for rows
    of 1 KiB.

    Args:
        rows: All that a row could be, as one two-dimensional uint8 tensor.
        indices: Which of them.
        destination: Two-dimensional uint8, kept alive.

    Attributes:
        destination: The same.
    """

    __slots__ = ("_indices", "_rows", "destination")

    def __init__(self, rows: torch.Tensor, indices: torch.Tensor, destination: torch.Tensor) -> None:
        self._rows = rows
        self._indices = indices
        self.destination = destination

    @classmethod
    def over(cls, addresses: Sequence[int], nbytes: int, destination: np.ndarray[Any, Any]) -> Gather | None:
        """Return how to gather rows, or None if they are too large for how far apart they are.

        Args:
            addresses: Where the rows begin.
            nbytes: Size of each row, in bytes, more than 0.
            destination: One-dimensional uint8 of ``len(addresses) * nbytes`` elements.
        """
        indices = np.array(addresses, dtype=np.int64)
        first, last = int(indices.min()), int(indices.max())
        indices -= first
        # The largest power of two that divides all distances, which is the lowest bit that any has: the allocator's
        # alignment, as a rule. Rows then are multiples of it apart, and the indices small.
        bits = int(np.bitwise_or.reduce(indices))
        step = bits & -bits or 1
        indices //= step
        count = (last - first) // step + 1
        if count * nbytes > _MOST_ELEMENTS:
            return None
        # Threads, which are not in the caller's inference mode, could not write to a tensor that is made in it.
        with torch.inference_mode(False):
            extent = torch.from_numpy(np.asarray(_Extent(first, last - first + nbytes)))
            rows = extent.as_strided((count, nbytes), (step, 1))
            return cls(rows, torch.from_numpy(indices), torch.from_numpy(destination).view(-1, nbytes))

    @property
    def nbytes(self) -> int:
        """Size of a row, in bytes."""
        return self.destination.shape[1]

    def __len__(self) -> int:
        return len(self._indices)

    def run(self, start: int, stop: int) -> None:
        """Write some of the rows. Blocks, without the GIL; the caller keeps what lies at the addresses alive."""
        # It checks that each index is below the count, and reads nothing but the rows: the memory between them, which
        # may belong to no one, is described but never touched.
        torch.index_select(self._rows, 0, self._indices[start:stop], out=self.destination[start:stop])


class _Extent:
    """Describes a stretch of memory to NumPy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


_CONVERSION_BYTES = 4 * 2**20
"""How much is copied in one call, each of which costs a little."""


class Conversions:
    """Tensors to be copied by torch.

    Args:
        sources: Says whether what is to be read is still there.
        staged: Where the staged copies of leaves are, once they are built.
    """

    __slots__ = ("_leaves", "_pairs", "_sources", "_staged")

    def __init__(self, sources: Sources, staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> None:
        self._sources = sources
        self._staged = staged
        self._leaves: list[tuple[int, torch.Tensor]] = []
        self._pairs: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    @property
    def ready(self) -> bool:
        """Whether no staged leaf is needed."""
        return not self._leaves

    def add(self, index: int, destination: torch.Tensor, alias: torch.Tensor) -> None:
        """Add a part of a leaf: tensors of one shape."""
        self._pairs.append((index, destination, alias))

    def add_leaves(self, aliases: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Add aliases of leaves, to be copied to the staged ones of the same numbers."""
        self._leaves += aliases

    def pieces(self) -> Iterator[None]:
        """Copy a piece after each yield, all of them in one thread. Blocks; the GIL is released meanwhile."""
        with one_thread():
            # A generator, so that a lot is looked up after the caller was asked whether to go on, and right before it
            # is copied.
            lots = self._lots()
            while True:
                # Where it goes is not known before it is known that its sources are still there, which must be last.
                yield None
                lot = next(lots, None)
                if lot is None:
                    return
                copy_tensors(*lot)

    def _lots(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Return what is to be copied together: large tensors in pieces, small ones as many as make one."""
        destinations: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        nbytes = 0
        for index, destination, source in self._cut():
            if not self._sources.is_there(index):
                continue
            destinations.append(destination)
            sources.append(source)
            nbytes += source.nbytes
            if nbytes >= _CONVERSION_BYTES or len(sources) >= RUN_LEAVES:
                yield destinations, sources
                destinations, sources, nbytes = [], [], 0
        if sources:
            yield destinations, sources

    def _cut(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        # Nor can torch make views of what is gone.
        for index, destination, source in self._pairs:
            if self._sources.is_there(index):
                yield from _cut(index, destination, source)
        for index, source in self._leaves:
            if not self._sources.is_there(index):
                continue
            # Tensors of two subclasses in one operation would be a matter between the two.
            destination = detached_alias(self._staged[index])
            if source.is_contiguous() and destination.is_contiguous():
                yield from _cut(index, destination.view(-1), source.view(-1))
            else:
                yield index, destination, source


def _cut(
    index: int, destination: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Cut tensors of one shape into pieces."""
    if source.nbytes <= _CONVERSION_BYTES:
        return iter(((index, destination, source),))
    at_once = max(1, _CONVERSION_BYTES * len(source) // source.nbytes)
    return zip(repeat(index), torch.split(destination, at_once), torch.split(source, at_once), strict=False)


def copy_tensors(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors in one fused operation; the GIL is released while it runs."""
    if not destinations:
        return
    with writing_to(destinations):
        pairs = list(map(without_bits, destinations, sources))
        plain, values = map(list, zip(*pairs, strict=True))
        _private.foreach_copy(plain, values)


def _openmp() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Return how the number of threads is read and set that torch divides work among, if it uses OpenMP."""
    libraries = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # PyDLL: a call is far shorter than giving the GIL away and getting it back.
            library = ctypes.PyDLL(str(libraries / name))
            return library.omp_get_max_threads, library.omp_set_num_threads
        except (OSError, AttributeError):
            continue
    return None


_threads = _openmp()


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Keep torch from dividing what the calling thread does among threads of its own.

    There would be as many of them as cores, for each of several workers, and they go on spinning for a while in case
    there is more to do, on cores that the event loop and the training step want. ``torch.set_num_threads`` would
    apply to the whole process; this applies to the calling thread. Without OpenMP it does nothing.
    """
    if _threads is None:
        yield
        return
    read, write = _threads
    # On its first use in a thread torch sets what the process is set to.
    torch.get_num_threads()
    before = read()
    write(1)
    try:
        yield
    finally:
        write(before)
