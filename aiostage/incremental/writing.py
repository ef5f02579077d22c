"""Writing only what has changed since the last checkpoint, and referring to where the rest lies.

It stands between a save and its storage: to the save it is a pending checkpoint, to the storage an ordinary save. A
block whose digest is that of the same block of the base is not handed on. The other blocks are written as a few files
of limited size, because a storage wants to know the size of a file when it begins, and how much has changed is known
only at the end. References always name the place where bytes really lie, never another reference.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import anyio
import numpy as np
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from aiostage._loop.coroutines import finish, give_up, run_concurrently
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, PendingCheckpoint, Storage
from aiostage.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from aiostage.format.manifest import with_placement
from aiostage.format.parts import PART_BYTES
from aiostage.format.placement import BLOCK_BYTES, Extent, PlacedFile, Placement, SourceFile, append, block_digests
from aiostage.incremental.references import is_kept, locked, placement_of
from aiostage.storage.files import PartBuffers
from aiostage.storage.locate import exists, name_of, present, step_of, tombstone_of

__all__ = ["Base", "IncrementalSaver", "IncrementalWrite"]

_log = logging.getLogger("aiostage")

_ATTEMPTS = 10
"""Attempts to lock a base that is not removed at just that moment. After them the save writes everything. A guess."""

_GROUP_BYTES = 4 * PART_BYTES
"""How large the files are that changed blocks go to. Four of them exist at the most: one is being filled, one waits,
and two are being written, so that one has parts to write while the other becomes durable."""


@dataclass(frozen=True)
class Base:
    """The checkpoint that a new one is compared with.

    Attributes:
        name: What it is called.
        placement: Where its files lie.
    """

    name: str
    placement: Placement

    def file(self, name: str, nbytes: int) -> PlacedFile | None:
        """Return where a file of a name and size lies, or None if there is none."""
        file = self.placement.files.get(name)
        return file if file is not None and file.nbytes == nbytes else None

    def worthwhile(self) -> frozenset[SourceFile]:
        """Return the files that may be referred to, seen from another checkpoint.

        A file that is referred to stays as a whole. So a file of which less than half is still in use is not referred
        to any more, and its blocks are written again: a storage never holds more than about twice what is needed.
        """
        used, sizes = self.placement.used(), self.placement.sizes
        return frozenset(self._named(place) for place in sizes if 2 * used[place] >= sizes[place])

    def located(self, file: PlacedFile, start: int, stop: int) -> list[Extent]:
        """Return where a range of a file lies, seen from another checkpoint."""
        return [Extent(*self._named(piece.place), piece.offset, piece.nbytes) for piece in file.located(start, stop)]

    def size(self, place: SourceFile) -> int:
        """Return how long a file is that pieces lie in, seen from another checkpoint."""
        source, file = place
        return self.placement.sizes[None if source == self.name else source, file]

    def _named(self, place: SourceFile) -> SourceFile:
        source, file = place
        return self.name if source is None else source, file


@dataclass(frozen=True)
class Written:
    """What was written of a checkpoint.

    Attributes:
        placement: Where its files lie.
        nbytes: How many bytes were written, the manifest included.
    """

    placement: Placement
    nbytes: int


class IncrementalSaver:
    """Writes checkpoints of a run incrementally: each is compared with the last one.

    Args:
        storage: Where to.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._last: str | None = None

    @asynccontextmanager
    async def compared(self) -> AsyncGenerator[IncrementalWrite, None]:
        """Choose what to compare a new checkpoint with, and keep it from being removed while the block runs.

        The block opens the new checkpoint with what it gets, writes all of it and commits it.

        Raises:
            CheckpointError: If the lock was lost and the other was removed. The new checkpoint is removed then.
            OSError: If the storage refuses.

        When cancelled, the lock is removed; the pending checkpoint is aborted by the block.
        """
        for _ in range(_ATTEMPTS):
            base = await self._latest()
            if base is None:
                break
            async with locked(self._storage, base) as lock:
                # Looked at only now that it is locked. Before, a removal could take it away after the look. A removed
                # checkpoint may still have its manifest, so the tombstone decides.
                if await exists(self._storage, tombstone_of(base)):
                    continue
                try:
                    placement = await placement_of(self._storage, base)
                except CheckpointNotFoundError:
                    continue
                except CheckpointCorruptError as error:
                    _log.warning("nothing can be compared with the checkpoint %s: %s", base, error)
                    placement = None
                # The placement is also None if the base was not saved incrementally: its blocks have no digests, and
                # another process may replace it, because no checkpoint refers to it.
                write = IncrementalWrite(self._storage, Base(base, placement) if placement is not None else None)
                yield write
                # After the commit and before the lock is removed. This process may have been suspended, its heartbeat
                # may have expired, and another process may have removed the lock and the base.
                if placement is not None and write.written is not None:
                    try:
                        # The common case, with two requests. is_kept() asks more if this is not certain.
                        kept = not await exists(self._storage, tombstone_of(base)) and await exists(self._storage, base)
                    except BaseException as error:
                        # Cancelled, or the storage refuses. The new checkpoint is committed all the same, so it must
                        # not stay if its references dangle.
                        await give_up(self._remove_unless_kept(write, base, lock), error)
                        raise
                    if not kept and not await self._remove_unless_kept(write, base, lock):
                        raise CheckpointError(
                            f"the checkpoint {base}, whose files it refers to, was removed by another process because "
                            "the heartbeat of this one expired.",
                            path=write.location,
                            remedy="Save it again.",
                        )
            self._committed(write)
            return
        write = IncrementalWrite(self._storage, None)
        yield write
        self._committed(write)

    async def _remove_unless_kept(self, write: IncrementalWrite, base: str, lock: str) -> bool:
        """Remove the committed checkpoint if another process has removed its base.

        Returns:
            Whether the base is kept, and the checkpoint with it.

        A cancellation is delivered when that is done.
        """

        async def look() -> bool:
            kept = await is_kept(self._storage, base, lock)
            if not kept:
                await self._storage.delete(write.name)
            return kept

        return await finish(look)

    def _committed(self, write: IncrementalWrite) -> None:
        # A block may end without a commit.
        if write.written is not None:
            self._last = write.name

    async def _latest(self) -> str | None:
        """Return which checkpoint to compare a new one with: the one that was saved last, or else the highest."""
        there = present(await self._storage.list_level())
        # The checkpoint that this saver has committed last is most like the next tree, also if it has not the highest
        # step: a run may have gone back.
        if self._last in there:
            return self._last
        latest = max((step for name in there if (step := step_of(name)) is not None), default=None)
        return name_of(latest) if latest is not None else None


