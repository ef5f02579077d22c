"""What a checkpoint consists of, which parts of its files have to be read, and the tree that they are read to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from aiostage._loop.coroutines import run_concurrently
from aiostage._loop.slices import RarerCollections
from aiostage._loop.workers import Workers
from aiostage._turns import releasing_gil
from aiostage.checkpoint.opening import OpenCheckpoint
from aiostage.checkpoint.part_reader import PartReader, ReadTargets
from aiostage.checkpoint.selection import Selection
from aiostage.errors import CheckpointCorruptError, CheckpointMismatchError, shown
from aiostage.format.classes import Classes
from aiostage.format.decode import Memory, TreeDecoder
from aiostage.format.manifest import FileRecord, Manifest
from aiostage.format.nodes import NodeTable, reading
from aiostage.format.parts import Content, Gap, Part, cut
from aiostage.format.safetensors import HEADER_LENGTH_BYTES, TensorRecord, read_header
from aiostage.format.standard_kinds import read_zones
from aiostage.observe import span
from aiostage.storage.commit import MANIFEST_NAME

__all__ = ["CheckpointReader", "FileOutline", "Outline"]


_SUFFIX = ".safetensors"


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
    records: Sequence[TensorRecord]


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
    records: Mapping[str, TensorRecord]
    positions: Mapping[str, int]


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        reader: Of the checkpoint; the caller's to close.
        workers: Read and check.
        run: Runs in them what makes tensors, or calls functions of the caller's.
        targets: Where the tensors are that are read into.
        verify: Whether to compare every byte read with the checksums.
        progress: Called on the event loop with how many bytes were read, and how many there are to read.
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
    ) -> None:
        self._reader = reader
        self._workers = workers
        self._run = run
        self._targets = targets
        self._verify = verify
        self._progress = progress
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
        )
        found: dict[str, FileOutline] = {}
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
            raise CheckpointCorruptError(f"it is {nbytes} bytes long and not {file.nbytes}.", path=path)
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
            names = await self._workers.run(outline.table.tensor_names)
            for name in names:
                outline.records[name]
        return names

    def _path(self, name: str) -> str:
        """Return where a file is, for errors."""
        return f"{self._reader.location}/{name}"

    def _arrived(self, nbytes: int) -> None:
        """Report progress."""
        self._read_bytes += nbytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def _parts_to_read(
    outline: Outline, contents: Mapping[str, torch.Tensor], everything: bool
) -> list[tuple[FileRecord, Part]]:
    """Return the parts of all files that have a destination, or all parts. Blocks."""
    found: list[tuple[FileRecord, Part]] = []
    for file in outline.files:
        parts = cut(_contents(file, contents), outline.manifest.part_bytes)
        found += [(file.file, part) for part in releasing_gil(parts) if everything or _is_wanted(part)]
    return found


def _is_wanted(part: Part) -> bool:
    return not all(isinstance(piece, Gap) for piece in part.pieces)


def _contents(file: FileOutline, contents: Mapping[str, torch.Tensor]) -> list[Content]:
    """Return what a file consists of."""
    if not file.start:
        return [Gap(file.file.nbytes)]
    found: list[Content] = [Gap(file.start)]
    for record in releasing_gil(file.records):
        nbytes = record.stop - record.start
        content = contents.get(record.name)
        if content is not None and content.nbytes != nbytes:
            # All that comes after it in the file would go to wrong places.
            raise CheckpointMismatchError(
                mismatched=[
                    f"{shown(record.name)} (the live tensor now has {content.nbytes} bytes instead of {nbytes})"
                ],
                remedy="Do not resize live tensors while a load is under way.",
            )
        found.append(content if content is not None else Gap(nbytes))
    return found
