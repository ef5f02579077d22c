"""One file on its way to a storage: its parts as they are asked for, and their digests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, Draft
from aiostage.checkpoint.buffers import PartBuffers
from aiostage.checkpoint.passing import collect
from aiostage.errors import CheckpointError
from aiostage.format.manifest import FileRecord
from aiostage.format.parts import Part, digest, gather, place, whole
from aiostage.observe import span
from aiostage.snapshot import Snapshot

__all__ = ["OutgoingFile"]


class OutgoingFile:
    """Sends one file. An asynchronous iterator over its parts, for the storage to ask for them.

    Args:
        name: Of the file.
        parts: All of them.
        workers: Gather and digest.
        buffers: For parts that are not one piece of memory.
        snapshot: Whose bytes the parts wait for; None if all are there.
        sent: Called on the event loop with the number of bytes that were handed over since the last call.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        *,
        workers: Workers,
        buffers: PartBuffers,
        snapshot: Snapshot[Any] | None = None,
        sent: Callable[[int], object] | None = None,
    ) -> None:
        self.name = name
        self.nbytes = parts[-1].offset + parts[-1].nbytes
        self._parts = parts
        self._workers = workers
        self._buffers = buffers
        self._snapshot = snapshot
        self._sent = sent
        self._next = self._reported = 0
        self._digests = [""] * len(parts)
        self._digesting = workers.job()

    @property
    def may_be_kept(self) -> bool:
        """Whether nothing waits for the memory of its parts, so that later ones come though earlier ones are kept."""
        return self._snapshot is None or self._snapshot.window is None

    async def send(self, draft: Draft) -> FileRecord:
        """Write the file to a draft.

        Returns:
            What was written.

        Raises:
            CheckpointError: If the storage did not ask for all of it.
            OSError: If the storage refuses.

        When cancelled, nothing refers to the parts any more.
        """
        async with self._digesting:
            with span("write", file=self.name, nbytes=self.nbytes, parts=len(self._parts)):
                await draft.write(self.name, self.nbytes, self)
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
        data = await self._data(part)
        self._next += 1
        # While the bytes are hot, but not before they leave: the storage has threads of its own.
        self._digesting.put(partial(self._digest, part.index, data))
        return data

    async def _data(self, part: Part) -> Buffer:
        """Return the contents of a part, without copying them if they lie in one piece."""
        if self._snapshot is not None:
            if self._snapshot.window is not None:
                return await collect(
                    part, self._snapshot, self._snapshot.window, buffers=self._buffers, workers=self._workers
                )
            for piece in part.pieces:
                await self._snapshot.copied(*place(piece))
        data = whole(part)
        return data.numpy().data if data is not None else await self._workers.run(partial(self._gather, part))

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
