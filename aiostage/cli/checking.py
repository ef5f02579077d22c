"""Compares a checkpoint of any kind with its checksums, and names the tensors that damage touches."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from aiostage._loop.coroutines import run_concurrently
from aiostage._loop.workers import Workers
from aiostage.abc import Reader
from aiostage.checkpoint.part_reader import THREADS
from aiostage.checkpoint.progress import LoadProgress, ProgressOption, reporting
from aiostage.checkpoint.reader import OpenCheckpoint, open_checkpoint
from aiostage.checkpoint.verify import outline_of
from aiostage.cli.checking_foreign import check_foreign
from aiostage.cli.contents import describing
from aiostage.cli.entries import TreeEntry, entries_of_table
from aiostage.cli.finding import Place
from aiostage.cli.report import Damage, Report
from aiostage.errors import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.format.manifest import FileRecord, Manifest
from aiostage.format.nodes import NodeTable, reading
from aiostage.format.parts import PART_BYTES, digest, running_digest
from aiostage.format.safetensors import HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, TensorRecord, read_header
from aiostage.storage.commit import MANIFEST_NAME

__all__ = ["check"]

_READS_AT_ONCE = 4
"""Records that are read at once. A guess, as for loads of DCP's checkpoints."""

_MEMORY_BYTES = 128 << 20
"""Bytes of all buffers together. With larger parts, fewer are read at once."""


async def check(place: Place, *, progress: bool = False) -> Report:
    """Read a checkpoint of any kind, and compare all of it with what checksums it has. Goes on after damage.

    Args:
        place: Where it is.
        progress: Show a bar.

    Raises:
        CheckpointError: If it needs code, or was removed meanwhile.
        OSError: If the storage refuses. A disk that cannot read some bytes has damaged them.
    """
    if place.read is not None:
        return await check_foreign(place, place.read)
    workers = Workers(THREADS, "aiostage-verify")
    bar: ProgressOption[LoadProgress] = progress
    with reporting(bar, f"verifying {place.name}") as report:

        def progressed(read_bytes: int, total_bytes: int) -> None:
            if report is not None:
                report(LoadProgress(name=place.name, total_bytes=total_bytes, read_bytes=read_bytes))

        try:
            if place.is_dcp:
                return await _check_dcp(place, workers, progressed)
            return await _Check(place, workers, progressed).run()
        finally:
            workers.stop()


