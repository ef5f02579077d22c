"""Plans the files of one checkpoint, sends them to a pending checkpoint part by part, and commits it.

Bytes may be sent while the copy is still being taken. The manifest and the commit come last, after the capture, so that
a torn copy never becomes a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aiostage._arguments import check_flags, require_int
from aiostage._capture.plan import overlapping
from aiostage._loop.coroutines import RarerCollections, finish
from aiostage._loop.workers import Workers, empty_in_steps, releasing_gil
from aiostage.abc import Buffer, PendingCheckpoint
from aiostage.checkpoint.progress import SaveProgress
from aiostage.checkpoint.window_parts import collect
from aiostage.errors import CheckpointError, HostMemoryError
from aiostage.format.encode import TreeEncoder, ValuesNeeded
from aiostage.format.layout import INDEX_NAME, file_tensors, index_content, measure, tensor_files
from aiostage.format.manifest import MAX_NODES_BYTES, FileRecord, too_large, write_manifest
from aiostage.format.parts import (
    DIGEST_NAME,
    PART_BYTES,
    Content,
    Part,
    cut,
    digest,
    digest_of_parts,
    gather,
    memory_range,
    single_piece,
)
from aiostage.observe import span
from aiostage.snapshot import Snapshot
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.files import PartBuffers

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "CheckpointInfo",
    "CheckpointWriter",
    "FileOptions",
    "PartWriter",
    "file_options",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What was saved.

    Attributes:
        location: Where it is: an absolute path, or a URL.
        nbytes: Size of the tensors, in bytes; memory that several leaves share counts once.
        leaves: How many tensors the tree has.
        written_bytes: Size of the files that were written, in bytes. If only what has changed was written, it may be
            far less than ``nbytes``.
        files: The names of all files, the manifest last.
        checksums: For each file the digest of its parts' digests, or of itself if it has one part only, for example
            ``"xxh3_64:0123456789abcdef"``.
        captured: Seconds from the call until the source could be changed again.
        committed: Seconds from the call until the checkpoint was complete and safe on the disk.
    """

    location: str
    nbytes: int
    leaves: int
    written_bytes: int
    files: tuple[str, ...]
    checksums: Mapping[str, str]
    captured: float
    committed: float

    @property
    def path(self) -> Path:
        """The directory, of a checkpoint on a local disk.

        Raises:
            ValueError: If it is elsewhere.
        """
        if "://" in self.location:
            raise ValueError(f"{self.location} is not on a local disk and has no path")
        return Path(self.location)


_THREADS = 1
"""For gathering and digests. One keeps up with any storage. With more threads than idle cores, an event loop that is
woken waits longer for a core; on two cores, no save ended sooner with two threads."""


@dataclass(frozen=True, slots=True)
class _FilePlan:
    """What is to be written.

    Attributes:
        nbytes: Size of the tensors, in bytes.
        leaves: How many tensors the tree has.
        files: Names and contents, all but the manifest.
        nodes: The tree, as lines of the manifest.
    """

    nbytes: int
    leaves: int
    files: Sequence[tuple[str, Sequence[Content]]]
    nodes: list[str]


