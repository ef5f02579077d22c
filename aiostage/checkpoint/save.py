"""A tree to a checkpoint that appears whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from aiostage._loop.together import together
from aiostage.abc import CheckpointStager, Draft, Storage
from aiostage.checkpoint.progress import ProgressOption, SaveProgress, reporting
from aiostage.checkpoint.writer import CheckpointWriter, Written, give_up
from aiostage.observe import span
from aiostage.snapshot import Snapshot
from aiostage.stager import AsyncStager, check_stager
from aiostage.storage.locate import Target, locate
from aiostage.storage.parts import DIGEST_NAME, digest_of_parts

__all__ = ["DEFAULT_SHARD_BYTES", "CheckpointInfo", "save", "write_checkpoint"]

_logger = logging.getLogger("aiostage")

DEFAULT_SHARD_BYTES = 5 * 10**9
"""5 GB: what hubs and file systems take without special care."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What was saved.

    Attributes:
        location: Where it is: an absolute path, or a URL.
        nbytes: Size of the tensors, in bytes; memory that several leaves share counts once.
        leaves: How many tensors the tree has.
        written_bytes: Size of the files that were written, in bytes. If only what has changed was written, it may be
            far less than ``nbytes``.
        files: The names of all files, the manifest last.
        checksums: For each file the digest of its parts' digests, or of itself if it has one part only, for example
            ``"xxh3_64:0123456789abcdef"``.
        captured: Seconds from the call until the source could be changed again.
        committed: Seconds from the call until the checkpoint was complete and safe on the disk.
    """

    location: str
    nbytes: int
    leaves: int
    written_bytes: int
    files: tuple[str, ...]
    checksums: Mapping[str, str]
    captured: float
    committed: float

    @property
    def path(self) -> Path:
        """The directory, of a checkpoint on a local disk.

        Raises:
            ValueError: If it is elsewhere.
        """
        if "://" in self.location:
            raise ValueError(f"{self.location} is not on a local disk and has no path")
        return Path(self.location)


async def save(
    state_dict: Any,
    target: Target,
    *,
    stager: CheckpointStager | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressOption[SaveProgress] = None,
) -> CheckpointInfo:
    """Stage a tree and write it to a storage, where it appears whole or not at all.

    Args:
        state_dict: A tree of tensors, scalars and plain containers; or a :class:`~aiostage.Snapshot` that was
            entered, whose staged tree is then written without another copy.
        target: Where: the directory to make, with its parents if need be; a URL such as ``s3://bucket/runs/7``; or a
            pair of a storage (or what makes one: a path, a URL, a store of obstore) and a name in it.
        stager: Takes the copy. None: one is made for this call. A stager of your own uses its memory again in the
            next save.
        overwrite: Replace a checkpoint that is already there, in one step.
        max_shard_bytes: How many bytes of tensors one file may hold; a larger tensor has a file of its own.
        progress: True shows a progress bar (with tqdm). A function is called on the event loop as parts are written;
            what it raises ends the save.

    Returns:
        What was saved, once it is complete and safe where it is.

    Raises:
        CheckpointExistsError: If there is something at the target and it may not be, or is no checkpoint. This is
            found out before anything is staged, and again when everything is written.
        UnsupportedLeafError: If something in the tree cannot be staged or carried; nothing was written.
        TornSnapshotError: If the tree changed before it was captured.
        HostMemoryError: If memory for the copy cannot be had.
        OSError: If the storage refuses.

    May be cancelled at any time: then either the checkpoint was complete already, or nothing of it is left.
    """
    begin = perf_counter()
    check_stager(stager)
    storage, name = locate(target)
    with span("save", target=name):
        own = AsyncStager()
        # Called before anything is awaited: the moment of the copy is the caller's.
        source = _source(state_dict, stager if stager is not None else own)
        captured: list[float] = []

        async def write(writer: CheckpointWriter, draft: Draft) -> Written:
            if not isinstance(source, Snapshot):
                staged = await source
                captured.append(perf_counter())
                return await writer.write(draft, staged)
            async with nullcontext() if source is state_dict else source:
                return await _stream(writer, draft, source, captured)

        try:
            written = await _write(write, storage, name, overwrite, max_shard_bytes, progress)
        finally:
            if not isinstance(source, Snapshot):
                source.close()
            await own.aclose()
    return _info(written, captured[0] - begin, perf_counter() - begin)


def _source(state_dict: Any, stager: CheckpointStager) -> Snapshot[Any] | Coroutine[Any, Any, Any]:
    """Return a snapshot, whose bytes can be written as they land, or else a coroutine that returns a staged tree."""
    if isinstance(state_dict, Snapshot):
        return state_dict
    return stager.snapshot(state_dict, streamed=True) if isinstance(stager, AsyncStager) else stager.stage(state_dict)


async def _stream(writer: CheckpointWriter, draft: Draft, snapshot: Snapshot[Any], captured: list[float]) -> Written:
    """Write a snapshot while it is being taken, and note when it is captured."""
    written: list[Written] = []

    async def write() -> None:
        written.append(await writer.write(draft, await snapshot.outline(), snapshot))

    async def capture() -> None:
        await snapshot.fill()
        await snapshot.captured()
        captured.append(perf_counter())

    await together(capture, write)
    return written[0]


async def write_checkpoint(
    staged: Any,
    target: Target,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressOption[SaveProgress] = None,
) -> CheckpointInfo:
    """Write a tree that nobody changes, without taking a copy first.

    Args:
        staged: A tree in host memory, such as a stager's result. It must not change until this returns.
        target: As for :func:`save`.
        overwrite: As for :func:`save`.
        max_shard_bytes: As for :func:`save`.
        progress: As for :func:`save`.

    Returns:
        What was saved; ``captured`` is 0.

    Raises:
        CheckpointExistsError: As for :func:`save`.
        UnsupportedLeafError: If something in the tree cannot be carried; nothing was written.
        OSError: If the storage refuses.

    May be cancelled as :func:`save` may.
    """
    begin = perf_counter()
    storage, name = locate(target)

    async def write(writer: CheckpointWriter, draft: Draft) -> Written:
        return await writer.write(draft, staged)

    with span("save", target=name):
        written = await _write(write, storage, name, overwrite, max_shard_bytes, progress)
    return _info(written, 0.0, perf_counter() - begin)


async def _write(
    write: Callable[[CheckpointWriter, Draft], Awaitable[Written]],
    storage: Storage,
    name: str,
    overwrite: bool,
    max_shard_bytes: int,
    progress: ProgressOption[SaveProgress],
) -> Written:
    """Write into a draft that is gone afterwards, unless it was committed."""
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be above 0, not {max_shard_bytes!r}")
    with reporting(progress, f"saving {name}") as report:
        writer = CheckpointWriter(name, max_shard_bytes=max_shard_bytes, progress=report)
        try:
            draft = await storage.open(name, overwrite=overwrite)
            try:
                return await write(writer, draft)
            except BaseException as error:
                await give_up(draft, error)
                raise
        finally:
            writer.close()


def _info(written: Written, captured: float, committed: float) -> CheckpointInfo:
    _logger.info("saved %s: %d bytes in %d leaves, %.3f s", written.location, written.nbytes, written.leaves, committed)
    return CheckpointInfo(
        location=written.location,
        nbytes=written.nbytes,
        leaves=written.leaves,
        written_bytes=sum(file.nbytes for file in written.files),
        files=tuple(file.name for file in written.files),
        checksums={file.name: f"{DIGEST_NAME}:{digest_of_parts(file.digests)}" for file in written.files},
        captured=captured,
        committed=committed,
    )
