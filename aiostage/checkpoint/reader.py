"""A committed checkpoint that is being read: what it consists of, which parts of its files are needed, and its tree.

:class:`OpenCheckpoint` finds bytes, wherever they lie, and tells a checkpoint that was deleted meanwhile from a damaged
one. :class:`CheckpointReader` makes a tree of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from aiostage._loop.coroutines import RarerCollections, run_concurrently
from aiostage._loop.workers import Workers, releasing_gil
from aiostage.abc import Buffer, Reader, Storage
from aiostage.checkpoint.part_reader import BlockingRead, PartReader, ReadTargets
from aiostage.checkpoint.selection import Selection
from aiostage.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError, shown
from aiostage.format.classes import Classes
from aiostage.format.decode import Memory, TreeDecoder
from aiostage.format.manifest import FileRecord, Manifest, read_manifest
from aiostage.format.nodes import NodeTable, reading
from aiostage.format.parts import Content, Gap, Part, cut
from aiostage.format.placement import Placement
from aiostage.format.safetensors import HEADER_LENGTH_BYTES, TensorRecord, read_header
from aiostage.format.standard_kinds import read_zones
from aiostage.incremental.reading import ReferencedFiles, is_removed
from aiostage.incremental.references import placement_in
from aiostage.observe import span
from aiostage.storage.bucket import RangeReader
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.local import LocalReader
from aiostage.storage.locate import removed_by_tombstone

__all__ = ["CheckpointReader", "FileOutline", "OpenCheckpoint", "Outline", "open_checkpoint"]

_SUFFIX = ".safetensors"


_REMOVED = "it was removed; other checkpoints still refer to its files."


class OpenCheckpoint(Reader):
    """A reader of a checkpoint, which may refer to other checkpoints of the same storage.

    Args:
        storage: Where they are.
        name: The name of the checkpoint.
        reader: The reader of the checkpoint; closed with this.
        refuses_removed: Whether one that was removed, and lies there for others, is not to be found.
    """

    def __init__(self, storage: Storage, name: str, reader: Reader, *, refuses_removed: bool = True) -> None:
        self._storage = storage
        self._name = name
        self._reader = reader
        self._files: Reader | ReferencedFiles = reader
        self._refuses_removed = refuses_removed
        self._placement: Placement | None = None
        self._is_known = False

    @property
    def location(self) -> str:
        """Where the checkpoint is."""
        return self._reader.location

    @property
    def reads_at_once(self) -> int:
        """As many as the reader of the checkpoint likes."""
        return self._reader.reads_at_once

    async def manifest(self) -> Buffer:
        """Return the contents of the manifest, which need not be one.

        Raises:
            OSError: If the storage refuses.
        """
        return await self._reader.manifest()

    async def open(self, workers: Workers, add_node: Callable[[Any], object]) -> Manifest:
        """Read the manifest, and find out where the files lie. It is read and checked once.

        Args:
            workers: Do that.
            add_node: As for :func:`~aiostage.format.manifest.read_manifest`.

        Raises:
            CheckpointCorruptError: If it is anything but a manifest.
            CheckpointNotFoundError: If the checkpoint was removed, and lies there only because others refer to it.
            OSError: If the storage refuses.
        """
        async with self.deleted_or_corrupt():
            text = await self.manifest()
            reading = partial(read_manifest, text, path=self._path(MANIFEST_NAME), add_node=add_node)
            manifest = await workers.run(reading)
        await self._use(manifest.placement)
        return manifest

    async def placement(self) -> Placement | None:
        """Return where the files lie; None if each lies as a whole in the checkpoint. Raises as :meth:`open`."""
        if not self._is_known:
            async with self.deleted_or_corrupt():
                placement = await placement_in(self._reader)
            await self._use(placement)
        return self._placement

    async def _use(self, placement: Placement | None) -> None:
        # Only an incremental checkpoint is removed in steps. A plain one saves a request for a tombstone that cannot
        # be.
        if placement is not None and self._refuses_removed:
            await refuse_removed(self._storage, self._name, self.location)
        # Several callers may come here at once, each after an await of its own. The first one decides; another reader
        # of references would never be closed.
        if not self._is_known:
            if placement is not None:
                self._files = ReferencedFiles(self._storage, self._reader, placement)
            self._placement, self._is_known = placement, True

    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes. Raises as :meth:`read`."""
        await self.placement()
        async with self.deleted_or_corrupt():
            return await self._files.size(name)

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a buffer with a range of a file, wherever it lies.

        Raises:
            CheckpointCorruptError: If there is no such file, it ends early, or what it refers to is missing.
            CheckpointNotFoundError: If the checkpoint was removed meanwhile.
            OSError: If the storage refuses.
        """
        await self.placement()
        async with self.deleted_or_corrupt():
            await self._files.read(name, offset, into)

    async def get_range(self, name: str, offset: int, nbytes: int) -> Buffer | None:
        """Return a range of a file in memory of the storage, where it has it; None if only :meth:`read` can.

        Raises as :meth:`read`.
        """
        await self.placement()
        if not isinstance(self._files, RangeReader):
            return None
        async with self.deleted_or_corrupt():
            return await self._files.get_range(name, offset, nbytes)

    async def blocking(self, name: str) -> BlockingRead | None:
        """Return what reads a range of a file in the calling thread, to be used within :meth:`deleted_or_corrupt`.

        None if only :meth:`read` can. Raises as :meth:`manifest`.
        """
        await self.placement()
        return partial(self._files.read_blocking, name) if isinstance(self._files, LocalReader) else None

    async def past_cache(self) -> LocalReader | None:
        """Return what reads files past the page cache, to be used within :meth:`deleted_or_corrupt`; None if nothing.

        Raises as :meth:`manifest`.
        """
        await self.placement()
        return self._files if isinstance(self._files, LocalReader) else None

    @asynccontextmanager
    async def deleted_or_corrupt(self) -> AsyncGenerator[None, None]:
        """Raise CheckpointNotFoundError instead of CheckpointCorruptError if the checkpoint was deleted meanwhile."""
        try:
            yield
        except CheckpointCorruptError as error:
            # A missing or short file is what a removal leaves on its way. So the checkpoint is looked for again, which
            # costs requests only after an error.
            if self._refuses_removed:
                try:
                    await (await open_checkpoint(self._storage, self._name)).aclose()
                    await refuse_removed(self._storage, self._name, self.location)
                except CheckpointNotFoundError as gone:
                    raise gone from error
            raise

    async def modified(self) -> float | None:
        """Return when the checkpoint was committed, if its storage knows."""
        return await self._reader.modified()

    async def aclose(self) -> None:
        """Close it, and the checkpoints that it refers to. May be called more than once."""
        await self._files.aclose()

    def _path(self, name: str) -> str:
        return f"{self.location}/{name}"


async def open_checkpoint(storage: Storage, name: str) -> OpenCheckpoint:
    """Open a checkpoint, wherever its bytes lie.

    Whether it was removed is found out with its manifest: by :meth:`OpenCheckpoint.open` or ``placement``.

    Raises:
        CheckpointNotFoundError: If there is none.
        OSError: If the storage refuses.
    """
    if removed_by_tombstone(name.rpartition("/")[2]) is not None:
        raise CheckpointNotFoundError(_REMOVED, path=f"{storage.location}/{name}")
    return OpenCheckpoint(storage, name, await storage.read(name))


async def refuse_removed(storage: Storage, name: str, location: str) -> None:
    """Raise a CheckpointNotFoundError if a checkpoint was removed, and lies there only because others refer to it.

    Raises:
        CheckpointNotFoundError: If so.
        OSError: If the storage refuses.
    """
    if await is_removed(storage, name):
        raise CheckpointNotFoundError(_REMOVED, path=location)


@dataclass(frozen=True, slots=True)
class FileOutline:
    """A file of a checkpoint, and the tensors in it.

    Attributes:
        file: What the manifest says of it.
        start: Where the data begins.
        records: The tensors, in the order of their data; none in files of another kind.
    """

    file: FileRecord
    start: int
    records: list[TensorRecord]


@dataclass(frozen=True, slots=True)
class Outline:
    """All of a checkpoint but the elements of its tensors.

    Attributes:
        manifest: What it says.
        table: The tree.
        files: Every file but the manifest.
        records: The tensors of all files, by name.
        positions: Where the data of each begins in its file.
    """

    manifest: Manifest
    table: NodeTable
    files: Sequence[FileOutline]
    records: dict[str, TensorRecord]
    positions: dict[str, int]

    def containers(self) -> list[list[Any] | dict[Any, Any]]:
        """Return the large containers of an outline that is not needed any more, to be emptied."""
        return [*self.table.containers(), self.records, self.positions, *(file.records for file in self.files)]


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        reader: The reader of the checkpoint; the caller's to close.
        workers: Read and check.
        run: Runs in them what makes tensors, or calls functions of the caller's.
        targets: Where the tensors are that are read into.
        verify: Whether to compare every byte read with the checksums.
        progress: Called on the event loop with how many bytes were read, and how many there are to read.
        in_place: Whether live tensors are read into.
    """

    def __init__(
        self,
        reader: OpenCheckpoint,
        workers: Workers,
        run: Callable[[Callable[[], Any]], Awaitable[Any]],
        targets: ReadTargets,
        *,
        verify: bool,
        progress: Callable[[int, int], object] | None = None,
        in_place: bool = False,
    ) -> None:
        self._reader = reader
        self._workers = workers
        self._run = run
        self._targets = targets
        self._verify = verify
        self._progress = progress
        self._in_place = in_place
        self._read_bytes = self._total_bytes = 0

    @property
    def manifest_path(self) -> str:
        """Where the manifest is, for errors."""
        return self._path(MANIFEST_NAME)

    async def open(self) -> Outline:
        """Read and check everything but the elements of tensors.

        Raises:
            CheckpointCorruptError: If a file is missing, damaged, incomplete or foreign.
            OSError: If the storage refuses.

        May be cancelled; nothing is left behind then.
        """
        with span("manifest"), RarerCollections():
            table = NodeTable()
            manifest = await self._reader.open(self._workers, table.add)
            with reading(self.manifest_path):
                await self._workers.run(table.complete)
        self._part_reader = PartReader(
            self._reader,
            self._workers,
            manifest.part_bytes,
            self._targets,
            verify=self._verify,
            in_place=self._in_place,
        )
        found: dict[str, FileOutline] = {}
        # One iterator for all tasks of the loop: next() has no await in it, so each file goes to one of them.
        queue = iter(manifest.files)

        async def read() -> None:
            for file in queue:
                found[file.name] = await self._outline_of(file)

        with span("headers"), RarerCollections():
            await run_concurrently(*[read] * max(1, min(self._part_reader.at_once, len(manifest.files))))
            return await self._workers.run(partial(self._outline, manifest, table, found))

    def _outline(self, manifest: Manifest, table: NodeTable, found: Mapping[str, FileOutline]) -> Outline:
        """Put together what the files contain. Blocks."""
        files = [found[file.name] for file in manifest.files]
        records: dict[str, TensorRecord] = {}
        positions: dict[str, int] = {}
        for file in files:
            path = self._path(file.file.name)
            for record in releasing_gil(file.records):
                if record.name in records:
                    raise CheckpointCorruptError(f"another file has the tensor {shown(record.name)} too.", path=path)
                records[record.name] = record
                positions[record.name] = file.start + record.start
        return Outline(manifest, table, files, records, positions)

    async def _outline_of(self, file: FileRecord) -> FileOutline:
        """Find out what a file contains."""
        path = self._path(file.name)
        nbytes = await self._reader.size(file.name)
        if nbytes != file.nbytes:
            raise CheckpointCorruptError(f"expected {file.nbytes} bytes, got {nbytes}.", path=path)
        if not file.name.endswith(_SUFFIX):
            return FileOutline(file, 0, [])
        header = await self._part_reader.header(file)
        start = HEADER_LENGTH_BYTES + len(header)
        records = await self._workers.run(partial(read_header, header, nbytes - start, path=path))
        return FileOutline(file, start, records)

    async def plan(
        self, outline: Outline, contents: Mapping[str, torch.Tensor], *, everything: bool
    ) -> list[tuple[FileRecord, Part]]:
        """Find out which parts have to be read.

        Args:
            outline: From :meth:`open`.
            contents: Where tensors go, by name; what is not named is not wanted.
            everything: Also those without a destination, in order to verify them.

        Returns:
            Each part, with its file.

        Raises:
            CheckpointMismatchError: If a live tensor was resized since it was compared.
        """
        found = await self._workers.run(partial(_parts_to_read, outline, contents, everything))
        self._total_bytes += sum(part.nbytes for _, part in found)
        return found

    async def read(self, parts: Sequence[tuple[FileRecord, Part]]) -> None:
        """Read parts into their places.

        Raises:
            CheckpointCorruptError: If a digest differs, or a file ends early; the places are then undefined.
            StagingError: If a device has failed.
            OSError: If the storage refuses.

        When cancelled, waits for what is being read and copied; the places are then undefined.
        """
        with span("read", nbytes=sum(part.nbytes for _, part in parts), parts=len(parts)):
            await self._part_reader.receive(parts, self._arrived)

    async def decode(
        self, outline: Outline, data: Mapping[str, torch.Tensor], classes: Classes | None = None
    ) -> tuple[Any, Memory]:
        """Make the tree.

        Args:
            outline: From :meth:`open`; its ``table`` may have been pruned.
            data: Memory for the tensors that the table needs; leaves over the meta device have no elements.
            classes: Whose objects are made again.

        Returns:
            The tree and its memory.

        Raises:
            CheckpointCorruptError: If the nodes do not describe a tree over the data.
        """
        with span("decode"), RarerCollections():
            if outline.table.kinds:
                with reading(self.manifest_path):
                    await self._workers.run(partial(read_zones, outline.table.wanted()))
            memory = Memory(outline.records, data)
            decoder = TreeDecoder(outline.table, memory, path=self.manifest_path, classes=classes)
            return await self._run(decoder.build), memory

    async def names(self, outline: Outline, selection: Selection | None, instead: object) -> dict[str, bool]:
        """Leave out of the table what is not selected, and return which tensors the rest needs.

        Returns:
            As :meth:`NodeTable.tensor_names` does.

        Raises:
            CheckpointCorruptError: If the nodes do not describe a tree.
            ValueError: If nothing is selected, or a pattern matches nothing.
        """
        if selection is not None:
            await self._run(partial(selection.prune, outline.table, instead))
        with reading(self.manifest_path):
            return await self._workers.run(partial(_names, outline))

    def _path(self, name: str) -> str:
        """Return where a file is, for errors."""
        return f"{self._reader.location}/{name}"

    def _arrived(self, nbytes: int) -> None:
        """Report progress."""
        self._read_bytes += nbytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def _names(outline: Outline) -> dict[str, bool]:
    """Return the tensors that the tree needs, all of which are in the files. Blocks."""
    names = outline.table.tensor_names()
    for name in releasing_gil(names):
        # Raises KeyError for one that no file has, before memory is allocated for the others.
        outline.records[name]
    return names


