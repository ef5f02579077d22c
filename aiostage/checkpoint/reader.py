"""Reading a checkpoint: the manifest, then the files that it names, then the tree over their memory."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Job, Workers
from aiostage.checkpoint.decode import Memory, TreeDecoder, is_spread
from aiostage.errors import CheckpointCorruptError, HostMemoryError
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.files import Descriptor, InputFile
from aiostage.storage.local import FileRecord, LocalFiles
from aiostage.storage.manifest import MAX_MANIFEST_BYTES, read_manifest
from aiostage.storage.parts import Content, Hole
from aiostage.storage.safetensors import HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, Record, read_header

__all__ = ["CheckpointReader"]

_CHUNK = 64
_SUFFIX = ".safetensors"


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        directory: Open; what is read comes from it, whatever its path names meanwhile.
        path: For errors.
        workers: Run everything that blocks.
        slices: Run everything else.
        verify: Whether to compare every byte read with the checksums.
    """

    def __init__(self, directory: Descriptor, path: str, workers: Workers, slices: Slices, *, verify: bool) -> None:
        self._directory = directory
        self._path = path
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
        path = os.path.join(self._path, MANIFEST_NAME)
        text = await self._workers.run(partial(self._manifest_text, path))
        manifest = await self._slices.run(read_manifest(text, path=path))
        files = LocalFiles(self._workers, self._slices, part_bytes=manifest.part_bytes)
        for record in manifest.files:
            with await self._workers.run(partial(self._open, record)) as file:
                await self._read(files, file, record)
        memory = Memory(self._records, self._data, path=path)
        await self._spread(memory, manifest.nodes)
        return await self._slices.run(TreeDecoder(manifest.nodes, memory, path=path).build())

    def _manifest_text(self, path: str) -> bytes:
        """Read the manifest. Blocks."""
        with InputFile(self._directory, MANIFEST_NAME, path=path) as file:
            if file.nbytes > MAX_MANIFEST_BYTES:
                raise CheckpointCorruptError(f"it is {file.nbytes} bytes long, too long for a manifest.", path=path)
            return _bytes(file, 0, file.nbytes)

    def _open(self, record: FileRecord) -> InputFile:
        """Open a file and compare its size. Blocks."""
        path = os.path.join(self._path, record.name)
        file = InputFile(self._directory, record.name, path=path)
        if file.nbytes != record.nbytes:
            file.close()
            raise CheckpointCorruptError(f"it is {file.nbytes} bytes long and not {record.nbytes}.", path=path)
        return file

    async def _read(self, files: LocalFiles, file: InputFile, record: FileRecord) -> None:
        """Read a file and keep its tensors."""
        contents: list[Content] = [Hole(file.nbytes)]
        if record.name.endswith(_SUFFIX):
            header = await self._workers.run(partial(_header, file))
            start = HEADER_LENGTH_BYTES + len(header)
            tensors = await self._slices.run(read_header(header, file.nbytes - start, path=file.path))
            contents = [Hole(start), *await self._slices.run(self._allocate(tensors, file))]
        if len(contents) > 1 or self._verify:
            await files.read(file, contents, record.digests if self._verify else None)

    def _allocate(self, records: Sequence[Record], file: InputFile) -> Generator[None, None, list[torch.Tensor]]:
        """Get memory for the tensors of a file."""
        found = []
        for index, record in enumerate(records):
            if record.name in self._records:
                raise CheckpointCorruptError(f"another file has the tensor {record.name!r} too.", path=file.path)
            try:
                data = torch.empty(record.stop - record.start, dtype=torch.uint8)
            except RuntimeError as error:
                raise HostMemoryError(f"no memory for the tensor {record.name!r}: {error}", path=file.path) from error
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


def _header(file: InputFile) -> bytes:
    """Read the header of a safetensors file, without the length before it. Blocks."""
    if file.nbytes < HEADER_LENGTH_BYTES:
        raise CheckpointCorruptError(f"it is only {file.nbytes} bytes long.", path=file.path)
    length = int.from_bytes(_bytes(file, 0, HEADER_LENGTH_BYTES), "little")
    if length > min(MAX_HEADER_BYTES, file.nbytes - HEADER_LENGTH_BYTES):
        raise CheckpointCorruptError(f"it says that its header is {length} bytes long.", path=file.path)
    return _bytes(file, HEADER_LENGTH_BYTES, length)


def _bytes(file: InputFile, offset: int, length: int) -> bytes:
    data = torch.empty(length, dtype=torch.uint8)
    file.read(data, offset)
    return data.numpy().tobytes()
