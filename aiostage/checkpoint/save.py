"""A tree to a directory that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from aiostage.abc import CheckpointStager
from aiostage.checkpoint.progress import ProgressOption, SaveProgress, reporting
from aiostage.checkpoint.writer import CheckpointWriter, Written
from aiostage.observe import span
from aiostage.snapshot import Snapshot
from aiostage.stager import AsyncStager
from aiostage.storage.parts import DIGEST_NAME, digest_of_parts

__all__ = ["DEFAULT_SHARD_BYTES", "CheckpointInfo", "save", "write_checkpoint"]

DEFAULT_SHARD_BYTES = 5 * 10**9
"""5 GB: what hubs and file systems take without special care."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What was saved.

    Attributes:
        path: The directory, absolute.
        nbytes: Size of the tensors, in bytes; memory that several leaves share counts once.
        leaves: How many tensors the tree has.
        files: The names of all files, the manifest last.
        checksums: For each file the digest of its parts' digests, or of itself if it has one part only, for example
            ``"xxh3_64:0123456789abcdef"``.
        captured: Seconds from the call until the source could be changed again.
        committed: Seconds from the call until the checkpoint was complete and safe on the disk.
    """

    path: Path
    nbytes: int
    leaves: int
    files: tuple[str, ...]
    checksums: Mapping[str, str]
    captured: float
    committed: float


async def save(
    state_dict: Any,
    target: str | os.PathLike[str],
    *,
    stager: CheckpointStager | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressOption[SaveProgress] = None,
) -> CheckpointInfo:
    """Stage a tree and write it to a directory, which appears whole or not at all.

    Args:
        state_dict: A tree of tensors, scalars and plain containers; or a :class:`~aiostage.Snapshot` that was
            entered, whose staged tree is then written without another copy.
        target: The directory to make. Missing parents are made.
        stager: Takes the copy. None: one is made for this call. A stager of your own uses its memory again in the
            next save.
        overwrite: Replace a checkpoint that is already there, in one step.
        max_shard_bytes: How many bytes of tensors one file may hold; a larger tensor has a file of its own.
        progress: True shows a progress bar (with tqdm). A function is called on the event loop as parts are written;
            what it raises ends the save.

    Returns:
        What was saved, once it is complete and safe on the disk.

    Raises:
        CheckpointExistsError: If there is something at the target and it may not be, or is no checkpoint. This is
            found out before anything is staged, and again when everything is written.
        UnsupportedLeafError: If something in the tree cannot be staged or carried; nothing was written.
        TornSnapshotError: If the tree changed before it was captured.
        HostMemoryError: If memory for the copy cannot be had.
        OSError: If the file system refuses.

    May be cancelled at any time: then either the checkpoint was complete already, or nothing of it is left.
    """
    begin = perf_counter()
    with span("save", target=os.fsdecode(target)), reporting(progress, f"saving {_name(target)}") as report:
        writer = _writer(target, overwrite, max_shard_bytes, report)
        own = AsyncStager()
        # Called before anything is awaited: the moment of the copy is the caller's.
        staging = state_dict.result() if isinstance(state_dict, Snapshot) else (stager or own).stage(state_dict)
        staged: Any = None
        try:
            path = await writer.check()
            staged = await staging
            captured = perf_counter() - begin
            written = await writer.write(staged)
        finally:
            staging.close()
            writer.close()
            # Otherwise the stager would be closed before its memory has come back.
            staged = None
            await own.aclose()
    return _info(path, written, captured, perf_counter() - begin)


async def write_checkpoint(
    staged: Any,
    target: str | os.PathLike[str],
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
        OSError: If the file system refuses.

    May be cancelled as :func:`save` may.
    """
    begin = perf_counter()
    with span("save", target=os.fsdecode(target)), reporting(progress, f"saving {_name(target)}") as report:
        writer = _writer(target, overwrite, max_shard_bytes, report)
        try:
            path = await writer.check()
            written = await writer.write(staged)
        finally:
            writer.close()
    return _info(path, written, 0.0, perf_counter() - begin)


def _name(target: str | os.PathLike[str]) -> str:
    """Return what a checkpoint is called where there is little room."""
    return os.path.basename(os.fsdecode(target).rstrip("/"))


def _writer(
    target: str | os.PathLike[str],
    overwrite: bool,
    max_shard_bytes: int,
    progress: Callable[[SaveProgress], object] | None,
) -> CheckpointWriter:
    """Check the arguments."""
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be above 0, not {max_shard_bytes!r}")
    return CheckpointWriter(
        os.fsdecode(target), overwrite=overwrite, max_shard_bytes=max_shard_bytes, progress=progress
    )


def _info(path: str, written: Written, captured: float, committed: float) -> CheckpointInfo:
    return CheckpointInfo(
        path=Path(path),
        nbytes=written.nbytes,
        leaves=written.leaves,
        files=tuple(file.name for file in written.files),
        checksums={file.name: f"{DIGEST_NAME}:{digest_of_parts(file.digests)}" for file in written.files},
        captured=captured,
        committed=committed,
    )