class IncrementalWrite:
    """One save, of which only what has changed is written.

    Args:
        storage: Where to.
        base: The checkpoint to compare with, which must stay until the save has ended; None writes everything.

    Attributes:
        name: What the new checkpoint is called, once it is opened.
    """

    def __init__(self, storage: Storage, base: Base | None) -> None:
        self.name = ""
        self._storage = storage
        self._base = base
        self._pending: _IncrementalCheckpoint | None = None

    @property
    def location(self) -> str:
        """Where the new checkpoint is, once it is opened."""
        return self._pending.location if self._pending is not None else self._storage.location

    @property
    def written(self) -> Written | None:
        """What was written, once the new checkpoint is committed."""
        return self._pending.written if self._pending is not None else None

    async def open(self, name: str) -> PendingCheckpoint:
        """Begin the checkpoint. Raises as :meth:`Storage.open`."""
        workers = Workers(1, "aiostage-blocks")
        # Computed once for each save, and in a thread, because a manifest may have a million extents.
        worthwhile = await workers.run(self._base.worthwhile) if self._base is not None else frozenset()
        pending = await self._storage.open(name)
        self.name = name
        self._pending = _IncrementalCheckpoint(pending, self._base, worthwhile, workers)
        return self._pending


class _IncrementalCheckpoint(PendingCheckpoint):
    """A pending checkpoint to which only what has changed is handed on."""

    def __init__(
        self, pending: PendingCheckpoint, base: Base | None, worthwhile: frozenset[SourceFile], workers: Workers
    ) -> None:
        self._pending = pending
        self._base = base
        self._worthwhile = worthwhile
        self._workers = workers
        self._buffers = PartBuffers(PART_BYTES)
        self._files: dict[str, PlacedFile] = {}
        self._own: dict[SourceFile, int] = {}
        self.written: Written | None = None

    @property
    def location(self) -> str:
        return self._pending.location

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        # Only a file of the same name and size is compared. In a file of another size the header has changed, and with
        # it the offset of all that follows: hardly a block would be the same.
        old = self._base.file(name, nbytes) if self._base is not None else None
        if old is None:
            blocks: list[str] = []
            async with aclosing(self._digested(parts, blocks)) as digested:
                await self._pending.write(name, nbytes, digested)
            pieces = [Extent(None, name, 0, nbytes)]
            self._own[None, name] = nbytes
        else:
            blocks, pieces = await self._write_changed(name, old, parts)
        self._files[name] = await self._workers.run(partial(PlacedFile.of, blocks, pieces))

    async def commit(self, manifest: Buffer) -> None:
        placement, text = await self._workers.run(partial(self._placed, manifest))
        # The attribute is set only after the commit. If it is set, the checkpoint is there.
        await self._pending.commit(memoryview(text))
        self.written = Written(placement, sum(self._own.values()) + len(text))

    async def abort(self) -> None:
        await self._pending.abort()

    def _placed(self, manifest: Buffer) -> tuple[Placement, bytearray]:
        """Return where everything lies, and a manifest that says so. Blocks."""
        # The files that were written here, and then those of the base that are referred to.
        sizes = dict(self._own)
        for place in dict.fromkeys(piece.place for file in self._files.values() for piece in file.pieces):
            if self._base is not None and place not in sizes:
                sizes[place] = self._base.size(place)
        placement = Placement(sizes, self._files)
        return placement, with_placement(manifest.tobytes(), placement)

    async def _digested(self, parts: AsyncIterable[Buffer], blocks: list[str]) -> AsyncGenerator[Buffer, None]:
        """Yield the parts of a file, and add the digests of their blocks to a list."""
        async for part in parts:
            blocks += await self._workers.run(partial(block_digests, part))
            yield part
            # The memory of a part must be free while the next one is waited for, which may need it.
            del part

    async def _write_changed(
        self, name: str, old: PlacedFile, parts: AsyncIterable[Buffer]
    ) -> tuple[list[str], list[Extent]]:
        """Write the blocks of a file that have changed, and return the digests of all, and where they lie."""
        # A stream without a buffer: a group is handed over only when a writer is free, so that no more groups exist
        # than _GROUP_BYTES says.
        filled, full = anyio.create_memory_object_stream[_Group](0)
        changes = _Changes(name, self._workers, self._buffers, may_keep=getattr(parts, "may_be_kept", False))
        blocks: list[str] = []

        async def fill() -> None:
            async with filled:
                async for part in parts:
                    digests = await self._workers.run(partial(block_digests, part))
                    for start, stop, new in self._runs(old, blocks, digests, len(part)):
                        if new:
                            await changes.add(part[start:stop], filled)
                        else:
                            position = len(blocks) * BLOCK_BYTES
                            # From the base's own placement: references name where the bytes really lie, not the base.
                            # So a load opens each source once, however long the run is.
                            for piece in self._located(old, position + start, position + stop):
                                append(changes.pieces, piece)
                    # After the runs, which count blocks before this part by the length of the list.
                    blocks.extend(digests)
                    # As in _digested().
                    del part
                await changes.finish(filled)

        async def write(full: ObjectReceiveStream[_Group]) -> None:
            async with full:
                async for group in full:
                    async with aclosing(group.parts()) as copies:
                        await self._pending.write(group.name, group.nbytes, copies)
                    self._own[None, group.name] = group.nbytes

        # Each writer has its own receiving end and closes it. If both have failed, fill() gets BrokenResourceError, and
        # does not wait for ever.
        await run_concurrently(fill, partial(write, full.clone()), partial(write, full))
        return blocks, changes.pieces

    def _runs(
        self, old: PlacedFile, before: Sequence[str], digests: Sequence[str], nbytes: int
    ) -> list[tuple[int, int, bool]]:
        """Return runs of blocks of a part that are alike: start and stop in the part, and whether to write them."""
        runs: list[tuple[int, int, bool]] = []
        for index, digest in enumerate(digests):
            start, stop = index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, nbytes)
            position = (len(before) + index) * BLOCK_BYTES
            new = digest != old.blocks[len(before) + index] or not all(
                piece.place in self._worthwhile for piece in self._located(old, position, position + stop - start)
            )
            if runs and runs[-1][2] == new:
                runs[-1] = (runs[-1][0], stop, new)
            else:
                runs.append((start, stop, new))
        return runs

    def _located(self, old: PlacedFile, start: int, stop: int) -> list[Extent]:
        return self._base.located(old, start, stop) if self._base is not None else []


