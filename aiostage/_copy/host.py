"""Copying a batch from source tensors in host memory to an arena, outside the event loop and the GIL."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from operator import attrgetter
from time import sleep
from typing import Any, TypeVar

import numpy as np
import torch

from aiostage._capture.faithful import PLAIN_CLASSES, Spec
from aiostage._capture.plan import Batch, Piece, Run
from aiostage._copy.conversions import Conversions
from aiostage._copy.gather import Gathers
from aiostage._copy.moves import Moves
from aiostage._loop.workers import Job

__all__ = ["HostCopy"]

T = TypeVar("T")

_MOVED_BYTES = 256 * 1024
"""From this size on a leaf is copied by a call of its own, whose cost does not show there."""


class HostCopy:
    """The copies of one batch, ready to run in a worker thread: each leaf in the cheapest of three ways.

    Args:
        batch: What to copy.
        tensors: The source leaves, kept alive, as a list that is not changed, until the copy has run.
        staged: Where their staged copies are once they are built.
        specs: Of the leaves.
        addresses: Of the source leaves.
        memory: One-dimensional uint8, the whole arena, kept alive like the sources.
    """

    __slots__ = ("_addresses", "_conversions", "_gathers", "_memory", "_moves", "_tensors")

    def __init__(
        self,
        batch: Batch,
        tensors: Sequence[torch.Tensor],
        staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        specs: Sequence[Spec | None],
        addresses: Sequence[int],
        memory: np.ndarray[Any, Any],
    ) -> None:
        self._tensors = tensors
        self._addresses = addresses
        self._memory = memory
        self._moves = Moves()
        self._gathers = Gathers()
        self._conversions = Conversions(staged)
        # Runs of one spec follow each other in the arena too.
        for spec, runs in groupby(filter(_is_whole, batch.runs), _spec):
            self._add_leaves(spec, list(runs))
        for piece in batch.pieces:
            self._add_piece(_known(specs[piece.index]), piece)

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
                _yield_core()
                if job.cancelled:
                    return False
        return True

    def _add_leaves(self, spec: Spec, runs: Sequence[Run]) -> None:
        """Add whole leaves of one spec."""
        if not (_is_memory(spec) and spec.cls in PLAIN_CLASSES):
            indices = chain.from_iterable(run.indices for run in runs)
            self._conversions.add_leaves(indices, _pick(self._tensors, runs))
            return
        start, stop = runs[0].offset, runs[-1].offset + runs[-1].nbytes
        begins = _pick(self._addresses, runs)
        small = spec.nbytes < _MOVED_BYTES
        if not (small and self._gathers.add(begins, spec.nbytes, self._memory[start:stop])):
            base = self._memory.ctypes.data
            self._moves.add(range(base + start, base + stop, spec.nbytes), begins, spec.nbytes)

    def _add_piece(self, spec: Spec, piece: Piece) -> None:
        """Add a part of a leaf."""
        if _is_memory(spec):
            size = spec.dtype.itemsize
            address = self._addresses[piece.index] + piece.start * size
            self._moves.add([self._memory.ctypes.data + piece.offset], [address], piece.length * size)
        else:
            stop = piece.offset + piece.length * spec.target.itemsize
            destination = torch.from_numpy(self._memory[piece.offset : stop]).view(spec.target)
            tensor = self._tensors[piece.index]
            first = tensor.storage_offset() + piece.start
            self._conversions.add(destination, tensor.detach().as_strided((piece.length,), (1,), first))


if sys.platform == "win32":

    def _yield_core() -> None:
        sleep(0)

else:
    # os.sched_yield() keeps the GIL, and with it from running whom the core is for.
    _yield_core = ctypes.CDLL(None).sched_yield


_is_whole = attrgetter("is_whole")
_spec = attrgetter("spec")


def _pick(items: Sequence[T], runs: Iterable[Run]) -> list[T]:
    """Return the items of the leaves in some runs."""
    picked: list[T] = []
    for run in runs:
        if isinstance(run.indices, range):
            picked += items[run.indices.start : run.indices.stop]
        else:
            picked += [items[index] for index in run.indices]
    return picked


def _known(spec: Spec | None) -> Spec:
    assert spec is not None  # noqa: S101 - a plan places leaves with memory only
    return spec


def _is_memory(spec: Spec) -> bool:
    """Return whether copying the leaf's bytes copies its value."""
    return spec.target is spec.dtype and not spec.by_value
