"""Staged memory of which only a stretch is there at any time, for what is larger than the memory for it.

The tree is made over addresses that have no memory behind them, which says where in the order of the arena every leaf
lies. The bytes pass through chunks, each a lease of its own: filled in order as the budget allows, handed to the one
consumer in order, and gone when the last buffer over them dies. Their memory is used again, warm and registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import numpy as np
import torch

from aiostage._capture.plan import BATCH_BYTES, Plan
from aiostage._memory.arena import reserve_addresses
from aiostage._memory.pool import Pool
from aiostage._platform.memory import PAGE_BYTES
from aiostage.errors import HostMemoryError, StagingError

__all__ = ["Chunk", "Window"]

_CHUNKS_IN_BUDGET = 4
"""Small batches are put together up to this share of the budget: some are written while others are filled."""


@dataclass(eq=False, slots=True)
class Chunk:
    """Consecutive batches of one device that are filled together.

    Attributes:
        number: Which one.
        device: Where the sources are; None for host memory.
        batches: Their numbers.
        start: First byte in the order of the arena.
        stop: One past the last.
        memory: Memory of exactly these bytes, between the filling and the taking.
    """

    number: int
    device: torch.device | None
    batches: range
    start: int
    stop: int
    memory: np.ndarray[Any, Any] | None = None


class Window:
    """The chunks of one snapshot, on their way through.

    Args:
        plan: The plan of the snapshot.
        max_bytes: How much memory there is.

    Attributes:
        chunks: In the order of the arena.
        addresses: An array of the size of the whole, without memory.
        closed: Whether nothing will come any more.
    """

    def __init__(self, plan: Plan, max_bytes: int) -> None:
        largest = max(batch.stop - batch.start for batch in plan.batches)
        self._chunk_bytes = max(largest, min(BATCH_BYTES, max_bytes // _CHUNKS_IN_BUDGET))
        self.chunks = _chunks(plan, self._chunk_bytes)
        self.addresses = reserve_addresses(plan.nbytes)
        self.closed = False
        self._base = self.addresses.ctypes.data
        # Chunks below _filled have their copies under way; chunks below _passed are given up. A chunk has its memory
        # between the two. Both only grow.
        self._filled = 0
        self._passed = 0
        self._news = anyio.Event()

    async def lease(self, chunk: Chunk, pool: Pool) -> np.ndarray[Any, Any]:
        """Return memory for a chunk, once there is some, at the same distance from a page's start as in the arena."""
        # Views keep their alignment: what lies on a boundary in the addresses does so in the chunk's memory.
        lead = chunk.start % PAGE_BYTES
        # All of one size, so that each can take the place of any other.
        lease = await pool.acquire(self._chunk_bytes + PAGE_BYTES, device=chunk.device)
        return lease.buffer[lead : lead + chunk.stop - chunk.start]

    def filled(self, chunk: Chunk, memory: np.ndarray[Any, Any]) -> None:
        """Take note that the copies into a chunk are under way."""
        # The consumer may have passed it by meanwhile. The copies refer to its memory, which goes once they are made.
        if chunk.number >= self._passed and not self.closed:
            chunk.memory = memory
        self._filled = chunk.number + 1
        self._tell()

    def close(self) -> None:
        """Say that nothing will come any more."""
        self.closed = True
        for chunk in self.chunks:
            chunk.memory = None
        self._tell()

    async def launched(self, batch: int) -> None:
        """Wait until a batch is under way, or never will be. Cancelling changes nothing."""
        while not self.closed and not (self._filled and batch < self.chunks[self._filled - 1].batches.stop):
            await self._news.wait()

    async def take(self, address: int, nbytes: int) -> np.ndarray[Any, Any]:
        """Return the memory for bytes that lie in one chunk; their copies may not have been made yet.

        Everything before that chunk is given up, so that what is taken has to be taken in order.

        Args:
            address: The address of the first byte, in :attr:`addresses`.
            nbytes: How many.

        Raises:
            StagingError: If they were already consumed.
            HostMemoryError: If they do not lie in one chunk.

        May be cancelled; that changes nothing.
        """
        start = address - self._base
        chunk = self._chunk_at(start)
        if start + nbytes > chunk.stop:
            raise HostMemoryError(
                f"a leaf of {nbytes} bytes that is not contiguous does not fit a chunk of {self._chunk_bytes} bytes.",
                remedy="Make it contiguous, or raise max_host_bytes so that the whole copy fits twice.",
            )
        # Before the wait: the memory of what lies before may be what the filling of this chunk waits for.
        self.pass_by(chunk.number)
        while self._filled <= chunk.number and not self.closed:
            await self._news.wait()
        if chunk.memory is None:
            raise StagingError(
                "these bytes were already consumed.", remedy="Give a streamed snapshot to one consumer only."
            )
        return chunk.memory[start - chunk.start : start - chunk.start + nbytes]

    def chunk_of(self, address: int) -> Chunk | None:
        """Return the chunk that an address lies in, or None if it lies elsewhere."""
        return self._chunk_at(address - self._base) if 0 <= address - self._base < len(self.addresses) else None

    def pass_by(self, number: int) -> None:
        """Give up the chunks before one."""
        for chunk in self.chunks[self._passed : number]:
            chunk.memory = None
        self._passed = max(self._passed, number)

    def split(self, address: int, nbytes: int) -> list[tuple[int, int]]:
        """Cut a range of addresses where chunks end."""
        pieces = []
        start, stop = address - self._base, address - self._base + nbytes
        while start < stop:
            end = min(stop, self._chunk_at(start).stop)
            pieces.append((self._base + start, end - start))
            start = end
        return pieces

    def _chunk_at(self, offset: int) -> Chunk:
        low, high = 0, len(self.chunks) - 1
        while low < high:
            middle = (low + high) // 2
            if self.chunks[middle].stop > offset:
                high = middle
            else:
                low = middle + 1
        return self.chunks[low]

    def _tell(self) -> None:
        # No lock, here and above: all of it runs on one event loop. Threads know the memory of the chunks alone.
        # One event for each piece of news, because anyio's cannot be reset. Who waits holds the old one and looks
        # again.
        self._news.set()
        self._news = anyio.Event()


def _chunks(plan: Plan, chunk_bytes: int) -> Sequence[Chunk]:
    chunks: list[Chunk] = []
    for number, batch in enumerate(plan.batches):
        last = chunks[-1] if chunks else None
        if last is not None and last.device == batch.device and batch.stop - last.start <= chunk_bytes:
            last.batches, last.stop = range(last.batches.start, number + 1), batch.stop
        else:
            chunks.append(Chunk(len(chunks), batch.device, range(number, number + 1), batch.start, batch.stop))
    return chunks
