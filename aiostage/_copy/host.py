"""Copying a batch from source tensors in host memory to an arena, outside the event loop and the GIL."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from itertools import chain, groupby, pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from aiostage._capture.faithful import PLAIN_CLASSES, Spec
from aiostage._capture.plan import Batch, Piece, Run
from aiostage._copy.conversions import Conversions
from aiostage._copy.gather import Gathers
from aiostage._copy.moves import Moves
from aiostage._copy.rectangles import pairs_of_values
from aiostage._copy.sources import Sources
from aiostage._loop.workers import Job
from aiostage._platform import yield_core

__all__ = ["HostCopy"]

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
        self._moves = Moves(sources)
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

    def run(self, job: Job) -> bool:
        """Copy. Blocks; the GIL is released meanwhile.

        Args:
            job: The job that this is a step of; once it is cancelled, no further piece is copied.

        Returns:
            Whether all was copied.
        """
        for way in (self._moves, self._gathers, self._conversions):
            if job.cancelled:
                return False
            for _ in way.pieces():
                # A thread that has just been woken, the event loop's for one, would otherwise wait until the scheduler
                # takes this one's core away: up to 4 ms where all cores are busy, measured on Linux 6.18.
                yield_core()
                if job.cancelled:
                    return False
        return True

    def _add_leaves(self, spec: Spec, runs: Sequence[Run]) -> Generator[None, None, None]:
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

    def _add_piece(self, spec: Spec, piece: Piece) -> None:
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


def _joined(runs: Sequence[Run]) -> Sequence[int]:
    """Return the numbers of the leaves in some runs, as a range if they are one."""
    ranges = [run.indices for run in runs if isinstance(run.indices, range)]
    if len(ranges) == len(runs) and all(after.start == before.stop for before, after in pairwise(ranges)):
        return range(ranges[0].start, ranges[-1].stop)
    return list(chain.from_iterable(run.indices for run in runs))


def _is_memory(spec: Spec) -> bool:
    """Return whether copying the leaf's bytes copies its value."""
    return spec.target is spec.dtype and not spec.by_value