DEFAULT_SHARD_BYTES = 5 * 10**9
"""5 GB: what hubs and file systems take without special care."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """How the tensors of a tree are laid out in files.

    Attributes:
        max_shard_bytes: How many bytes of tensors one file may hold.
        duplicate_tied: Whether files have tied tensors under each of their names.
    """

    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    duplicate_tied: bool = False


def file_options(*, max_shard_bytes: int, duplicate_tied: bool) -> FileOptions:
    """Return options that a caller has given, once they are checked.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If ``max_shard_bytes`` is not above 0.
    """
    check_flags(duplicate_tied=duplicate_tied)
    max_shard_bytes = require_int("max_shard_bytes", max_shard_bytes, least=1)
    return FileOptions(max_shard_bytes=max_shard_bytes, duplicate_tied=duplicate_tied)


class CheckpointWriter:
    """Writes one checkpoint: :meth:`plan`, which refuses what files cannot carry, then :meth:`write`.

    Args:
        name: What it is called, for reports of the progress.
        options: How the tensors are laid out in files.
    """

    def __init__(self, name: str, options: FileOptions) -> None:
        self._name = name
        self._options = options
        self._progress: Callable[[SaveProgress], object] | None = None
        self._workers = Workers(_THREADS, "aiostage-save", prepare=torch.get_num_threads)
        self._buffers = PartBuffers(PART_BYTES)
        self._written = self._total = 0
        self._snapshot: Snapshot[Any] | None = None
        self._plan = _FilePlan(0, 0, [], [])
        self._encoder: TreeEncoder | None = None

    async def plan(self, staged: Any, snapshot: Snapshot[Any] | None = None) -> None:
        """Decide what goes into which file. Nothing is written.

        Args:
            staged: In host memory; does not change until :meth:`write` returns.
            snapshot: Whose outline the tree is; its bytes are then written as they are copied. None if all are there.

        Raises:
            UnsupportedLeafError: If something cannot be carried.
            CheckpointError: If what is not a tensor is too large.
            HostMemoryError: If the bytes of the snapshot pass in an order that no file can have.
            TornSnapshotError: If the source of the snapshot changed before it was captured.

        Cancelling changes nothing.
        """
        self._snapshot = snapshot
        with span("layout"), RarerCollections():
            # The modes of the calling thread. A function of a registered class may change tensors, and those that were
            # staged in inference mode can be changed only in that mode.
            modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
            there = snapshot is None or snapshot.is_captured
            encoder = TreeEncoder(values_are_there=there, notes_places=self._options.duplicate_tied)
            try:
                await self._workers.run(partial(_walk, encoder, staged, modes))
            # An object whose registered function looks at values: the outline has none yet, so the walk is made again
            # over the captured tree.
            except ValuesNeeded:
                encoder = TreeEncoder(notes_places=self._options.duplicate_tied)
                await self._workers.run(partial(_walk, encoder, await _captured(snapshot), modes))
            self._encoder = encoder
            self._plan = await self._workers.run(partial(self._planned, encoder))

    async def write(
        self, pending: PendingCheckpoint, progress: Callable[[SaveProgress], object] | None = None
    ) -> CheckpointInfo:
        """Write what was planned and commit it.

        Args:
            pending: Where. It is the caller's to abort it if this raises.
            progress: Called on the event loop as parts are written.

        Returns:
            What was written, without times.

        Raises:
            TornSnapshotError: If the source of the snapshot changed before it was captured.
            CheckpointExistsError: If something has appeared at the target meanwhile.
            OSError: If the storage refuses.

        May be cancelled: then either everything was committed already, or nothing of it can be seen.
        """
        plan, snapshot, self._progress = self._plan, self._snapshot, progress
        self._total = await self._workers.run(partial(_total_bytes, plan))
        records: list[FileRecord] = []
        for name, contents in plan.files:
            file = PartWriter(
                name,
                await self._workers.run(partial(cut, contents, PART_BYTES)),
                workers=self._workers,
                buffers=self._buffers,
                snapshot=snapshot,
                sent=self._sent,
            )
            # One file after the other, because a window shows its bytes in this order only. Within a file, the storage
            # has several parts under way.
            records.append(await file.send(pending))
        manifest, digests = await self._workers.run(partial(_manifest, plan, records))
        if snapshot is not None:
            if snapshot.window is not None:
                # Bytes of the window that no file contains, such as gaps. The copy waits until they are taken.
                snapshot.window.pass_by(len(snapshot.window.chunks))
            await snapshot.captured()
        # After the capture, because only that shows whether the source has changed: a torn copy is never committed.
        with span("commit"):
            await pending.commit(manifest)
        records.append(FileRecord(MANIFEST_NAME, len(manifest), digests))
        return CheckpointInfo(
            location=pending.location,
            nbytes=plan.nbytes,
            leaves=plan.leaves,
            written_bytes=sum(file.nbytes for file in records),
            files=tuple(file.name for file in records),
            checksums={file.name: f"{DIGEST_NAME}:{digest_of_parts(file.digests)}" for file in records},
            captured=0.0,
            committed=0.0,
        )

    async def aclose(self) -> None:
        """Drop the tree in a thread, where a large one takes no time of the event loop, and let the threads end.

        A cancellation is delivered when that is done.
        """
        # Taken out of self, so that this frame holds the last references while a thread empties the containers.
        files, self._plan = self._plan.files, _FilePlan(0, 0, [], [])
        encoder, self._encoder = self._encoder, None
        self._snapshot = None
        containers: list[list[Any] | dict[Any, Any]] = []
        if encoder is not None:
            containers += await finish(partial(self._workers.run, encoder.containers))
            del encoder
        containers += (contents for _, contents in files if isinstance(contents, list))
        await finish(partial(self._workers.run, partial(empty_in_steps, containers)))
        self.close()

    def close(self) -> None:
        """Let the threads end, and drop the tree at once."""
        self._workers.stop()
        self._snapshot = self._encoder = None
        self._plan = _FilePlan(0, 0, [], [])

    def _planned(self, encoder: TreeEncoder) -> _FilePlan:
        """Return the files for a tree that was walked. Blocks."""
        snapshot = self._snapshot
        leaves, starts, stops = measure(encoder.tensors)
        tensors = file_tensors(leaves, overlapping(starts, stops), encoder.other_places)
        shards = tensor_files(
            tensors,
            self._options.max_shard_bytes,
            snapshot.memory if snapshot is not None else None,
            in_order=snapshot is not None and snapshot.window is not None,
        )
        files = [(shard.name, shard.contents) for shard in shards]
        if len(shards) > 1:
            files.append((INDEX_NAME, index_content(shards)))
        nbytes = sum(tensor.nbytes for tensor in tensors if not tensor.is_copy)
        return _FilePlan(nbytes, len(encoder.tensors), files, _fitting(encoder.lines()))

    def _sent(self, nbytes: int) -> None:
        """Report progress."""
        self._written += nbytes
        if self._progress is not None:
            everything = self._snapshot is None or self._snapshot.is_captured
            self._progress(
                SaveProgress(
                    name=self._name,
                    total_bytes=self._total,
                    staged_bytes=self._total if everything else self._written,
                    written_bytes=self._written,
                )
            )


def _total_bytes(plan: _FilePlan) -> int:
    """Return the size of all files but the manifest. Blocks."""
    return sum(content.nbytes for _, contents in plan.files for content in releasing_gil(contents))


def _walk(encoder: TreeEncoder, staged: Any, modes: tuple[bool, bool]) -> None:
    """Find every node, in the caller's modes: of inference, and whether operations are recorded. Blocks."""
    inference, gradients = modes
    with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
        encoder.walk(staged)


