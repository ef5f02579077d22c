"""Writing a staged tree: first everything that may be refused, then files in a draft, then the draft's publication."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Workers
from aiostage.checkpoint.blocks import FileTensor, file_tensors, groups, measure
from aiostage.checkpoint.encode import TreeEncoder
from aiostage.checkpoint.layout import INDEX_NAME, TensorFile, index_content, tensor_files
from aiostage.checkpoint.progress import SaveProgress
from aiostage.observe import span
from aiostage.storage.commit import MANIFEST_NAME, Draft, check_target
from aiostage.storage.local import IO_THREADS, FileRecord, LocalFiles
from aiostage.storage.manifest import write_manifest

__all__ = ["MAX_HOLD", "CheckpointWriter", "Written"]

MAX_HOLD = 0.001
"""How long preparations may hold the event loop at a time, in seconds."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer has written.

    Attributes:
        nbytes: Size of the tensors, in bytes; memory that several leaves share counts once.
        leaves: How many tensors the tree has.
        files: In the order in which they were written.
    """

    nbytes: int
    leaves: int
    files: tuple[FileRecord, ...]


class CheckpointWriter:
    """Writes one checkpoint.

    Args:
        target: The directory to make.
        overwrite: Whether a checkpoint that is there may be replaced.
        max_shard_bytes: How many bytes of tensors one file may hold.
        progress: Called on the event loop as parts are written.
    """

    def __init__(
        self,
        target: str,
        *,
        overwrite: bool,
        max_shard_bytes: int,
        progress: Callable[[SaveProgress], object] | None,
    ) -> None:
        self._target = target
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._progress = progress
        self._workers = Workers(IO_THREADS, "aiostage-save")
        self._slices = Slices(MAX_HOLD)
        self._files = LocalFiles(self._workers, self._slices)
        self._written = self._total = 0

    async def check(self) -> str:
        """Find out early whether the target may be written to.

        Returns:
            The absolute path of the target, links followed, so that replacing it leaves a link to it in place.

        Raises:
            CheckpointExistsError: If it may not.
        """
        self._target = await self._workers.run(partial(os.path.realpath, self._target))
        await self._workers.run(partial(check_target, self._target, overwrite=self._overwrite))
        return self._target

    async def write(self, staged: Any) -> Written:
        """Write a tree and publish it.

        Args:
            staged: In host memory; does not change until this returns.

        Returns:
            What was written.

        Raises:
            UnsupportedLeafError: If something cannot be carried; nothing was written.
            CheckpointExistsError: If something has appeared at the target meanwhile.
            OSError: If the file system refuses.

        May be cancelled: then either everything was published already, or nothing of it is left.
        """
        encoder = TreeEncoder()
        with span("layout"):
            await self._slices.run(encoder.walk(staged))
            tensors = await self._file_tensors(encoder)
            tensor_bytes = sum(tensor.nbytes for tensor in tensors)
            shards = await self._slices.run(tensor_files(tensors, self._max_shard_bytes))
        self._total = sum(content.nbytes for shard in shards for content in shard.contents)
        async with self._draft() as draft:
            records = [
                await self._files.write(draft.path, shard.name, shard.contents, wrote=self._wrote) for shard in shards
            ]
            if len(shards) > 1:
                records.append(await self._write_index(draft, shards))
            manifest = await self._slices.run(
                write_manifest(
                    nbytes=tensor_bytes,
                    leaves=len(encoder.tensors),
                    part_bytes=self._files.part_bytes,
                    files=records,
                    nodes=encoder.lines(),
                )
            )
            with span("commit"):
                contents = [torch.frombuffer(manifest, dtype=torch.uint8)]
                records.append(await self._files.write(draft.path, MANIFEST_NAME, contents))
                await self._workers.run(partial(draft.publish, overwrite=self._overwrite))
        return Written(tensor_bytes, len(encoder.tensors), tuple(records))

    def close(self) -> None:
        """Let the threads end."""
        self._workers.stop()

    async def _file_tensors(self, encoder: TreeEncoder) -> list[FileTensor]:
        """Decide what goes into files for the tree's tensors."""
        leaves, starts, stops = await self._slices.run(measure(encoder.tensors))
        overlapping = await self._workers.run(partial(groups, starts, stops))
        return await self._slices.run(file_tensors(leaves, overlapping))

    async def _write_index(self, draft: Draft, shards: Sequence[TensorFile]) -> FileRecord:
        contents = await self._slices.run(index_content(shards))
        return await self._files.write(draft.path, INDEX_NAME, contents)

    def _wrote(self, nbytes: int) -> None:
        """Report progress."""
        self._written += nbytes
        if self._progress is not None:
            name = os.path.basename(self._target)
            self._progress(
                SaveProgress(name=name, total_bytes=self._total, staged_bytes=self._total, written_bytes=self._written)
            )

    @asynccontextmanager
    async def _draft(self) -> AsyncIterator[Draft]:
        """Make a draft that is gone afterwards, unless it was published."""
        made: list[Draft] = []
        try:
            # Its making may be cancelled after it was made, so that its result would be lost.
            await self._workers.run(lambda: made.append(Draft(self._target)))
            yield made[0]
        except BaseException as error:
            job = self._workers.job()
            for draft in made:
                job.put(draft.discard)
            job.close()
            # A coroutine that is being closed may not wait; the job is done all the same.
            if not isinstance(error, GeneratorExit):
                await finish(job.settled)
            raise