def _parts_to_read(
    outline: Outline, contents: Mapping[str, torch.Tensor], everything: bool
) -> list[tuple[FileRecord, Part]]:
    """Return the parts of all files that have a destination, or all parts. Blocks."""
    found: list[tuple[FileRecord, Part]] = []
    for file in outline.files:
        parts = cut(_contents(file, contents), outline.manifest.part_bytes)
        if not everything:
            parts = [part for part in releasing_gil(parts) if not all(isinstance(piece, Gap) for piece in part.pieces)]
        found += [(file.file, part) for part in releasing_gil(parts)]
    return found


def _contents(file: FileOutline, contents: Mapping[str, torch.Tensor]) -> list[Content]:
    """Return what a file consists of."""
    if not file.start:
        return [Gap(file.file.nbytes)]
    found: list[Content] = [Gap(file.start)]
    for record in releasing_gil(file.records):
        nbytes = record.stop - record.start
        content = contents.get(record.name)
        if content is not None and content.nbytes != nbytes:
            # Everything after it in the file would be read into the wrong tensors.
            raise CheckpointMismatchError(
                mismatched=[
                    f"{shown(record.name)} (the live tensor now has {content.nbytes} bytes instead of {nbytes})"
                ],
                remedy="Do not resize live tensors while a load is under way.",
            )
        found.append(content if content is not None else Gap(nbytes))
    return found
