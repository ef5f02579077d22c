"""One file on its way to a storage: its parts as they are asked for, and their digests."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from aiostage._loop.cleanup import finish
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, Draft
from aiostage.errors import CheckpointError
from aiostage.observe import span
from aiostage.storage.files import aligned_memory
from aiostage.storage.manifest import FileRecord
from aiostage.storage.parts import Part, digest, gather, places, whole

__all__ = ["OutgoingFile", "PartBuffers"]


class PartBuffers:
    """Memory for parts that are gathered from many places, used again when nobody refers to what was made from it.

    Args:
        part_bytes: How large each is.
    """

    def __init__(self, part_bytes: int) -> None:
        self.part_bytes = part_bytes
        self._free: list[np.ndarray[Any, Any]] = []

    def take(self) -> np.ndarray[Any, Any]:
        """Return uninitialized memory. May be called from any thread."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = aligned_memory(self.part_bytes)
        # An array with a base of its own, which everything that is made from it keeps alive.
        lent: np.ndarray[Any, Any] = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent


class OutgoingFile:
    """Sends one file. An asynchronous iterator over its parts, for the storage to ask for them.

    Args:
        name: Of the file.
        parts: All of them.
        workers: Gather and digest.
        buffers: For parts that are not one piece of memory.
        landed: Waits until memory, given by its address and size, has its final contents.
        sent: Called on the event loop with the number of bytes that were handed over since the last call.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        *,
        workers: Workers,
        buffers: PartBuffers,
        landed: Callable[[int, int], Awaitable[None]] | None = None,
        sent: Callable[[int], object] | None = None,
    ) -> None:
        self.name = name
        self.nbytes = parts[-1].offset + parts[-1].nbytes
        self._parts = parts
        self._workers = workers
        self._buffers = buffers
        self._landed = landed
        self._sent = sent
        self._next = self._reported = 0
        self._digests = [""] * len(parts)
        self._digesting = workers.job()

    async def send(self, draft: Draft) -> FileRecord:
        """Write the file to a draft.

        Returns:
            What was written.

        Raises:
            CheckpointError: If the storage did not ask for all of it.
            OSError: If the storage refuses.

        When cancelled, nothing refers to the parts any more.
        """
        try:
            with span("write", file=self.name, nbytes=self.nbytes, parts=len(self._parts)):
                await draft.write(self.name, self.nbytes, self)
            self._digesting.close()
            await self._digesting.join()
        except BaseException as error:
            self._digesting.cancel()
            # A coroutine that is being closed may not wait; the running steps keep what they touch alive.
            if not isinstance(error, GeneratorExit):
                await finish(self._digesting.settled)
            raise
        if self._next != len(self._parts):
            raise CheckpointError(
                f"the storage took {self._next} of {len(self._parts)} parts of {self.name} and said that it was done.",
                path=draft.location,
            )
        self._report()
        return FileRecord(self.name, self.nbytes, tuple(self._digests))

    def __aiter__(self) -> OutgoingFile:
        """Return self: a file is sent once."""
        return self

    async def __anext__(self) -> Buffer:
        """Return the next part, once it is there."""
        self._report()
        if self._next == len(self._parts):
            raise StopAsyncIteration
        part = self._parts[self._next]
        if self._landed is not None:
            for address, nbytes in places(part):
                await self._landed(address, nbytes)
        data = whole(part)
        buffer = data.numpy().data if data is not None else await self._workers.run(partial(self._gather, part))
        self._next += 1
        # While the bytes are hot, but not before they leave: the storage has threads of its own.
        self._digesting.put(partial(self._digest, part.index, buffer))
        return buffer

    def _report(self) -> None:
        """Say of the part that was handed over last that it was."""
        if self._sent is not None and self._reported < self._next:
            self._reported = self._next
            self._sent(self._parts[self._next - 1].nbytes)

    def _gather(self, part: Part) -> Buffer:
        lent = self._buffers.take()
        with span("gather", nbytes=part.nbytes):
            gather(part, torch.from_numpy(lent))
        return lent.data[: part.nbytes]

    def _digest(self, index: int, buffer: Buffer) -> None:
        with span("digest", nbytes=len(buffer)):
            self._digests[index] = digest(buffer)