async def _captured(snapshot: Snapshot[Any] | None) -> Any:
    """Return the tree of a snapshot whose tensors have their values."""
    assert snapshot is not None  # noqa: S101 - without one they are there
    if snapshot.window is not None:
        raise HostMemoryError(
            "objects of registered classes are taken apart by functions that may look at all of their tensors at once.",
            remedy="Raise max_host_bytes so that the whole copy fits twice.",
        )
    return await snapshot.result()


def _fitting(lines: Iterable[str]) -> list[str]:
    """Collect the lines of a manifest, and refuse more than one may have."""
    found: list[str] = []
    nbytes = 0
    for line in releasing_gil(lines):
        nbytes += len(line) + 2
        if nbytes > MAX_NODES_BYTES:
            raise too_large()
        found.append(line)
    return found


def _manifest(plan: _FilePlan, files: Sequence[FileRecord]) -> tuple[memoryview, tuple[str, ...]]:
    """Return the manifest of what was written, and the digests of its parts. Blocks."""
    data = memoryview(
        write_manifest(nbytes=plan.nbytes, leaves=plan.leaves, part_bytes=PART_BYTES, files=files, nodes=plan.nodes)
    )
    starts = range(0, max(len(data), 1), PART_BYTES)
    return data, tuple(digest(data[start : start + PART_BYTES]) for start in starts)


class PartWriter:
    """Sends one file. An asynchronous iterator over its parts, for the storage to ask for them.

    Args:
        name: The name of the file.
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
        """Whether a part may be kept while the next ones are asked for.

        Not with a window: the copy waits for the memory of earlier parts, so later ones would never come. Incremental
        saves ask for this by name, because a storage sees an iterator only.
        """
        return self._snapshot is None or self._snapshot.window is None

    async def send(self, pending: PendingCheckpoint) -> FileRecord:
        """Write the file to a pending checkpoint.

        Returns:
            What was written.

        Raises:
            CheckpointError: If the storage did not ask for all of it.
            OSError: If the storage refuses.

        When cancelled, nothing refers to the parts any more.
        """
        async with self._digesting:
            with span("write", file=self.name, nbytes=self.nbytes, parts=len(self._parts)):
                await pending.write(self.name, self.nbytes, self)
        # A storage of a user may stop early. Without this check the checkpoint would be committed without some bytes.
        if self._next != len(self._parts):
            raise CheckpointError(
                f"the storage took {self._next} of {len(self._parts)} parts of {self.name} and reported success.",
                path=pending.location,
            )
        self._report()
        return FileRecord(self.name, self.nbytes, tuple(self._digests))

    def __aiter__(self) -> PartWriter:
        """Return self: a file is sent once."""
        return self

    async def __anext__(self) -> Buffer:
        """Return the next part, once it is there."""
        self._report()
        if self._next == len(self._parts):
            raise StopAsyncIteration
        part = self._parts[self._next]
        snapshot = self._snapshot
        if snapshot is not None and snapshot.window is not None:
            data = await collect(part, snapshot, snapshot.window, buffers=self._buffers, workers=self._workers)
        else:
            if snapshot is not None:
                for piece in part.pieces:
                    await snapshot.copied(*memory_range(piece))
            memory = single_piece(part)
            # A part in one piece is sent from where it was staged to, without a copy.
            data = memory.numpy().data if memory is not None else await self._workers.run(partial(self._gather, part))
        # Counted when it is handed over. The storage may ask for the next part while it still writes this one, also
        # from another task, so nothing is awaited between this and the return.
        self._next += 1
        # The digest is computed beside the write, while the bytes are still in the cache. send() waits for it.
        self._digesting.put(partial(self._digest, part.index, data))
        return data

    def _report(self) -> None:
        """Report the part that was handed over last, once the storage asks for the next one or has ended."""
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
