"""The parts of a checkpoint on their way from a storage to where they belong."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import anyio
import numpy as np
import torch

from aiostage._copy.host import copy_tensors
from aiostage._copy.pending import PendingCopy
from aiostage._copy.to_device import HostToDeviceCopier, TensorCopy
from aiostage._loop.coroutines import finish, run_concurrently
from aiostage._loop.workers import Job, Workers
from aiostage._memory.arena import whole_pages
from aiostage._memory.pinned import Pinning
from aiostage._memory.pool import Pool
from aiostage._platform.memory import PAGE_BYTES, populate
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError
from aiostage.format.manifest import FileRecord
from aiostage.format.parts import (
    PART_ALIGNMENT,
    Gap,
    Part,
    Scattered,
    digest,
    memory_of,
    running_digest,
    scatter,
    single_piece,
)
from aiostage.format.safetensors import HEADER_LENGTH_BYTES, MAX_HEADER_BYTES
from aiostage.observe import span
from aiostage.storage.files import PartBuffers, address_of
from aiostage.storage.local import LocalReader

if TYPE_CHECKING:
    from aiostage.checkpoint.reader import OpenCheckpoint

__all__ = ["THREADS", "BlockingRead", "PartReader", "ReadTargets", "in_host_memory"]

T = TypeVar("T")

BlockingRead: TypeAlias = Callable[[int, Buffer, Callable[[Buffer], object] | None], None]
"""Fills a buffer from an offset of a local file, and calls a function with each piece of it that was read."""

THREADS = 2
"""Read local files, compute digests and copy. Most of the time of a load from the page cache goes into faulting new
memory in, which two do twice as fast: 512 MiB took 0.14 s, and 0.25 s with one."""

_READ_AHEAD_BYTES = 128 << 20
"""How much is read, verified or copied at any time. Each part may have a buffer, so this also bounds the host memory
that reading takes. A storage may want less."""

_AT_LEAST = 2
"""Parts that are under way at once, however large they are."""

_HEADS = 2
"""First parts that are kept after their headers were read, so that small checkpoints are read once."""

_HEAD_BYTES = 1 << 20
"""Of a longer local file the first part is read for its header without being kept, and once more to where it belongs.
From the page cache that takes no longer than new memory for it and a copy out of that, and in the first load of a
process the new memory alone took 3 to 21 ms."""

_FIRST_BYTES = 4096
"""How much is read first of a file whose header is not verified. Data begins on a page, so that this is often all of
the header."""

_STRAIGHT = 64
"""A part of a local file with at most so many pieces is read piece by piece, each to its destination, without a buffer.
A part of 8 MiB then has pieces of 128 KiB on average. Parts of large tensors mostly have two."""

_AT_A_TURN_BYTES = 64 << 20
"""How much of a local file a thread reads in one step; the event loop has a turn after it. With a turn for each part, a
load of 1 GiB took 14 ms of CPU time on the loop, and the threads waited as long for their next part. Towards the end
it is less, so that all threads end at about the same time."""

_GAP_BYTES = 512 << 10
"""How much memory is used over and over for bytes that are verified but have no destination. It stays in the cache."""

_BLOCK_BYTES = 256 << 10
"""How much is verified and copied at a time: the second finds it in the cache of the core."""

_ELEMENT_ALIGNMENT = 16
"""Elements of every dtype may begin at multiples of this."""

_GROUP = 256
"""Pieces in one fused copy. PyTorch holds the GIL while it takes the arguments apart. A guess."""


def in_host_memory(tensor: torch.Tensor) -> torch.device | None:
    """Return that a tensor can be copied to without knowing of streams, wherever it is."""
    return None


class ReadTargets:
    """Which device each destination is on, and buffers for parts that are not read straight to their destinations.

    Args:
        workers: Make memory.
        device_of: Returns the device that a tensor is on, or None for host memory.
        copier: Brings values there, and follows the caller on each device already; None when there is no device.
        device: Any that is in use, to register memory with; None while there is none.
        pinning: Registers memory with accelerators, if they can do that.
    """

    def __init__(
        self,
        workers: Workers,
        device_of: Callable[[torch.Tensor], torch.device | None] = in_host_memory,
        copier: HostToDeviceCopier | None = None,
        device: torch.device | None = None,
        pinning: Pinning | None = None,
    ) -> None:
        self.device_of = device_of
        self.copier = copier
        self.device = device
        self._workers = workers
        self._pinning = pinning
        self._buffers: PartBuffers | None = None
        self._pool: Pool | None = None

    async def buffer(self, nbytes: int) -> np.ndarray[Any, Any]:
        """Return uninitialized memory for one part, which is used again when nothing refers to it any more.

        Args:
            nbytes: How long parts are; the same in each call.
        """
        if self.copier is None:
            if self._buffers is None:
                self._buffers = PartBuffers(nbytes)
            return self._buffers.take()
        if self._pool is None:
            self._pool = Pool(self._workers, pinning=self._pinning)
        return (await self._pool.acquire(nbytes, device=self.device)).buffer

    def close(self) -> None:
        """Make no more memory."""
        if self._pool is not None:
            self._pool.close()

    async def aclose(self) -> None:
        """Give the memory back. Raises as :meth:`Pool.aclose`."""
        if self._pool is not None:
            await self._pool.aclose()


class PartReader:
    """Reads parts, compares them with their digests, and brings them to where they belong.

    Args:
        reader: The reader of the checkpoint.
        workers: Run everything that blocks.
        part_bytes: How long a part is at most.
        targets: Where the tensors are that parts are read into.
        verify: Whether to compare parts with their digests.
        in_place: Whether live tensors are read into. What is not in the page cache is then read past it.
    """

    def __init__(
        self,
        reader: OpenCheckpoint,
        workers: Workers,
        part_bytes: int,
        targets: ReadTargets,
        *,
        verify: bool,
        in_place: bool = False,
    ) -> None:
        self._reader = reader
        self._workers = workers
        self._part_bytes = part_bytes
        self._targets = targets
        self._verify = verify
        self._in_place = in_place
        self._heads: dict[str, np.ndarray[Any, Any]] = {}
        self._cold: dict[str, frozenset[int]] = {}
        self._looking = anyio.Lock()
        # How much of each buffer was read into, by its address. A wrong answer costs time and nothing else.
        self._used: dict[int, int] = {}

    @property
    def at_once(self) -> int:
        """How many reads are under way at once."""
        return max(_AT_LEAST, min(self._reader.reads_at_once, _READ_AHEAD_BYTES // self._part_bytes))

    async def header(self, file: FileRecord) -> bytes:
        """Return the header of a safetensors file without the length before it, from parts that were verified.

        Raises:
            CheckpointCorruptError: If there can be none, a digest differs, or the file ends early.
            OSError: If the storage refuses.
        """
        if file.nbytes < HEADER_LENGTH_BYTES:
            raise CheckpointCorruptError(f"it is only {file.nbytes} bytes long.", path=self._path(file))
        if not self._verify:
            return await self._unverified_header(file)
        read = await self._reader.blocking(file.name)
        if read is not None and file.nbytes > _HEAD_BYTES:
            async with self._reader.deleted_or_corrupt():
                first = await self._workers.run(partial(self._read_head, read, file))
        else:
            first = await self._read_part(file, 0, read)
            # The first part has tensors behind the header; kept, it is not read a second time.
            if len(self._heads) < _HEADS:
                self._heads[file.name] = first
        memory, stop = first, self._end_of_header(file, first[:HEADER_LENGTH_BYTES].tobytes())
        pieces: list[bytes] = []
        for index, offset in enumerate(range(0, stop, self._part_bytes)):
            if index:
                memory = await self._read_part(file, index, read)
            start = 0 if index else HEADER_LENGTH_BYTES
            pieces.append(await self._workers.run(memory[start : stop - offset].tobytes))
        return await self._workers.run(partial(b"".join, pieces))

    def _read_head(self, read: BlockingRead, file: FileRecord) -> np.ndarray[Any, Any]:
        """Read and check the first part of a local file; return its share of the header. Blocks."""
        part = Part(0, 0, min(self._part_bytes, file.nbytes), [])
        running = running_digest()
        memory: np.ndarray[Any, Any] = np.empty(min(_GAP_BYTES, part.nbytes), np.uint8)
        read(0, memory.data, running.update)
        # The length is not checked before the digest is: a damaged one is reported as damage.
        stop = HEADER_LENGTH_BYTES + int.from_bytes(memory[:HEADER_LENGTH_BYTES].tobytes(), "little")
        head: np.ndarray[Any, Any] = np.empty(min(stop, part.nbytes), np.uint8)
        done = len(memory)
        head[:done] = memory[: len(head)]
        if len(head) > done:
            read(done, head[done:].data, running.update)
            done = len(head)
        # In the same memory: to fault in more took longer than these reads.
        self._read_gap(read, done, part.nbytes - done, running.update, memory.data)
        self._compare(file, part, running.hexdigest())
        return head

    async def _unverified_header(self, file: FileRecord) -> bytes:
        """Return a header after reading little more."""
        first = bytearray(min(_FIRST_BYTES, file.nbytes))
        await self._reader.read(file.name, 0, memoryview(first))
        stop = self._end_of_header(file, first[:HEADER_LENGTH_BYTES])
        rest = await self._workers.run(partial(bytearray, max(0, stop - len(first))))
        if rest:
            await self._reader.read(file.name, len(first), memoryview(rest))
        return await self._workers.run(partial(b"".join, (first[HEADER_LENGTH_BYTES:stop], rest)))

    def _end_of_header(self, file: FileRecord, length: bytes | bytearray) -> int:
        """Return where a header ends, from the length that is before it."""
        nbytes = int.from_bytes(length, "little")
        if nbytes > min(MAX_HEADER_BYTES, file.nbytes - HEADER_LENGTH_BYTES):
            raise CheckpointCorruptError(f"it says that its header is {nbytes} bytes long.", path=self._path(file))
        return HEADER_LENGTH_BYTES + nbytes

    def _path(self, file: FileRecord) -> str:
        """Return where a file is, for errors."""
        return f"{self._reader.location}/{file.name}"

    async def _read_part(self, file: FileRecord, index: int, read: BlockingRead | None) -> np.ndarray[Any, Any]:
        """Read a part of any kind, and return its bytes, which are not to be changed."""
        offset = index * self._part_bytes
        part = Part(index, offset, min(self._part_bytes, file.nbytes - offset), [])
        if read is None and self._targets.copier is None:
            data = await self._reader.get_range(file.name, part.offset, part.nbytes)
            if data is not None:
                await self._workers.run(partial(self._use, file, part, data, _nothing))
                return np.frombuffer(data, np.uint8)
        if self._targets.copier is None:
            # Ordinary pages: faulting in huge pages took 19 ms for 8 MiB, where a hypervisor had to find them first.
            memory: np.ndarray[Any, Any] = np.empty(part.nbytes, np.uint8)
        else:
            memory = (await self._targets.buffer(self._part_bytes))[: part.nbytes]
        await self._read(file, part, memory.data, _nothing)
        return memory

    async def receive(self, parts: Sequence[tuple[FileRecord, Part]], arrived: Callable[[int], object]) -> None:
        """Read parts into their places, several at once.

        Args:
            parts: Each with its file.
            arrived: Called on the event loop with the number of bytes that have come since the last call.

        Raises:
            CheckpointCorruptError: If a digest differs, or a file ends early; the places are then undefined.
            StagingError: If a device has failed.
            OSError: If the storage refuses.

        When cancelled, waits for what is being read and copied; the places are then undefined.
        """
        if not parts:
            return
        # One queue for all readers. They run in one loop, so that none needs a lock to take the next part.
        queue = deque(parts)
        await run_concurrently(*[partial(self._receive, queue, arrived)] * min(self.at_once, len(parts)))

    async def _past_cache(self, file: FileRecord, part: Part) -> LocalReader | None:
        """Return what reads a part past the page cache; None if it is better read through it.

        A file is looked at when its first part is due: those that were looked at long before are not open any more.
        """
        local = await self._reader.past_cache() if self._in_place and self._wants_all(part) else None
        if local is None:
            return None
        if file.name not in self._cold:
            # By one task alone: it opens the file for direct I/O, and a second one would find it locked by the first.
            # Another task may have looked while this one waited, hence the second check.
            async with self._looking:
                if file.name not in self._cold:
                    look = partial(local.cold_parts_blocking, file.name, self._part_bytes)
                    async with self._reader.deleted_or_corrupt():
                        self._cold[file.name] = frozenset(await self._workers.run(look))
        return local if part.index in self._cold[file.name] else None

    async def _read_cold(self, local: LocalReader, file: FileRecord, part: Part) -> None:
        """Read a part past the page cache. The storage's threads read the next ones while this one is used."""
        memory = await self._targets.buffer(self._part_bytes)
        whole = memory.data[: -(-part.nbytes // PART_ALIGNMENT) * PART_ALIGNMENT]
        address = address_of(memory.data)
        used = min(self._used.get(address, 0), len(whole))
        self._used[address] = max(self._used.get(address, 0), len(whole))
        async with self._reader.deleted_or_corrupt():
            await local.read_past_cache(file.name, part.offset, whole, used)
        copy = partial(self._copy, part, torch.from_numpy(memory))
        use = partial(self._use, file, part, memory.data[: part.nbytes], copy)
        await self._wait_until_copied(await self._workers.run(use))

    async def _receive(self, queue: deque[tuple[FileRecord, Part]], arrived: Callable[[int], object]) -> None:
        """Take one part after the other, until there is none left."""
        while queue:
            file, part = queue.popleft()
            head = self._heads.pop(file.name, None) if part.index == 0 else None
            read = await self._reader.blocking(file.name)
            data = single_piece(part)
            if head is not None:
                if head.flags.writeable:
                    copy = partial(self._copy, part, torch.from_numpy(head))
                else:
                    copy = partial(self._copy_range, part, head.data)
                await self._wait_until_copied(await self._workers.run(copy))
                del head, copy
            elif (local := await self._past_cache(file, part)) is not None:
                await self._read_cold(local, file, part)
            elif read is not None and self._goes_straight(part):
                parts = [part, *self._straight_after(queue, file)]
                async with self._reader.deleted_or_corrupt(), self._workers.job() as job:
                    job.put(partial(self._read_all_straight, job, read, file, parts))
                arrived(sum(each.nbytes for each in parts))
                continue
            elif read is None and self._can_copy_from_range(part) and await self._read_range(file, part):
                pass
            elif data is not None and self._targets.device_of(data) is None:
                await self._read(file, part, data.numpy().data, _nothing)
            else:
                memory = await self._targets.buffer(self._part_bytes)
                copy = partial(self._copy, part, torch.from_numpy(memory))
                await self._wait_until_copied(await self._read(file, part, memory.data[: part.nbytes], copy))
                # The buffer is used again for another part as soon as nothing refers to it.
                del memory, copy
            # After the copy: bytes that are reported are at their destination.
            arrived(part.nbytes)

    def _can_copy_from_range(self, part: Part) -> bool:
        """Return whether a part is copied from ordinary memory as well as from a buffer of this reader."""
        # Devices copy from registered memory.
        return self._targets.copier is None or self._goes_straight(part)

    async def _read_range(self, file: FileRecord, part: Part) -> bool:
        """Read a part, and copy it from where the storage has put it; return whether the storage can do that."""
        # In a list, for the thread to take out, so that the memory is freed there: that holds a thread for some time.
        found = [await self._reader.get_range(file.name, part.offset, part.nbytes)]
        if found[0] is None:
            return False
        await self._workers.run(partial(self._use_range, file, part, cast("list[Buffer]", found)))
        return True

    def _use_range(self, file: FileRecord, part: Part, found: list[Buffer]) -> None:
        """Check a part and copy it from memory of the storage. Runs in a worker thread."""
        data = found.pop()
        if self._goes_straight(part):
            self._copy_straight(file, part, data)
        else:
            self._use(file, part, data, partial(self._copy_range, part, data))

    def _copy_range(self, part: Part, data: Buffer) -> list[PendingCopy]:
        """Copy pieces out of memory of the storage; see :meth:`_copy`."""
        return self._copy(part, _tensor_over(data))

    def _copy_straight(self, file: FileRecord, part: Part, data: Buffer) -> None:
        """Copy each piece to where it belongs, a little at a time, and check it meanwhile. Runs in a worker thread."""
        running, offset = running_digest() if self._verify else None, 0
        for piece in part.pieces:
            for start in range(0, piece.nbytes, _BLOCK_BYTES):
                stop = min(start + _BLOCK_BYTES, piece.nbytes)
                block = data[offset + start : offset + stop]
                if running is not None:
                    running.update(block)
                if isinstance(piece, torch.Tensor):
                    if not self._in_place:
                        # New memory. A fault for each page takes a third longer, with the copy.
                        address = piece.data_ptr()
                        first = (address + start) // PAGE_BYTES * PAGE_BYTES
                        populate(first, whole_pages(address + stop) - first)
                    np.copyto(piece.numpy()[start:stop], np.frombuffer(block, np.uint8))
            offset += piece.nbytes
        if running is not None:
            self._compare(file, part, running.hexdigest())

    def _wants_all(self, part: Part) -> bool:
        """Return whether every byte of a part is used or verified."""
        return self._verify or not any(isinstance(piece, Gap) for piece in part.pieces)

    # Bytes are written to their destination before their digest is known. That is allowed because a load that fails
    # returns no new tree, and a live tree is read into only with in_place=True, which promises nothing after an error.
    def _goes_straight(self, part: Part) -> bool:
        """Return whether a part consists of few pieces, all of them in host memory or without a destination."""
        return len(part.pieces) <= _STRAIGHT and all(
            isinstance(piece, Gap) or (isinstance(piece, torch.Tensor) and self._targets.device_of(piece) is None)
            for piece in part.pieces
        )

    def _straight_after(self, queue: deque[tuple[FileRecord, Part]], file: FileRecord) -> Iterator[Part]:
        """Take parts out of a queue that are read as the one before them, of the same file."""
        cold = self._cold.get(file.name) if self._in_place else frozenset()
        if cold is None:
            # The first part need not be looked at, and those after it are when they are due.
            return
        for _ in range(min(_AT_A_TURN_BYTES // self._part_bytes - 1, len(queue) // (2 * THREADS))):
            if not queue or queue[0][0] is not file:
                return
            part = queue[0][1]
            if part.index in cold or not self._goes_straight(part):
                return
            queue.popleft()
            yield part

    def _read_all_straight(self, job: Job, read: BlockingRead, file: FileRecord, parts: Sequence[Part]) -> None:
        """Read parts one after the other, until the job is cancelled. Runs in a worker thread."""
        for part in parts:
            if job.cancelled:
                return
            self._read_straight(read, file, part)

    def _read_straight(self, read: BlockingRead, file: FileRecord, part: Part) -> None:
        """Read each piece to where it belongs, and check it while it is hot. Runs in a worker thread."""
        offset, running = part.offset, running_digest() if self._verify else None
        update = None if running is None else running.update
        for piece in part.pieces:
            if isinstance(piece, torch.Tensor):
                read(offset, piece.numpy().data, update)
            elif update is not None:
                memory: np.ndarray[Any, Any] = np.empty(min(piece.nbytes, _GAP_BYTES), np.uint8)
                self._read_gap(read, offset, piece.nbytes, update, memory.data)
            offset += piece.nbytes
        if running is not None:
            self._compare(file, part, running.hexdigest())

    def _read_gap(
        self, read: BlockingRead, offset: int, nbytes: int, update: Callable[[Buffer], object], memory: Buffer
    ) -> None:
        """Read bytes for their digest alone, into memory that is used over and over. Runs in a worker thread."""
        for start in range(0, nbytes, len(memory)):
            read(offset + start, memory[: nbytes - start], update)

    async def _read(self, file: FileRecord, part: Part, buffer: Buffer, then: Callable[[], T]) -> T:
        """Read a part into one buffer, and check and use it in a worker thread: that which has read it, if one has."""
        read = await self._reader.blocking(file.name)
        if read is None:
            await self._reader.read(file.name, part.offset, buffer)
            return await self._workers.run(partial(self._use, file, part, buffer, then))
        async with self._reader.deleted_or_corrupt():
            return await self._workers.run(partial(self._read_and_use, read, file, part, buffer, then))

    def _read_and_use(
        self, read: BlockingRead, file: FileRecord, part: Part, buffer: Buffer, then: Callable[[], T]
    ) -> T:
        read(part.offset, buffer, None)
        return self._use(file, part, buffer, then)

    def _use(self, file: FileRecord, part: Part, buffer: Buffer, then: Callable[[], T]) -> T:
        if self._verify:
            with span("digest", nbytes=part.nbytes):
                found = digest(buffer)
            self._compare(file, part, found)
        return then()

    def _compare(self, file: FileRecord, part: Part, found: str) -> None:
        if found != file.digests[part.index]:
            raise CheckpointCorruptError(
                f"bytes {part.offset} to {part.offset + part.nbytes} do not match their checksum.",
                path=self._path(file),
            )

    async def _wait_until_copied(self, pending: Sequence[PendingCopy]) -> None:
        copier = self._targets.copier
        if copier is None:
            return

        async def wait() -> None:
            for copy in pending:
                await copier.wait(copy)

        # Shielded: once this has returned or raised, no device may change a live tensor or read a buffer any more.
        await finish(wait)

    def _device_of(self, piece: object) -> torch.device | None:
        if isinstance(piece, Scattered):
            return self._targets.device_of(piece.tensor)
        return self._targets.device_of(piece) if isinstance(piece, torch.Tensor) else None

    def _copy(self, part: Part, buffer: torch.Tensor) -> list[PendingCopy]:
        """Copy pieces wherever they belong; returns what devices are still doing. Runs in a worker thread."""
        copier = self._targets.copier
        if copier is None and not any(isinstance(piece, Scattered) for piece in part.pieces):
            scatter(part, buffer)
            return []
        pending: list[PendingCopy] = []
        for device, places, values in _batches(part, buffer, self._device_of):
            if device is None or copier is None:
                copy_tensors(places, values)
            else:
                pending.append(copier.enqueue(TensorCopy(places, values, device)))
        return pending


def _batches(
    part: Part, buffer: torch.Tensor, device_of: Callable[[object], torch.device | None]
) -> Iterator[tuple[torch.device | None, list[torch.Tensor], list[torch.Tensor]]]:
    """Group the pieces of a part by device, each with its bytes in a buffer."""
    position = 0
    places: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    current: torch.device | None = None
    for piece in part.pieces:
        memory = buffer[position : position + piece.nbytes]
        position += piece.nbytes
        device = device_of(piece)
        if places and (device != current or len(places) >= _GROUP):
            yield current, places, values
            places, values = [], []
        current = device
        if isinstance(piece, Scattered):
            for block, elements in piece.blocks(memory):
                places.append(block)
                values.append(elements)
        elif isinstance(piece, torch.Tensor):
            places.append(piece)
            values.append(memory)
    if places:
        yield current, places, values


def _tensor_over(data: Buffer) -> torch.Tensor:
    """Return a part that a storage has read as a tensor, which is not to be written to."""
    address = address_of(data)
    if address % _ELEMENT_ALIGNMENT:
        # Elements may be copied by their dtype, at addresses that fit it.
        return torch.from_numpy(np.array(np.frombuffer(data, np.uint8)))
    # Not by torch.from_numpy(), which warns of memory that is read-only.
    return memory_of(address, data.nbytes, data)


def _nothing() -> None:
    """Leave a part where it was read to."""
