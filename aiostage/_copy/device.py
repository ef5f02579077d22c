"""Copying a batch from a device to an arena: few launches, in stream order, and never into memory given away."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from aiostage._capture.plan import SMALL_BYTES, Batch
from aiostage._capture.versions import Sources, detached_alias
from aiostage._copy.rectangles import pairs_of_values
from aiostage.abc import Backend

__all__ = ["DeviceCopy"]


class DeviceCopy:
    """The copies of one batch, to be enqueued from a worker thread.

    It reads through aliases of the leaves, made on the event loop, because the leaves themselves may be given other
    memory while a thread enqueues.

    Args:
        number: The number of the batch.
        batch: What to copy.
        aliases: The aliases of the source leaves by their numbers, without those whose memory has been replaced.
        sources: The leaves.
        staged: Their staged copies, built where the batch needs them.
        memory: One-dimensional uint8, the whole arena.

    Attributes:
        number: The number of the batch.
        device: Where the sources are.
        nbytes: How many bytes it brings.
        launches: How many operations were enqueued so far.
    """

    def __init__(
        self,
        number: int,
        batch: Batch,
        aliases: Mapping[int, torch.Tensor],
        sources: Sources,
        staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        memory: np.ndarray[Any, Any],
    ) -> None:
        assert batch.device is not None  # noqa: S101 - host batches are copied by HostCopy
        self.number = number
        self.device = batch.device
        self.nbytes = batch.stop - batch.start
        self._whole = [
            (sources.spec(index), aliases[index], staged[index]) for index in batch.whole if index in aliases
        ]
        self._pieces = [
            (piece, sources.spec(piece.index), aliases[piece.index]) for piece in batch.pieces if piece.index in aliases
        ]
        self._memory = memory
        # Kept apart from what is enqueued: take_memory() drops the packed sources, while the leaves must outlive the
        # copies.
        self._leaves = list(aliases.values())
        self._destinations: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self.launches = 0

    @classmethod
    def of(
        cls,
        number: int,
        batch: Batch,
        sources: Sources,
        staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        memory: np.ndarray[Any, Any],
    ) -> Generator[None, None, DeviceCopy]:
        """Return the copies of a batch, yielding between small steps while their sources are looked up."""
        indices = [*batch.whole, *dict.fromkeys(piece.index for piece in batch.pieces)]
        aliases = yield from sources.aliases(indices)
        return cls(number, batch, aliases, sources, staged, memory)

    def enqueue(self, backend: Backend, stream: Any) -> None:
        """Tell the device to copy. May block while the host memory is not pinned.

        Args:
            backend: How to reach the device.
            stream: A side stream of the batch's device that waits for the caller's work already.

        Raises:
            Exception: What the device says. Some copies may be under way all the same.
        """
        with torch.no_grad():
            self._take_whole(backend, stream)
            self._take_pieces()
            # Before the copies: if one of them fails, the allocator knows of the reads that were enqueued before it.
            for source in self._leaves:
                backend.keep(source, stream)
            self.launches += backend.copy(self._destinations, self._sources, stream)

    @property
    def copies(self) -> int:
        """How many copies to host memory were enqueued so far."""
        return len(self._destinations)

    def take_memory(self) -> list[object]:
        """Return what must outlive the copies, also those of an :meth:`enqueue` that has failed half-way."""
        # What was gathered belongs to the stream. Dropped now, its memory serves the next batch; kept, all small
        # leaves would lie on the device twice until they have been copied.
        self._sources = []
        return [self._leaves, self._destinations, self._memory]

    def _take_whole(self, backend: Backend, stream: Any) -> None:
        """Note the leaves that are copied as they are, small ones in consecutive slots as one."""
        pack: list[torch.Tensor] = []
        dtype: torch.dtype | None = None
        base: int = self._memory.ctypes.data
        begin = end = 0
        for spec, source, staged in self._whole:
            if spec.nbytes > SMALL_BYTES or spec.target is not spec.dtype or spec.by_value:
                self._destinations.append(detached_alias(staged))
                self._sources.append(source)
                continue
            address = staged.data_ptr() - base
            # A gap in the arena, or another dtype: one copy cannot bring both.
            if pack and (address != end or spec.dtype is not dtype):
                self._take_pack(pack, begin, backend, stream)
                pack = []
            if not pack:
                begin, dtype = address, spec.dtype
            pack.append(source.reshape(-1))
            end = address + spec.nbytes
        if pack:
            self._take_pack(pack, begin, backend, stream)

    def _take_pack(self, sources: list[torch.Tensor], begin: int, backend: Backend, stream: Any) -> None:
        """Gather leaves of one dtype whose slots are consecutive, so that one copy brings them all."""
        dtype = sources[0].dtype
        sizes = [source.numel() for source in sources]
        destination = torch.from_numpy(self._memory[begin : begin + sum(sizes) * dtype.itemsize]).view(dtype)
        if len(sources) > 1:
            try:
                flat, launches = backend.pack(sources, stream)
            except torch.OutOfMemoryError:
                # Slower, but a checkpoint is wanted most when the device is full.
                self._destinations += torch.split(destination, sizes)
                self._sources += sources
                return
            self.launches += launches
            sources = [flat]
        self._destinations.append(destination)
        self._sources += sources

    def _take_pieces(self) -> None:
        """Note the ranges of memory that are copied flat."""
        for piece, spec, tensor in self._pieces:
            stop = piece.offset + piece.length * spec.target.itemsize
            destination = torch.from_numpy(self._memory[piece.offset : stop])
            if spec.target is spec.dtype and not spec.by_value:
                size = spec.dtype.itemsize
                begin = (tensor.storage_offset() + piece.start) * size
                source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                # A piece is a range of memory in the order of the storage. set_ makes a flat view of it even where the
                # leaf is not contiguous, and launches nothing on the device.
                source.set_(tensor.untyped_storage(), begin, (piece.length * size,), (1,))
            else:
                for part, source in pairs_of_values(tensor, spec, piece.start, destination.view(spec.target)):
                    self._destinations.append(part)
                    self._sources.append(source)
                continue
            self._destinations.append(destination)
            self._sources.append(source)
