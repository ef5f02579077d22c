"""Reading a checkpoint: the manifest, then the files that it names, then the tree over their memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.together import together
from aiostage._loop.workers import Job, Workers
from aiostage.abc import Buffer, Reader
from aiostage.checkpoint.buffers import PartBuffers
from aiostage.checkpoint.decode import Memory, TreeDecoder, is_spread
from aiostage.checkpoint.progress import LoadProgress
from aiostage.errors import CheckpointCorruptError, HostMemoryError
from aiostage.observe import span
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.manifest import MAX_MANIFEST_BYTES, FileRecord, read_manifest
from aiostage.storage.parts import Content, Hole, Part, cut, digest, scatter, whole
from aiostage.storage.safetensors import HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, Record, read_header

__all__ = ["CheckpointReader"]

_CHUNK = 64
_SUFFIX = ".safetensors"

_PARTS_AT_ONCE = 4
"""Parts that are being read, or compared with their digests, at any time."""


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        reader: Of the checkpoint; the caller's to close.
        name: Of the checkpoint.
        workers: Run everything that blocks.
        slices: Run everything else.
        verify: Whether to compare every byte read with the checksums.
        progress: Called on the event loop as parts are read.
    """

    def __init__(
        self,
        reader: Reader,
        name: str,
        workers: Workers,
        slices: Slices,
        *,
        verify: bool,
        progress: Callable[[LoadProgress], object] | None = None,
    ) -> None:
        self._reader = reader
        self._name = name
        self._progress = progress
        self._read_bytes = self._total_bytes = 0
        self._workers = workers
        self._slices = slices
        self._verify = verify
        self._records: dict[str, Record] = {}
        self._data: dict[str, torch.Tensor] = {}

    async def tree(self) -> Any:
        """Read everything.

        Returns:
            The tree, in host memory.

        Raises:
            CheckpointCorruptError: If a file is missing, damaged, incomplete or foreign.
            HostMemoryError: If memory for the tensors cannot be had.
            OSError: If the file system refuses.

        May be cancelled; nothing is left behind then.
        """
        path = self._path(MANIFEST_NAME)
        with span("manifest"):
            text = await self._reader.manifest()
            if len(text) > MAX_MANIFEST_BYTES:
                raise CheckpointCorruptError(f"it is {len(text)} bytes long, too long for a manifest.", path=path)
            manifest = await self._slices.run(read_manifest(await self._workers.run(text.tobytes), path=path))
        self._total_bytes = sum(file.nbytes for file in manifest.files)
        buffers = PartBuffers(manifest.part_bytes)
        for record in manifest.files:
            nbytes = await self._reader.size(record.name)
            if nbytes != record.nbytes:
                raise CheckpointCorruptError(
                    f"it is {nbytes} bytes long and not {record.nbytes}.", path=self._path(record.name)
                )
            await self._read(record, buffers)
        with span("decode"):
            memory = Memory(self._records, self._data, path=path)
            await self._spread(memory, manifest.nodes)
            return await self._slices.run(TreeDecoder(manifest.nodes, memory, path=path).build())

    def _has_read(self, nbytes: int) -> None:
        """Report progress."""
        self._read_bytes += nbytes
        if self._progress is not None:
            self._progress(LoadProgress(name=self._name, total_bytes=self._total_bytes, read_bytes=self._read_bytes))

    def _path(self, name: str) -> str:
        """Return where a file is, for errors."""
        return f"{self._reader.location}/{name}"

    async def _read(self, record: FileRecord, buffers: PartBuffers) -> None:
        """Read a file and keep its tensors."""
        contents: list[Content] = [Hole(record.nbytes)]
        if record.name.endswith(_SUFFIX):
            header = await self._header(record)
            start = HEADER_LENGTH_BYTES + len(header)
            path = self._path(record.name)
            tensors = await self._slices.run(read_header(header, record.nbytes - start, path=path))
            contents = [Hole(start), *await self._slices.run(self._allocate(tensors, path))]
        if len(contents) > 1 or self._verify:
            parts = iter(await self._slices.run(cut(contents, buffers.part_bytes)))
            with span("read", file=record.name, nbytes=record.nbytes):
                await together(*[partial(self._read_parts, record, parts, buffers)] * _PARTS_AT_ONCE)
        else:
            self._has_read(record.nbytes)

    async def _header(self, record: FileRecord) -> bytes:
        """Read the header of a safetensors file, without the length before it."""
        path, nbytes = self._path(record.name), record.nbytes
        if nbytes < HEADER_LENGTH_BYTES:
            raise CheckpointCorruptError(f"it is only {nbytes} bytes long.", path=path)
        length = bytearray(HEADER_LENGTH_BYTES)
        await self._reader.read(record.name, 0, memoryview(length))
        header_bytes = int.from_bytes(length, "little")
        if header_bytes > min(MAX_HEADER_BYTES, nbytes - HEADER_LENGTH_BYTES):
            raise CheckpointCorruptError(f"it says that its header is {header_bytes} bytes long.", path=path)
        header = bytearray(header_bytes)
        await self._reader.read(record.name, HEADER_LENGTH_BYTES, memoryview(header))
        return await self._workers.run(partial(bytes, header))

    async def _read_parts(self, record: FileRecord, parts: Iterator[Part], buffers: PartBuffers) -> None:
        """Read parts into their places, one after the other, until there is none left."""
        for part in parts:
            data = whole(part)
            memory = data.numpy() if data is not None else buffers.take()
            buffer = memory.data[: part.nbytes]
            await self._reader.read(record.name, part.offset, buffer)
            if self._verify:
                await self._workers.run(partial(self._check, record, part, buffer))
            if data is None:
                await self._workers.run(partial(scatter, part, torch.from_numpy(memory)))
            self._has_read(part.nbytes)

    def _check(self, record: FileRecord, part: Part, data: Buffer) -> None:
        with span("digest", nbytes=part.nbytes):
            found = digest(data)
        if found != record.digests[part.index]:
            raise CheckpointCorruptError(
                f"bytes {part.offset} to {part.offset + part.nbytes} do not match their checksum.",
                path=self._path(record.name),
            )

    def _allocate(self, records: Sequence[Record], path: str) -> Generator[None, None, list[torch.Tensor]]:
        """Get memory for the tensors of a file."""
        found = []
        for index, record in enumerate(records):
            if record.name in self._records:
                raise CheckpointCorruptError(f"another file has the tensor {record.name!r} too.", path=path)
            try:
                data = torch.empty(record.stop - record.start, dtype=torch.uint8)
            except RuntimeError as error:
                raise HostMemoryError(f"no memory for the tensor {record.name!r}: {error}", path=path) from error
            self._records[record.name], self._data[record.name] = record, data
            found.append(data)
            if index % _CHUNK == 0:
                yield
        return found

    async def _spread(self, memory: Memory, nodes: Sequence[Any]) -> None:
        """Lay out the leaves that are in a file otherwise than in memory."""
        job = self._workers.job()
        try:
            await self._slices.run(_submit(job, memory, nodes))
        except BaseException as error:
            job.cancel()
            if not isinstance(error, GeneratorExit):
                await finish(job.settled)
            raise
        job.close()
        try:
            await job.join()
        finally:
            # An error's traceback has this frame in it, which must not lead back to the error.
            del job


def _submit(job: Job, memory: Memory, nodes: Sequence[Any]) -> Generator[None, None, None]:
    for index, node in enumerate(nodes):
        if is_spread(node):
            job.put(partial(memory.spread, node))
        if index % _CHUNK == 0:
            yield
