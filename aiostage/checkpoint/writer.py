"""Writing a staged tree: first everything that may be refused, then the files, then the commit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiostage._loop.slices import Slices
from aiostage._loop.workers import Workers
from aiostage.abc import Draft
from aiostage.checkpoint.buffers import PartBuffers
from aiostage.checkpoint.info import CheckpointInfo
from aiostage.checkpoint.outgoing import OutgoingFile
from aiostage.checkpoint.progress import SaveProgress
from aiostage.errors import HostMemoryError
from aiostage.format.encode import TreeEncoder, ValuesNeeded
from aiostage.format.layout import INDEX_NAME, FileTensor, file_tensors, groups, index_content, measure, tensor_files
from aiostage.format.manifest import MAX_NODES_BYTES, FileRecord, too_large, write_manifest
from aiostage.format.parts import DIGEST_NAME, PART_BYTES, Content, cut, digest, digest_of_parts
from aiostage.observe import span
from aiostage.snapshot import Snapshot
from aiostage.storage.commit import MANIFEST_NAME

__all__ = ["MAX_HOLD", "CheckpointWriter"]

MAX_HOLD = 0.001
"""How long preparations may hold the event loop at a time, in seconds."""

_THREADS = 1
"""For gathering and digests. One keeps up with any storage, and the more threads compute where the cores are few, the
longer an event loop that was woken waits for one: measured on two, with two threads no save ended sooner."""

_LINES_AT_ONCE = 64


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


class CheckpointWriter:
    """Writes one checkpoint: :meth:`plan`, which refuses what files cannot carry, then :meth:`write`.

    Args:
        name: What it is called, for reports of the progress.
        max_shard_bytes: How many bytes of tensors one file may hold.
    """

    def __init__(self, name: str, *, max_shard_bytes: int) -> None:
        self._name = name
        self._max_shard_bytes = max_shard_bytes
        self._progress: Callable[[SaveProgress], object] | None = None
        self._workers = Workers(_THREADS, "aiostage-save")
        self._slices = Slices(MAX_HOLD)
        self._buffers = PartBuffers(PART_BYTES)
        self._written = self._total = 0
        self._snapshot: Snapshot[Any] | None = None
        self._plan = _FilePlan(0, 0, [], [])

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
        with span("layout"):
            try:
                encoder = TreeEncoder(values_are_there=snapshot is None or snapshot.is_captured)
                await self._slices.run(encoder.walk(staged))
            except ValuesNeeded:
                encoder = TreeEncoder()
                await self._slices.run(encoder.walk(await _captured(snapshot)))
            tensors = await self._file_tensors(encoder)
            shards = await self._slices.run(
                tensor_files(
                    tensors,
                    self._max_shard_bytes,
                    snapshot.memory if snapshot is not None else None,
                    in_order=snapshot is not None and snapshot.window is not None,
                )
            )
            files = [(shard.name, shard.contents) for shard in shards]
            if len(shards) > 1:
                files.append((INDEX_NAME, await self._slices.run(index_content(shards))))
            nodes = await self._slices.run(_fitting(encoder.lines()))
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self._plan = _FilePlan(nbytes, len(encoder.tensors), files, nodes)

    async def write(self, draft: Draft, progress: Callable[[SaveProgress], object] | None = None) -> CheckpointInfo:
        """Write what was planned and commit it.

        Args:
            draft: Where. It is the caller's to abort it if this raises.
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
        self._total = sum(content.nbytes for _, contents in plan.files for content in contents)
        records = [await self._send(name, contents, draft) for name, contents in plan.files]
        manifest = memoryview(
            await self._slices.run(
                write_manifest(
                    nbytes=plan.nbytes, leaves=plan.leaves, part_bytes=PART_BYTES, files=records, nodes=plan.nodes
                )
            )
        )
        digests = await self._workers.run(partial(_digests, manifest))
        if snapshot is not None:
            if snapshot.window is not None:
                # No other writer will take what no file has asked for.
                snapshot.window.pass_by(len(snapshot.window.chunks))
            await snapshot.captured()
        with span("commit"):
            await draft.commit(manifest)
        records.append(FileRecord(MANIFEST_NAME, len(manifest), digests))
        return CheckpointInfo(
            location=draft.location,
            nbytes=plan.nbytes,
            leaves=plan.leaves,
            written_bytes=sum(file.nbytes for file in records),
            files=tuple(file.name for file in records),
            checksums={file.name: f"{DIGEST_NAME}:{digest_of_parts(file.digests)}" for file in records},
            captured=0.0,
            committed=0.0,
        )

    def close(self) -> None:
        """Let the threads end, and drop the tree."""
        self._workers.stop()
        self._snapshot = None
        self._plan = _FilePlan(0, 0, [], [])

    async def _file_tensors(self, encoder: TreeEncoder) -> list[FileTensor]:
        """Decide what goes into files for the tree's tensors."""
        leaves, starts, stops = await self._slices.run(measure(encoder.tensors))
        overlapping = await self._workers.run(partial(groups, starts, stops))
        return await self._slices.run(file_tensors(leaves, overlapping))

    async def _send(self, name: str, contents: Sequence[Content], draft: Draft) -> FileRecord:
        file = OutgoingFile(
            name,
            await self._slices.run(cut(contents, PART_BYTES)),
            workers=self._workers,
            buffers=self._buffers,
            snapshot=self._snapshot,
            sent=self._sent,
        )
        return await file.send(draft)

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


async def _captured(snapshot: Snapshot[Any] | None) -> Any:
    """Return the tree of a snapshot whose tensors have their values."""
    assert snapshot is not None  # noqa: S101 - without one they are there
    if snapshot.window is not None:
        raise HostMemoryError(
            "objects of registered classes are taken apart by functions that may look at all of their tensors at once.",
            remedy="Raise max_host_bytes so that the whole copy fits twice.",
        )
    return await snapshot.result()


def _fitting(lines: Iterable[str]) -> Generator[None, None, list[str]]:
    """Collect the lines of a manifest, and refuse more than one may have; yielding now and then."""
    found: list[str] = []
    nbytes = 0
    for line in lines:
        nbytes += len(line) + 2
        if nbytes > MAX_NODES_BYTES:
            raise too_large()
        found.append(line)
        if len(found) % _LINES_AT_ONCE == 0:
            yield
    return found


def _digests(data: memoryview) -> tuple[str, ...]:
    return tuple(digest(data[start : start + PART_BYTES]) for start in range(0, max(len(data), 1), PART_BYTES))