class _Group:
    """A file of changed blocks: parts, all but the last of them full."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self._parts: deque[np.ndarray[Any, Any]] = deque()

    @property
    def space(self) -> int:
        """How many bytes its last part can take, or a new one."""
        return min(PART_BYTES - self.nbytes % PART_BYTES, _GROUP_BYTES - self.nbytes)

    def keep(self, part: Buffer) -> None:
        """Add a whole part as it is."""
        self._parts.append(np.frombuffer(part, np.uint8))
        self.nbytes += PART_BYTES

    def copy(self, data: Buffer, buffers: PartBuffers) -> None:
        """Add a copy of data that the last part has space for. Blocks."""
        start = self.nbytes % PART_BYTES
        if start == 0:
            self._parts.append(buffers.take())
        self._parts[-1][start : start + len(data)] = np.frombuffer(data, np.uint8)
        self.nbytes += len(data)

    async def parts(self) -> AsyncGenerator[Buffer, None]:
        """Yield the parts, each of which goes when it has been written."""
        left = self.nbytes
        while left:
            nbytes = min(PART_BYTES, left)
            yield self._parts.popleft().data[:nbytes]
            left -= nbytes


class _Changes:
    """The changed blocks of a file, collected into groups.

    Args:
        name: The name of the file.
        workers: Copy.
        buffers: To copy to.
        may_keep: Whether parts may be kept until they are written. Otherwise blocks are copied, so that the parts can
            go at once.
    """

    def __init__(self, name: str, workers: Workers, buffers: PartBuffers, *, may_keep: bool) -> None:
        self.pieces: list[Extent] = []
        self._names = (f"{name}.{number:05}" for number in count(1))
        self._workers = workers
        self._buffers = buffers
        self._may_keep = may_keep
        self._group: _Group | None = None

    async def add(self, data: Buffer, filled: ObjectSendStream[_Group]) -> None:
        if self._may_keep and len(data) == PART_BYTES and self._group is not None and self._group.nbytes % PART_BYTES:
            # A whole part that may be kept needs no copy, if it begins a part of the file. So the group ends here: one
            # small file costs less than to copy this part and all that follow it.
            await self.finish(filled)
        while data:
            group = self._group = self._group or _Group(next(self._names))
            taken = data[: group.space]
            append(self.pieces, Extent(None, group.name, group.nbytes, len(taken)))
            if self._may_keep and len(taken) == PART_BYTES:
                group.keep(taken)
            else:
                await self._workers.run(partial(group.copy, taken, self._buffers))
            data = data[len(taken) :]
            if not group.space:
                await self.finish(filled)

    async def finish(self, filled: ObjectSendStream[_Group]) -> None:
        """Hand over what there is."""
        if self._group is not None:
            await filled.send(self._group)
            self._group = None
