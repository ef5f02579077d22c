"""Compares a checkpoint of any kind with its checksums, and names the tensors that damage touches."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from anyio.to_thread import run_sync

from aiostage._loop.coroutines import run_concurrently
from aiostage._loop.workers import Workers
from aiostage.abc import Reader
from aiostage.checkpoint.foreign import DAMAGED_ARCHIVE, Read
from aiostage.checkpoint.foreign_dcp import DcpDirectory
from aiostage.checkpoint.part_reader import THREADS
from aiostage.checkpoint.progress import LoadProgress, ProgressOption, reporting
from aiostage.checkpoint.reader import OpenCheckpoint, open_checkpoint
from aiostage.checkpoint.verify import outline_of
from aiostage.cli.contents import describing, open_contents
from aiostage.cli.entries import TreeEntry, entries_of_table, entries_of_tree
from aiostage.cli.finding import Place
from aiostage.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from aiostage.format.manifest import FileRecord, Manifest
from aiostage.format.nodes import NodeTable, reading
from aiostage.format.parts import PART_BYTES, digest, running_digest
from aiostage.format.safetensors import HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, TensorRecord, read_header
from aiostage.storage.commit import MANIFEST_NAME

__all__ = ["Damage", "Report", "check"]

_READS_AT_ONCE = 4
_NO_CHECKSUMS = "safetensors has no checksums; the headers are well-formed, and the files as long as they say"
_CRC_ONLY = "PyTorch's format: compared with the CRC-32 of each record of its archives; nothing else has a checksum"
_NOTHING_TO_COMPARE = "PyTorch's format before archives has no checksums; it can be unpickled"


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        file: Name of the file.
        reason: What is wrong with it.
        start: First byte in the file; None if it is not about some bytes.
        stop: One past the last byte.
        tensors: Places of the tensors, or values, that these bytes are part of.
        stored_in: Files of other checkpoints that the bytes lie in.
    """

    file: str
    reason: str
    start: int | None = None
    stop: int | None = None
    tensors: Sequence[str] = ()
    stored_in: Sequence[str] = ()


