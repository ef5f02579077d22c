"""Copying a batch from source tensors in host memory to an arena, outside the event loop and the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from aiostage._capture.faithful import PLAIN_CLASSES, Spec
from aiostage._capture.plan import Batch, Run
from aiostage._loop.workers import Job

__all__ = ["HostCopy", "copy_tensors"]

_PIECE_BYTES = 4 * 2**20
"""How much is moved between two looks at whether anybody still wants it: 0.2 ms into warm memory, and up to 10 ms where
a virtual machine has to ask its host for every page."""

_MOVED_BYTES = 256 * 1024
"""From this size on a leaf is copied by memmove: there a call of its own costs nothing, and torch would split the copy
among its own threads, which fight those of the other worker and of the training step for the cores."""


class HostCopy:
    """The copies of one batch, ready to run in a worker thread.

    Args:
        batch: What to copy.
        tensors: The source leaves, kept alive until the copy has run.
        staged: Their staged copies, built where the batch needs them.
        specs: Of the leaves.
        addresses: Of the source leaves.
        memory: One-dimensional uint8, the whole arena, kept alive like the sources.
    """

    __slots__ = ("_destinations", "_joins", "_keep", "_moves", "_sources")

    def __init__(
        self,
        batch: Batch,
        tensors: Sequence[torch.Tensor],
        staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        specs: Sequence[Spec | None],
        addresses: Sequence[int],
        memory: np.ndarray[Any, Any],
    ) -> None:
        self._destinations: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._joins: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._moves: list[tuple[int, int, int]] = []
        self._keep: list[object] = []
        if batch.start + len(batch.whole) * _MOVED_BYTES > batch.stop:
            # Small on average, so looking at each would cost more than it saves.
            apart = self._join(batch, tensors, memory)
            self._destinations = [staged[index] for run in apart for index in run.indices]
            self._sources = [tensors[index] for run in apart for index in run.indices]
        else:
            for index in batch.whole:
                spec = _known(specs[index])
                if _is_memory(spec) and spec.nbytes >= _MOVED_BYTES:
                    self._move(staged[index].data_ptr(), addresses[index], spec.nbytes, tensors[index])
                else:
                    self._destinations.append(staged[index])
                    self._sources.append(tensors[index])
        for piece in batch.pieces:
            spec, tensor = _known(specs[piece.index]), tensors[piece.index]
            if _is_memory(spec):
                size = spec.dtype.itemsize
                address = addresses[piece.index] + piece.start * size
                self._move(memory.ctypes.data + piece.offset, address, piece.length * size, tensor)
            else:
                stop = piece.offset + piece.length * spec.target.itemsize
                self._destinations.append(torch.from_numpy(memory[piece.offset : stop]).view(spec.target))
                first = tensor.storage_offset() + piece.start
                self._sources.append(tensor.detach().as_strided((piece.length,), (1,), first))
        self._keep.append(memory)

    def _join(self, batch: Batch, tensors: Sequence[torch.Tensor], memory: np.ndarray[Any, Any]) -> list[Run]:
        """Copy runs by concatenating their leaves, as many at once as possible; return those where that will not do."""
        apart: list[Run] = []
        for spec, same in groupby(filter(_is_whole, batch.runs), _spec):
            runs = list(same)
            if not (_is_memory(spec) and spec.shape and spec.cls in PLAIN_CLASSES):
                apart += runs
                continue
            sources = [tensors[index] for run in runs for index in run.indices]
            # Runs of one spec follow each other in the arena too.
            flat = torch.from_numpy(memory[runs[0].offset : runs[-1].offset + runs[-1].nbytes]).view(spec.dtype)
            self._joins.append((flat.view(len(sources) * spec.shape[0], *spec.shape[1:]), sources))
        return apart

    def _move(self, destination: int, source: int, nbytes: int, tensor: torch.Tensor) -> None:
        self._moves.append((destination, source, nbytes))
        self._keep.append(tensor)

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
        with torch.no_grad():
            for joined, sources in self._joins:
                # Half the cost of _foreach_copy_ for small leaves, which it copies one operation at a time.
                torch.cat(sources, out=joined)
        if self._destinations:
            copy_tensors(self._destinations, self._sources)
        return True


def copy_tensors(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors in one fused operation; the GIL is released while it runs."""
    # Without gradients a leaf that requires one may be written to; the mode belongs to the thread.
    with torch.no_grad():
        torch._foreach_copy_(destinations, sources)


_is_whole = attrgetter("is_whole")
_spec = attrgetter("spec")


def _known(spec: Spec | None) -> Spec:
    assert spec is not None  # noqa: S101 - a plan places leaves with memory only
    return spec


def _is_memory(spec: Spec) -> bool:
    """Return whether copying the leaf's bytes copies its value."""
    return spec.target is spec.dtype and not spec.by_value
