"""Writing and reading local files in parts, from worker threads, with digests computed while the bytes are hot."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Job, Workers
from aiostage.errors import CheckpointCorruptError
from aiostage.observe import span
from aiostage.storage.files import DIRECT_ALIGNMENT, InputFile, OutputFile, aligned_buffer, is_aligned
from aiostage.storage.parts import PART_BYTES, Content, Part, cut, digest, gather, scatter, whole

__all__ = ["IO_THREADS", "FileRecord", "LocalFiles"]

IO_THREADS = 2
"""Measured on a local disk: a second thread fills the pauses of the first, more bring nothing."""

_DIRECT_FROM = 1 << 20
"""Smaller files go through the page cache: direct I/O saves nothing there."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file that was written.

    Attributes:
        name: In its directory.
        nbytes: How long it is.
        digests: Of its parts, in order, in hexadecimal.
    """

    name: str
    nbytes: int
    digests: tuple[str, ...]


class LocalFiles:
    """Reads and writes the files of one save or load.

    Holds as many buffers of one part as there are threads, whatever the size of the files.

    Args:
        workers: Run everything that blocks.
        slices: Run the preparations on the event loop.
        part_bytes: How much is written, read and checked at once.
    """

    def __init__(self, workers: Workers, slices: Slices, *, part_bytes: int = PART_BYTES) -> None:
        self.part_bytes = part_bytes
        self._workers = workers
        self._slices = slices
        self._buffers: list[torch.Tensor] = []

    async def write(
        self, directory: str, name: str, contents: Sequence[Content], *, wrote: Callable[[int], None] | None = None
    ) -> FileRecord:
        """Write one file and wait until it is on the disk.

        Args:
            directory: Where.
            name: Of the new file.
            contents: The whole file, as tensors in host memory. They are read until this returns.
            wrote: Called on the event loop with the number of bytes that have been written since the last call.

        Returns:
            What was written.

        Raises:
            OSError: If the file system refuses.

        When cancelled, waits for the parts that are being written and leaves an incomplete file.
        """
        parts = await self._slices.run(cut(contents, self.part_bytes))
        nbytes = parts[-1].offset + parts[-1].nbytes
        path = f"{directory}/{name}"
        with span("write", file=name, nbytes=nbytes, parts=len(parts)):
            file = await self._workers.run(partial(OutputFile, path, nbytes, direct=nbytes >= _DIRECT_FROM))
            with file:
                digests = [""] * len(parts)
                await self._perform(partial(self._write_part, file, digests), parts, wrote)
                await self._workers.run(file.finish)
        return FileRecord(name, nbytes, tuple(digests))

    async def read(self, file: InputFile, contents: Sequence[Content], digests: Sequence[str] | None) -> None:
        """Read one file into memory, and compare its digests on the way.

        Args:
            file: Open, and as long as its contents.
            contents: The whole file, as contiguous tensors in host memory and holes.
            digests: Of its parts; None to believe what is read.

        Raises:
            CheckpointCorruptError: If a digest differs, or the file ends early; the memory is then undefined.
            OSError: If the file cannot be read.

        When cancelled, waits for the parts that are being read; the memory is then undefined.
        """
        parts = await self._slices.run(cut(contents, self.part_bytes))
        with span("read", file=os.path.basename(file.path), nbytes=file.nbytes, parts=len(parts)):
            await self._perform(partial(self._read_part, file, digests), parts)

    async def _perform(
        self, step: Callable[[Part], None], parts: Sequence[Part], done: Callable[[int], None] | None = None
    ) -> None:
        """Run a step for each part in worker threads."""
        job = self._workers.job()
        try:
            await self._slices.run(_submit(job, step, parts))
            job.close()
            reported = 0
            while done is not None and reported < len(parts):
                await job.progressed(reported)
                if job.error is not None:
                    break
                count = job.done
                # Parts may end out of order, but all of them except the last have one size.
                done(sum(part.nbytes for part in parts[reported:count]))
                reported = count
        except BaseException as error:
            job.cancel()
            # A coroutine that is being closed may not wait; the running steps keep what they touch alive.
            if not isinstance(error, GeneratorExit):
                await finish(job.settled)
            raise
        try:
            await job.join()
        finally:
            # An error's traceback has this frame in it, which must not lead back to the error.
            del job

    def _write_part(self, file: OutputFile, digests: list[str], part: Part) -> None:
        """Write one part. Runs in a worker thread."""
        data = whole(part)
        if data is not None and (not file.direct or is_aligned(data)):
            self._digest_and_write(file, digests, part, data)
            return
        buffer = self._take_buffer()
        with span("gather", nbytes=part.nbytes):
            gather(part, buffer)
        padding = -part.nbytes % DIRECT_ALIGNMENT if file.direct else 0
        buffer[part.nbytes : part.nbytes + padding].zero_()
        self._digest_and_write(file, digests, part, buffer[: part.nbytes + padding])
        self._buffers.append(buffer)

    def _digest_and_write(self, file: OutputFile, digests: list[str], part: Part, data: torch.Tensor) -> None:
        with span("digest", nbytes=part.nbytes):
            digests[part.index] = digest(data[: part.nbytes])
        with span("write part", offset=part.offset, nbytes=part.nbytes):
            file.write(data, part.offset)

    def _read_part(self, file: InputFile, digests: Sequence[str] | None, part: Part) -> None:
        """Read and check one part. Runs in a worker thread."""
        data = whole(part)
        if data is not None:
            _read_and_check(file, part, data, digests)
            return
        buffer = self._take_buffer()
        _read_and_check(file, part, buffer[: part.nbytes], digests)
        scatter(part, buffer)
        self._buffers.append(buffer)

    def _take_buffer(self) -> torch.Tensor:
        """Return a buffer of one part. Runs in a worker thread."""
        try:
            return self._buffers.pop()
        except IndexError:
            return aligned_buffer(self.part_bytes)


def _submit(job: Job, step: Callable[[Part], None], parts: Sequence[Part]) -> Generator[None, None, None]:
    for part in parts:
        job.put(partial(step, part))
        yield


def _read_and_check(file: InputFile, part: Part, data: torch.Tensor, digests: Sequence[str] | None) -> None:
    with span("read part", offset=part.offset, nbytes=part.nbytes):
        file.read(data, part.offset)
    if digests is None:
        return
    with span("digest", nbytes=part.nbytes):
        found = digest(data)
    if found != digests[part.index]:
        raise CheckpointCorruptError(
            f"bytes {part.offset} to {part.offset + part.nbytes} do not match their checksum.", path=file.path
        )