@dataclass(slots=True)
class Report:
    """What was found out about one checkpoint.

    Attributes:
        source: Where it is, as the user wrote it.
        kind: Which program has written it, or what its files are.
        files: How many it has.
        nbytes: How long they are together.
        damage: All that is wrong.
        note: What could not be compared, or None if every byte was.
    """

    source: str
    kind: str
    files: int = 0
    nbytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    note: str | None = None


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
        return await _check_foreign(place, place.read)
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
    """Of a checkpoint of aiostage."""

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
            # Bytes that are as they were written, and are no checkpoint.
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
            # The bytes that count are compared all the same.
            self._report.damage.append(Damage(file.name, f"expected {file.nbytes} bytes, got {nbytes}."))

    async def _compare(self, reader: OpenCheckpoint, manifest: Manifest) -> None:
        """Compare all parts with their digests, several at once."""
        files = [file for file in manifest.files if file.name not in self._wrong]
        queue = iter([(file, index) for file in files for index in range(len(file.digests))])
        total = sum(file.nbytes for file in files)

        async def work() -> None:
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
        at_once = max(1, min(reader.reads_at_once, (128 << 20) // manifest.part_bytes, parts))
        await run_concurrently(*[work] * at_once)

    async def _wrong_with(
        self, reader: OpenCheckpoint, file: FileRecord, index: int, start: int, memory: memoryview
    ) -> str | None:
        try:
            await reader.read(file.name, start, memory)
        except (CheckpointCorruptError, OSError) as error:
            return _damage_said_by(error)
        found = await self._workers.run(partial(digest, memory))
        return None if found == file.digests[index] else ""

    async def _explain(self, reader: OpenCheckpoint, manifest: Manifest, table: NodeTable) -> None:
        """Tell which tensors wrong bytes are part of."""
        with reading(f"{reader.location}/{MANIFEST_NAME}"):
            paths = _paths_of_tensors(entries_of_table(table, {}))
        files = [file for file in manifest.files if file.name.endswith(".safetensors")]
        headers = {file.name: await _header(reader, file) for file in files}
        known = {record.name for _, records in filter(None, headers.values()) for record in records}
        for file in manifest.files:
            for start, stop, reason in _joined(self._wrong.get(file.name, [])):
                header = headers.get(file.name)
                if header is None:
                    # Where tensors are in it cannot be told; those of other files are not in it.
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
    """Return the damage that an error of reading reports. Raise the error if it is another one, such as a timeout."""
    if isinstance(error, CheckpointCorruptError):
        return error.reason
    if isinstance(error, CheckpointNotFoundError) or error.errno != errno.EIO:
        raise error
    return str(error)


def _paths_of_tensors(entries: Iterable[TreeEntry]) -> dict[str, list[str]]:
    """Return where the tensors of files are in the tree, by their names in the files; not inside of objects."""
    found: dict[str, list[str]] = {}
    places: set[tuple[str, ...]] = set()
    for entry in entries:
        path = entry.path
        if not entry.inner:
            places.add(path)
        while path not in places and path:
            path = path[:-1]
        if entry.kind == "tensor":
            found.setdefault(entry.source["name"], []).append(".".join(path) or ".")
    return found


async def _header(reader: Reader, file: FileRecord) -> tuple[int, Sequence[TensorRecord]] | None:
    """Return where data begins in a file and what it is, if that can be read, damaged or not."""
    try:
        first = bytearray(HEADER_LENGTH_BYTES)
        await reader.read(file.name, 0, memoryview(first))
        length = int.from_bytes(first, "little")
        start = HEADER_LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES or start > file.nbytes:
            return None
        header = bytearray(length)
        await reader.read(file.name, HEADER_LENGTH_BYTES, memoryview(header))
        return start, read_header(bytes(header), file.nbytes - start, path=file.name)
    except (CheckpointCorruptError, OSError):
        # It is damaged, and was reported as that.
        return None


def _joined(ranges: Iterable[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Return ranges in order, those that are wrong for one reason and touch each other as one."""
    found: list[tuple[int, int, str]] = []
    for start, stop, reason in sorted(ranges):
        if found and found[-1][1] == start and found[-1][2] == reason:
            found[-1] = (found[-1][0], stop, reason)
        else:
            found.append((start, stop, reason))
    return found


def _stored_in(manifest: Manifest, name: str, start: int, stop: int) -> list[str]:
    """Return the files of other checkpoints that bytes of a file lie in."""
    placed = manifest.placement.files.get(name) if manifest.placement is not None else None
    if placed is None:
        return []
    pieces = placed.located(start, min(stop, placed.nbytes))
    return list(dict.fromkeys(f"{each.source}/{each.file}" for each in pieces if each.source is not None))


async def _check_dcp(place: Place, workers: Workers, progressed: Callable[[int, int], None]) -> Report:
    """Check a checkpoint of :mod:`aiostage.dcp`: each record has a digest."""
    read_index = import_module("aiostage.dcp.storage").read_index
    report = Report(place.source, "aiostage.dcp")
    reader = await place.storage.read(place.name)
    try:
        with describing(f"{reader.location}/.metadata"):
            metadata = await read_index(reader)
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
        # Its records say so, with their tensors.
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
    """Return what the metadata names and does not say the place of."""
    there = {(index.fqn, tuple(index.offset or ())) for index in metadata.storage_data}
    missing = []
    for name, about in metadata.state_dict_metadata.items():
        chunks = [tuple(chunk.offsets) for chunk in about.chunks] if hasattr(about, "chunks") else [()]
        missing += [_shard(name, offsets) for offsets in chunks if (name, offsets) not in there]
    return [Damage(".metadata", "it does not say where some tensors are.", tensors=missing)] if missing else []


def _shard(name: str, offset: Any) -> str:
    """Return the name of a tensor, with where the shard begins unless that is at its beginning."""
    return f"{name}[{', '.join(map(str, offset))}:]" if offset is not None and any(offset) else name


async def _check_foreign(place: Place, read: Read) -> Report:
    """Check what another program has written, as far as it can be."""
    report = Report(place.source, read.kind)
    try:
        if read.kind == "dcp":
            report.kind, report.note = "torch.distributed.checkpoint", _CRC_ONLY
            await run_sync(_check_dcp_directory, read.path, report)
            return report
        if read.kind == "torch":
            is_archive = await run_sync(zipfile.is_zipfile, read.path)
            report.kind, report.note = "torch.save", _CRC_ONLY if is_archive else _NOTHING_TO_COMPARE
            report.files, report.nbytes = 1, await run_sync(os.path.getsize, read.path)
            if is_archive:
                report.damage += await run_sync(_check_archive, read.path)
                if report.damage:
                    return report
        async with open_contents(place, elements=False) as contents:
            if read.kind != "torch":
                report.kind, report.note = contents.kind, _NO_CHECKSUMS
                report.files, report.nbytes = len(contents.files), sum(file["nbytes"] for file in contents.files)
    except CheckpointCorruptError as error:
        report.damage.append(Damage(os.path.basename(error.path or read.path), error.reason))
    except CheckpointError:
        # It needs code. An archive is whole nevertheless; of others nothing is known then.
        if report.note != _CRC_ONLY:
            raise
    return report


def _check_dcp_directory(path: str, report: Report) -> None:
    """Check the records of a directory of ``torch.distributed.checkpoint``, each of which is an archive. Blocks."""
    directory = DcpDirectory(path)
    places = {name: directory.places(name) for name in directory.entries}
    files = {file for found in places.values() for file, _, _ in found}
    report.files = len(files) + 1
    report.nbytes = sum(
        os.path.getsize(file) for file in {*files, os.path.join(path, ".metadata")} if os.path.exists(file)
    )
    for name, found in places.items():
        wrong = [damage for each in found if (damage := _wrong_record(name, *each)) is not None]
        report.damage += wrong
        if not wrong:
            try:
                directory.value(name)
            except CheckpointCorruptError as error:
                report.damage.append(Damage(os.path.basename(error.path or path), error.reason, tensors=[name]))
            except CheckpointError:
                # It needs code, and its bytes are right.
                continue


def _wrong_record(name: str, file: str, start: int, nbytes: int) -> Damage | None:
    base, stop = os.path.basename(file), start + nbytes
    try:
        with open(file, "rb") as opened:
            opened.seek(start)
            data = io.BytesIO(opened.read(nbytes))
    except FileNotFoundError:
        return Damage(base, "the file is missing.", start, stop, [name])
    if data.getbuffer().nbytes < nbytes:
        return Damage(base, f"it ends before byte {stop}.", start, stop, [name])
    if zipfile.is_zipfile(data) and _wrong_in(data):
        return Damage(base, f"bytes {start} to {stop} do not match their CRC-32.", start, stop, [name])
    return None


def _check_archive(path: str) -> list[Damage]:
    """Check a file of ``torch.save``. Blocks."""
    wrong = _wrong_in(path)
    tensors = _tensors_in(path, wrong) if wrong else {}
    return [
        Damage(os.path.basename(path), f"{name} in it does not match its CRC-32.", start, stop, tensors.get(name, ()))
        for name, (start, stop) in wrong.items()
    ]


def _wrong_in(file: Any) -> dict[str, tuple[int, int]]:
    """Return the members of an archive that do not match their CRC-32, with the bytes that they take."""
    found: dict[str, tuple[int, int]] = {}
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGED_ARCHIVE:
        return {"the list of what is": (0, 0)}
    with archive:
        for info in archive.infolist():
            try:
                with archive.open(info) as member:
                    while member.read(PART_BYTES):
                        pass
            except DAMAGED_ARCHIVE as error:
                if isinstance(error, OSError) and error.errno != errno.EIO:
                    raise
                found[info.filename] = (info.header_offset, info.header_offset + info.compress_size)
    return found


def _tensors_in(path: str, wrong: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the tensors over damaged members, if their order tells."""
    with zipfile.ZipFile(path) as archive:
        data = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        # More is damaged than elements. The members are named.
        return {}
    over: dict[int, list[str]] = {}
    for entry in entries_of_tree(tree):
        if entry.kind == "tensor" and entry.source.untyped_storage().nbytes():
            over.setdefault(entry.source.untyped_storage().data_ptr(), []).append(entry.name)
    # A mapped file: members and memory are in one order.
    members = sorted(data, key=lambda info: info.header_offset)
    if len(members) != len(over):
        return {}
    return {info.filename: over[at] for info, at in zip(members, sorted(over), strict=True) if info.filename in wrong}
