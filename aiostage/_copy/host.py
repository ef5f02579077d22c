"""Copying a batch from source tensors in host memory to an arena, outside the event loop and the GIL."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, repeat
from operator import attrgetter
from time import sleep
from typing import Any, TypeVar

import numpy as np
import torch

from aiostage._capture.faithful import PLAIN_CLASSES, Spec
from aiostage._capture.plan import RUN_LEAVES, Batch
from aiostage._copy.gather import Gather, one_thread
from aiostage._loop.workers import Job

__all__ = ["HostCopy", "copy_tensors"]

T = TypeVar("T")

_PIECE_BYTES = 2 * 2**20
"""How much is moved between two looks at whether anybody still wants it: 0.2 ms into warm memory, and up to 10 ms where
a virtual machine has to ask its host for every page."""

_CONVERTED_BYTES = 4 * 2**20
"""The same where torch copies value by value, which costs a little for each call."""

_MOVED_BYTES = 256 * 1024
"""From this size on a leaf is copied by a call of its own, whose cost does not show there."""


class HostCopy:
    """The copies of one batch, ready to run in a worker thread.

    Args:
        batch: What to copy.
        tensors: The source leaves, kept alive, as a list that is not changed, until the copy has run.
        staged: Where their staged copies are once they are built.
        specs: Of the leaves.
        addresses: Of the source leaves.
        memory: One-dimensional uint8, the whole arena, kept alive like the sources.

    Attributes:
        ready: Whether it can run before the staged leaves of the batch are built: it writes to the arena alone.
    """

    __slots__ = ("_apart", "_gathers", "_keep", "_moves", "_pieces", "_staged", "ready")

    def __init__(
        self,
        batch: Batch,
        tensors: Sequence[torch.Tensor],
        staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        specs: Sequence[Spec | None],
        addresses: Sequence[int],
        memory: np.ndarray[Any, Any],
    ) -> None:
        self._staged = staged
        self._apart: list[tuple[int, torch.Tensor]] = []
        self._pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._gathers: list[tuple[Gather, int]] = []
        self._moves: list[tuple[int, int, int]] = []
        self._keep = (memory, tensors)
        base = memory.ctypes.data
        for spec, same in groupby(filter(_is_whole, batch.runs), _spec):
            runs = list(same)
            indices = list(chain.from_iterable(run.indices for run in runs))
            if not (_is_memory(spec) and spec.cls in PLAIN_CLASSES):
                self._apart += zip(indices, _pick(tensors, indices), strict=True)
                continue
            # Runs of one spec follow each other in the arena too.
            start, stop = runs[0].offset, runs[-1].offset + runs[-1].nbytes
            begins = _pick(addresses, indices)
            small = spec.nbytes < _MOVED_BYTES
            gather = Gather.over(begins, spec.nbytes, memory[start:stop]) if small else None
            if gather is not None:
                self._gathers.append((gather, max(1, _PIECE_BYTES // spec.nbytes)))
            else:
                places = range(base + start, base + stop, spec.nbytes)
                self._moves += zip(places, begins, repeat(spec.nbytes), strict=False)
        for piece in batch.pieces:
            spec, tensor = _known(specs[piece.index]), tensors[piece.index]
            if _is_memory(spec):
                size = spec.dtype.itemsize
                address = addresses[piece.index] + piece.start * size
                self._moves.append((base + piece.offset, address, piece.length * size))
            else:
                stop = piece.offset + piece.length * spec.target.itemsize
                destination = torch.from_numpy(memory[piece.offset : stop]).view(spec.target)
                first = tensor.storage_offset() + piece.start
                self._pieces.append((destination, tensor.detach().as_strided((piece.length,), (1,), first)))
        self.ready = not self._apart

    def run(self, job: Job) -> bool:
        """Copy. Blocks; the GIL is released meanwhile.

        Args:
            job: The job that this is a step of; once it is cancelled, no further piece is copied.

        Returns:
            Whether all was copied.
        """
        for destination, source, nbytes in self._moves:
            for start in range(0, nbytes, _PIECE_BYTES):
                if job.cancelled:
                    return False
                ctypes.memmove(destination + start, source + start, min(_PIECE_BYTES, nbytes - start))
                # A thread that has just been woken, the event loop's for one, would otherwise wait until the scheduler
                # takes this one's core away: up to 4 ms where all cores are busy, measured on Linux 6.18.
                _yield_core()
        with one_thread():
            for gather, at_once in self._gathers:
                for start in range(0, len(gather), at_once):
                    if job.cancelled:
                        return False
                    gather.run(start, start + at_once)
                    _yield_core()
            for destinations, sources in self._in_pieces():
                if job.cancelled:
                    return False
                copy_tensors(destinations, sources)
                _yield_core()
        return True

    def _in_pieces(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Return what takes more than moving bytes, in lots of about a piece each."""
        destinations: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        nbytes = 0
        for destination, source in self._pairs():
            destinations.append(destination)
            sources.append(source)
            nbytes += source.nbytes
            if nbytes >= _CONVERTED_BYTES or len(sources) >= RUN_LEAVES:
                yield destinations, sources
                destinations, sources, nbytes = [], [], 0
        if sources:
            yield destinations, sources

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for destination, source in self._pieces:
            yield from _cut(destination, source)
        for index, source in self._apart:
            destination = self._staged[index]
            if type(source) in PLAIN_CLASSES and source.is_contiguous() and destination.is_contiguous():
                yield from _cut(destination.detach().view(-1), source.detach().view(-1))
            else:
                yield destination, source


def _cut(destination: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut one-dimensional tensors of one length into pieces."""
    at_once = _CONVERTED_BYTES // source.itemsize
    if len(source) <= at_once:
        return iter(((destination, source),))
    return zip(torch.split(destination, at_once), torch.split(source, at_once), strict=True)


def copy_tensors(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors in one fused operation; the GIL is released while it runs."""
    # Without gradients a leaf that requires one may be written to; the mode belongs to the thread.
    with torch.no_grad():
        torch._foreach_copy_(destinations, sources)


if sys.platform == "win32":

    def _yield_core() -> None:
        sleep(0)

else:
    # os.sched_yield() keeps the GIL, and with it from running whom the core is for.
    _yield_core = ctypes.CDLL(None).sched_yield


_is_whole = attrgetter("is_whole")
_spec = attrgetter("spec")


def _pick(items: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """Return the items at increasing indices."""
    first, last = indices[0], indices[-1]
    if last - first == len(indices) - 1:
        return items[first : last + 1]
    return [items[index] for index in indices]


def _known(spec: Spec | None) -> Spec:
    assert spec is not None  # noqa: S101 - a plan places leaves with memory only
    return spec


def _is_memory(spec: Spec) -> bool:
    """Return whether copying the leaf's bytes copies its value."""
    return spec.target is spec.dtype and not spec.by_value
