"""Verifies a checkpoint without loading it: every part is read and has no destination."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiostage._loop.workers import Workers
from aiostage.checkpoint.part_reader import THREADS, ReadTargets
from aiostage.checkpoint.progress import LoadProgress, ProgressOption, reporting
from aiostage.checkpoint.reader import CheckpointReader, Outline, open_checkpoint
from aiostage.observe import span
from aiostage.storage.locate import Target, locate

__all__ = ["opened", "outline_of", "verify"]


async def verify(source: Target, *, progress: ProgressOption[LoadProgress] = None) -> Outline:
    """Read a checkpoint and compare every byte with its checksums, in about 64 MiB of memory.

    Bytes that lie in other checkpoints are read there.

    Args:
        source: Where :func:`~aiostage.save` has put it.
        progress: As for :func:`~aiostage.load`.

    Returns:
        What it consists of.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint, or it was replaced meanwhile.
        CheckpointCorruptError: If a file is missing, damaged, incomplete or foreign, with the file.
        OSError: If the storage refuses.

    May be cancelled; nothing is left behind then.
    """
    async with opened(source, progress=progress) as (checkpoint, outline):
        await checkpoint.read(await checkpoint.plan(outline, {}, everything=True))
        return outline


async def outline_of(source: Target) -> Outline:
    """Read everything of a checkpoint but the elements of its tensors.

    Args:
        source: Where :func:`~aiostage.save` has put it.

    Returns:
        What it consists of.

    Raises:
        CheckpointNotFoundError: As :func:`verify` does.
        CheckpointCorruptError: If the manifest or a header is missing, damaged, incomplete or foreign.
        OSError: If the storage refuses.

    May be cancelled; nothing is left behind then.
    """
    async with opened(source) as (_, outline):
        return outline


@asynccontextmanager
async def opened(
    source: Target, *, progress: ProgressOption[LoadProgress] = None
) -> AsyncGenerator[tuple[CheckpointReader, Outline], None]:
    """Open a checkpoint, and read everything but the elements of its tensors.

    Args:
        source: Where :func:`~aiostage.save` has put it.
        progress: As for :func:`~aiostage.load`.

    Yields:
        What reads the elements, into host memory, and what the checkpoint consists of.

    Raises:
        Exception: The errors of :func:`outline_of`.
    """
    storage, name = locate(source)
    with span("verify", source=name), reporting(progress, f"verifying {name}") as report:
        workers = Workers(THREADS, "aiostage-load")

        def progressed(read_bytes: int, total_bytes: int) -> None:
            if report is not None:
                report(LoadProgress(name=name, total_bytes=total_bytes, read_bytes=read_bytes))

        nowhere = ReadTargets(workers)
        reader = await open_checkpoint(storage, name)
        try:
            checkpoint = CheckpointReader(reader, workers, workers.run, nowhere, verify=True, progress=progressed)
            outline = await checkpoint.open()
            await checkpoint.names(outline, None, None)
            yield checkpoint, outline
        finally:
            await reader.aclose()
            nowhere.close()
            workers.stop()