class _Check:
    """One check of a checkpoint of aiostage.

    It goes on after each fault: a damaged part leaves the other parts to compare. A manifest that cannot be read ends
    it, because the digests are in there.
    """

    def __init__(self, place: Place, workers: Workers, progressed: Callable[[int, int], None]) -> None:
        self._place = place
        self._workers = workers
        self._progressed = progressed
        self._report = Report(place.source, "aiostage")
        self._read_bytes = 0
        # By file, which bytes are wrong, and why.
        self._wrong: dict[str, list[tuple[int, int, str]]] = {}

    async def run(self) -> Report:
        reader = await open_checkpoint(self._place.storage, self._place.name)
        try:
            return await self._run(reader)
        finally:
            await reader.aclose()

    async def _run(self, reader: OpenCheckpoint) -> Report:
        report = self._report
        # The tree is read too: after damage it is needed for the paths of tensors.
        table = NodeTable()
        try:
            manifest = await reader.open(self._workers, table.add)
            with reading(f"{reader.location}/{MANIFEST_NAME}"):
                await self._workers.run(table.complete)
        except CheckpointCorruptError as error:
            report.damage.append(Damage(MANIFEST_NAME, error.reason))
            return report
        report.files, report.nbytes = len(manifest.files), sum(file.nbytes for file in manifest.files)
        for file in manifest.files:
            await self._measure(reader, file)
        await self._compare(reader, manifest)
        if self._wrong:
            await self._explain(reader, manifest, table)
        elif not report.damage:
            # The bytes are as they were written. Their author may have written something that is not a checkpoint.
            try:
                await outline_of((self._place.storage, self._place.name))
            except CheckpointCorruptError as error:
                report.damage.append(Damage(os.path.basename(error.path or ""), error.reason))
        return report

    async def _measure(self, reader: OpenCheckpoint, file: FileRecord) -> None:
        try:
            nbytes = await reader.size(file.name)
        except CheckpointCorruptError as error:
            self._wrong[file.name] = [(0, file.nbytes, error.reason)]
            return
        if nbytes > file.nbytes:
            # Loads do not read the bytes after the end. Those before it are compared.
            self._report.damage.append(Damage(file.name, f"expected {file.nbytes} bytes, got {nbytes}."))

    async def _compare(self, reader: OpenCheckpoint, manifest: Manifest) -> None:
        """Compare all parts with their digests, several at once."""
        files = [file for file in manifest.files if file.name not in self._wrong]
        queue = iter([(file, index) for file in files for index in range(len(file.digests))])
        total = sum(file.nbytes for file in files)

        async def work() -> None:
            # One buffer for each task, which takes one part after the other. All tasks share the queue.
            memory: np.ndarray[Any, Any] = np.empty(manifest.part_bytes, np.uint8)
            for file, index in queue:
                start = index * manifest.part_bytes
                stop = min(start + manifest.part_bytes, file.nbytes)
                reason = await self._wrong_with(reader, file, index, start, memory[: stop - start].data)
                if reason is not None:
                    self._wrong.setdefault(file.name, []).append((start, stop, reason))
                self._read_bytes += stop - start
                self._progressed(self._read_bytes, total)

        parts = sum(len(file.digests) for file in files)
        at_once = max(1, min(reader.reads_at_once, _MEMORY_BYTES // manifest.part_bytes, parts))
        await run_concurrently(*[work] * at_once)

    async def _wrong_with(
        self, reader: OpenCheckpoint, file: FileRecord, index: int, start: int, memory: memoryview
    ) -> str | None:
        try:
            await reader.read(file.name, start, memory)
        except (CheckpointCorruptError, OSError) as error:
            return _damage_said_by(error)
        found = await self._workers.run(partial(digest, memory))
        # "" is a mismatch without more to say. _explain() words it, with the whole range of damaged parts.
        return None if found == file.digests[index] else ""

    async def _explain(self, reader: OpenCheckpoint, manifest: Manifest, table: NodeTable) -> None:
        """Report which tensors the damaged bytes belong to."""
        with reading(f"{reader.location}/{MANIFEST_NAME}"):
            paths = _paths_of_tensors(entries_of_table(table, {}))
        files = [file for file in manifest.files if file.name.endswith(".safetensors")]
        headers = {file.name: await _header(reader, file) for file in files}
        known = {record.name for _, records in filter(None, headers.values()) for record in records}
        for file in manifest.files:
            for start, stop, reason in _joined(self._wrong.get(file.name, [])):
                header = headers.get(file.name)
                if header is None:
                    # The header is damaged, so any tensor that no other file has may be in this one.
                    names: Iterable[str] = [name for name in paths if name not in known]
                else:
                    data, records = header
                    names = [each.name for each in records if data + each.start < stop and data + each.stop > start]
                    names = [name for name in names if name in paths]
                self._report.damage.append(
                    Damage(
                        file.name,
                        reason or f"bytes {start} to {stop} do not match their checksum.",
                        start,
                        stop,
                        list(dict.fromkeys(path for name in names for path in paths[name])),
                        _stored_in(manifest, file.name, start, stop),
                    )
                )


def _damage_said_by(error: CheckpointCorruptError | OSError) -> str:
    """Return the damage that an error of reading reports. Raise the error if it is another one, such as a timeout.

    The disk reports EIO for bytes that it cannot read: they are lost. A network that does not answer says nothing about
    the bytes.
    """
    if isinstance(error, CheckpointCorruptError):
        return error.reason
    if isinstance(error, CheckpointNotFoundError) or error.errno != errno.EIO:
        raise error
    return str(error)


def _paths_of_tensors(entries: Iterable[TreeEntry]) -> dict[str, list[str]]:
    """Return the paths of the tensors of files, by their names in the files. Parts of an object get its path."""
    found: dict[str, list[str]] = {}
    places: set[tuple[str, ...]] = set()
    for entry in entries:
        path = entry.path
        if not entry.inner:
            places.add(path)
        # Up to the nearest place that a user can name. Parents come before their children, so it is known by now.
        while path not in places and path:
            path = path[:-1]
        if entry.kind == "tensor":
            found.setdefault(entry.source["name"], []).append(".".join(path) or ".")
    return found


async def _header(reader: Reader, file: FileRecord) -> tuple[int, Sequence[TensorRecord]] | None:
    """Return the offset of the data in a file and its tensors; None if the header cannot be read."""
    try:
        first = bytearray(HEADER_LENGTH_BYTES)
        await reader.read(file.name, 0, memoryview(first))
        length = int.from_bytes(first, "little")
        start = HEADER_LENGTH_BYTES + length
        # These bytes may be the damaged ones. Memory is allocated by their number.
        if length > MAX_HEADER_BYTES or start > file.nbytes:
            return None
        header = bytearray(length)
        await reader.read(file.name, HEADER_LENGTH_BYTES, memoryview(header))
        return start, read_header(bytes(header), file.nbytes - start, path=file.name)
    except (CheckpointCorruptError, OSError):
        # The comparison of the parts reports this damage.
        return None


def _joined(ranges: Iterable[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Return ranges in order. Those that touch each other and have the same reason become one."""
    found: list[tuple[int, int, str]] = []
    for start, stop, reason in sorted(ranges):
        if found and found[-1][1] == start and found[-1][2] == reason:
            found[-1] = (found[-1][0], stop, reason)
        else:
            found.append((start, stop, reason))
    return found


def _stored_in(manifest: Manifest, name: str, start: int, stop: int) -> list[str]:
    """Return the files of other checkpoints that have some bytes of a file."""
    placed = manifest.placement.files.get(name) if manifest.placement is not None else None
    if placed is None:
        return []
    pieces = placed.located(start, min(stop, placed.nbytes))
    return list(dict.fromkeys(f"{each.source}/{each.file}" for each in pieces if each.source is not None))


async def _check_dcp(place: Place, workers: Workers, progressed: Callable[[int, int], None]) -> Report:
    """Check a checkpoint of :mod:`aiostage.dcp`: each record has a digest."""
    read_index = import_module("aiostage.dcp.records").read_index
    report = Report(place.source, "aiostage.dcp")
    reader = await place.storage.read(place.name)
    try:
        with describing(f"{reader.location}/.metadata"):
            metadata = await read_index(reader)
            # By record: items that share one are damaged together, and it is read once.
            names: dict[Any, list[str]] = {}
            for index, record in metadata.storage_data.items():
                names.setdefault(record, []).append(_shard(index.fqn, index.offset))
            sizes: dict[str, int] = {}
            for record in names:
                sizes[record.file] = max(sizes.get(record.file, 0), record.offset + record.nbytes)
            report.files, report.nbytes = len(sizes) + 1, sum(sizes.values()) + await reader.size(".metadata")
            report.damage += _missing_shards(metadata)
            for file, nbytes in sizes.items():
                report.damage += await _too_long(reader, file, nbytes)
            report.damage += await _compare_records(reader, names, workers, progressed)
    except CheckpointCorruptError as error:
        report.damage.append(Damage(os.path.basename(error.path or ""), error.reason))
    finally:
        await reader.aclose()
    return report


async def _too_long(reader: Reader, file: str, nbytes: int) -> list[Damage]:
    try:
        found = await reader.size(file)
    except CheckpointCorruptError:
        # Each of its records reports this, with its tensors.
        return []
    return [Damage(file, f"expected {nbytes} bytes, got {found}.")] if found > nbytes else []


async def _compare_records(
    reader: Reader, names: Mapping[Any, Sequence[str]], workers: Workers, progressed: Callable[[int, int], None]
) -> list[Damage]:
    """Compare records with their digests, several at once, a few MiB of each at a time."""
    found: list[Damage] = []
    queue, total, done = iter(names), sum(record.nbytes for record in names), 0

    async def work() -> None:
        nonlocal done
        memory: np.ndarray[Any, Any] = np.empty(PART_BYTES, np.uint8)
        for record in queue:
            reason = await _wrong_with_record(reader, record, memory.data, workers)
            if reason is not None:
                start, stop = record.offset, record.offset + record.nbytes
                found.append(Damage(record.file, reason, start, stop, names[record]))
            done += record.nbytes
            progressed(done, total)

    await run_concurrently(*[work] * _READS_AT_ONCE)
    return sorted(found, key=lambda each: (each.file, each.start or 0))


async def _wrong_with_record(reader: Reader, record: Any, memory: memoryview, workers: Workers) -> str | None:
    running = running_digest()
    try:
        # In pieces, because a record is as large as a rank's shard and may not fit into memory.
        for start in range(0, record.nbytes, len(memory)):
            part = memory[: min(len(memory), record.nbytes - start)]
            await reader.read(record.file, record.offset + start, part)
            await workers.run(partial(running.update, part))
    except (CheckpointCorruptError, OSError) as error:
        return _damage_said_by(error)
    if running.hexdigest() == record.digest:
        return None
    return f"bytes {record.offset} to {record.offset + record.nbytes} do not match their checksum."


def _missing_shards(metadata: Any) -> list[Damage]:
    """Return damage for the shards that the metadata names without saying where they are."""
    there = {(index.fqn, tuple(index.offset or ())) for index in metadata.storage_data}
    missing = []
    for name, about in metadata.state_dict_metadata.items():
        chunks = [tuple(chunk.offsets) for chunk in about.chunks] if hasattr(about, "chunks") else [()]
        missing += [_shard(name, offsets) for offsets in chunks if (name, offsets) not in there]
    return [Damage(".metadata", "it does not say where some tensors are.", tensors=missing)] if missing else []


def _shard(name: str, offset: Any) -> str:
    """Return the name of a tensor, with the offset of the shard if that is not 0."""
    return f"{name}[{', '.join(map(str, offset))}:]" if offset is not None and any(offset) else name
