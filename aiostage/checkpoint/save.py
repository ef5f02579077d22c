"""Saves a tree to a checkpoint that appears complete or not at all."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from traceback import clear_frames
from typing import Any, TypeAlias

from aiostage._arguments import check_flags, states_of
from aiostage._loop.coroutines import give_up, named, run_concurrently
from aiostage.abc import CheckpointStager, PendingCheckpoint, Storage
from aiostage.checkpoint.load import load
from aiostage.checkpoint.progress import ProgressOption, SaveProgress, reporting
from aiostage.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointInfo, CheckpointWriter, file_options
from aiostage.format.registry import is_value
from aiostage.observe import OpenSpan, span, start_span, within
from aiostage.snapshot import Snapshot
from aiostage.stager import AsyncStager, check_stager
from aiostage.storage.locate import Target, locate

__all__ = ["convert", "pending_checkpoint", "save", "source_of", "write_checkpoint"]

_logger = logging.getLogger("aiostage")

_Write: TypeAlias = "Callable[[], Awaitable[CheckpointInfo]]"
_Writing: TypeAlias = "tuple[CheckpointWriter, _Write]"
"""What plans a checkpoint, and what writes it to its pending checkpoint."""


def save(
    state_dict: Any,
    target: Target,
    *,
    stager: CheckpointStager | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    duplicate_tied: bool = False,
    progress: ProgressOption[SaveProgress] = None,
) -> Coroutine[Any, Any, CheckpointInfo]:
    """Return a coroutine that stages a tree and writes it to a storage, where it appears whole or not at all.

    A plain function: the copy follows what the caller's current streams had been given at the call, also if the
    coroutine is started later by a task.

    Args:
        state_dict: A tree of tensors, scalars and plain containers; or a :class:`~aiostage.Snapshot` that was
            entered, whose staged tree is then written without another copy. It, or a value of it if it is a dict, may
            be an object with ``state_dict`` and ``load_state_dict`` (DCP's ``Stateful``, such as a module or an
            optimizer), which is asked for its state at the call.
        target: Where: the directory to make, with its parents if need be; a URL such as ``s3://bucket/runs/7``; or a
            pair of a storage (or what makes one: a path, a URL, a store of obstore) and a name in it.
        stager: Takes the copy. None: one is made for this call. A stager of your own uses its memory again in the
            next save.
        overwrite: Replace a checkpoint that is already there, in one step.
        max_shard_bytes: How many bytes of tensors one file may hold; a larger tensor has a file of its own.
        duplicate_tied: Write tensors that share memory once for each of their names, for programs that read the
            safetensors files alone and know no ties. :func:`load` ties them again. False: such memory is written once.
        progress: True shows a progress bar (with tqdm). A function is called on the event loop as parts are written;
            what it raises ends the save.

    Returns:
        What was saved, once it is complete and safe where it is.

    Raises:
        CheckpointExistsError: If there is something at the target and it may not be, or is not a checkpoint. This is
            found out before anything is staged, and again when everything is written.
        UnsupportedLeafError: If something in the tree cannot be staged or carried; nothing was written.
        TornSnapshotError: If the tree changed before it was captured.
        HostMemoryError: If memory for the copy cannot be had.
        OSError: If the storage refuses.
        TypeError: If an argument has the wrong type; ``overwrite`` has to be a bool.
        ValueError: If the target names no checkpoint, or ``max_shard_bytes`` is not above 0.

    May be cancelled at any time: then either the checkpoint was complete already, or nothing of it is left.
    """
    # Arguments first: after start_span() and source_of() something would have to be undone.
    check_stager(stager)
    storage, name = locate(target)
    started = perf_counter()
    own = None
    if stager is None and not isinstance(state_dict, Snapshot):
        stager = own = AsyncStager()
    opened = start_span("save", target=name)
    with within(opened):
        # Called here, before anything is awaited, so that the copy follows the streams of the caller at the call. A
        # snapshot without a stager is one that the caller has entered.
        source = state_dict if stager is None or isinstance(state_dict, Snapshot) else source_of(state_dict, stager)
    writing = _writing(storage, name, overwrite, max_shard_bytes, duplicate_tied, progress)
    return named(_save(state_dict, source, own, writing, started, opened), "save", source)


async def _save(
    state_dict: Any,
    source: Snapshot[Any] | Coroutine[Any, Any, Any],
    own: AsyncStager | None,
    writing: AbstractAsyncContextManager[_Writing],
    started: float,
    opened: OpenSpan | None,
) -> CheckpointInfo:
    captured: list[float] = []
    with within(opened), opened if opened is not None else nullcontext():
        try:
            async with writing as (writer, write):
                if isinstance(source, Snapshot):
                    async with nullcontext() if source is state_dict else source:
                        info = await _stream(writer, write, source, captured)
                else:
                    staged = await source
                    captured.append(perf_counter())
                    await writer.plan(staged)
                    info = await write()
        except BaseException as error:
            # The locals of its frames refer to the staged copy, so code that keeps the error would keep the memory: a
            # failed task does, in a circle with the frame that has awaited it.
            clear_frames(error.__traceback__)
            raise
        finally:
            # A coroutine that was never awaited, because the storage has refused first. Otherwise this does nothing.
            if not isinstance(source, Snapshot):
                source.close()
            if own is not None:
                await own.aclose()
    return _timed(info, captured[0] - started, perf_counter() - started)


def source_of(state_dict: Any, stager: CheckpointStager) -> Snapshot[Any] | Coroutine[Any, Any, Any]:
    """Begin to stage a tree, at this moment.

    Returns:
        A snapshot to be entered, whose bytes can be written as they are copied, or a coroutine that returns a staged
        tree.
    """
    state_dict = states_of(state_dict, is_value)
    return stager.snapshot(state_dict, streamed=True) if isinstance(stager, AsyncStager) else stager.stage(state_dict)


async def _stream(
    writer: CheckpointWriter, write: _Write, snapshot: Snapshot[Any], captured: list[float]
) -> CheckpointInfo:
    """Write a snapshot while it is being taken, and note when it is captured."""
    written: list[CheckpointInfo] = []

    async def plan_and_write() -> None:
        await writer.plan(await snapshot.outline(), snapshot)
        written.append(await write())

    async def capture() -> None:
        await snapshot.fill()
        await snapshot.captured()
        captured.append(perf_counter())

    # Side by side: the writer asks for bytes while the copy is being filled, and a failure of one cancels the other.
    await run_concurrently(capture, plan_and_write)
    return written[0]


async def write_checkpoint(
    staged: Any,
    target: Target,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    duplicate_tied: bool = False,
    progress: ProgressOption[SaveProgress] = None,
) -> CheckpointInfo:
    """Write a tree that does not change meanwhile, without taking a copy first.

    Args:
        staged: A tree in host memory, such as a stager's result. It must not change until this returns.
        target: As for :func:`save`.
        overwrite: As for :func:`save`.
        max_shard_bytes: As for :func:`save`.
        duplicate_tied: As for :func:`save`.
        progress: As for :func:`save`.

    Returns:
        What was saved; ``captured`` is 0.

    Raises:
        CheckpointExistsError: As for :func:`save`.
        UnsupportedLeafError: If something in the tree cannot be carried; nothing was written.
        OSError: If the storage refuses.

    May be cancelled as :func:`save` may.
    """
    started = perf_counter()
    storage, name = locate(target)
    with span("save", target=name):
        async with _writing(storage, name, overwrite, max_shard_bytes, duplicate_tied, progress) as (writer, write):
            await writer.plan(staged)
            info = await write()
    return _timed(info, 0.0, perf_counter() - started)


async def convert(
    source: Target,
    target: Target,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    duplicate_tied: bool = False,
    verify: bool = True,
) -> CheckpointInfo:
    """Read a checkpoint, of any format that :func:`load` reads, and write it as one of aiostage.

    Args:
        source: As for :func:`load`.
        target: As for :func:`save`.
        overwrite: As for :func:`save`.
        max_shard_bytes: As for :func:`save`.
        duplicate_tied: As for :func:`save`.
        verify: As for :func:`load`.

    Returns:
        What was written.

    Raises:
        Exception: The errors of :func:`load` and :func:`save`. All of it is in host memory meanwhile.

    May be cancelled as :func:`save` may.
    """
    tree = await load(source, verify=verify)
    return await write_checkpoint(
        tree, target, overwrite=overwrite, max_shard_bytes=max_shard_bytes, duplicate_tied=duplicate_tied
    )


@asynccontextmanager
async def _writing(
    storage: Storage,
    name: str,
    overwrite: bool,
    max_shard_bytes: int,
    duplicate_tied: bool,
    progress: ProgressOption[SaveProgress],
) -> AsyncGenerator[_Writing, None]:
    """Open a pending checkpoint that is gone afterwards, unless it was committed."""
    check_flags(overwrite=overwrite)
    writer = CheckpointWriter(name, file_options(max_shard_bytes=max_shard_bytes, duplicate_tied=duplicate_tied))
    try:
        opening = partial(storage.open, name, overwrite=overwrite)
        async with pending_checkpoint(name, opening, progress) as (pending, report):
            yield writer, partial(writer.write, pending, report)
        # Only after success: it waits for a thread, which an error should not do. close() is enough then.
        await writer.aclose()
    finally:
        writer.close()


@asynccontextmanager
async def pending_checkpoint(
    name: str, opening: Callable[[], Awaitable[PendingCheckpoint]], progress: ProgressOption[SaveProgress] = None
) -> AsyncGenerator[tuple[PendingCheckpoint, Callable[[SaveProgress], object] | None], None]:
    """Open a pending checkpoint, which is aborted if the block raises, and what its progress is reported to.

    Args:
        name: What the checkpoint is called, for reports of the progress.
        opening: Opens it.
        progress: As for :func:`save`.

    Raises:
        Exception: What ``opening`` raises.
    """
    with reporting(progress, f"saving {name}") if progress is not None else nullcontext() as report:
        pending = await opening()
        try:
            yield pending, report
        except BaseException as error:
            await give_up(pending.abort(), error)
            raise


def _timed(info: CheckpointInfo, captured: float, committed: float) -> CheckpointInfo:
    _logger.info("saved %s: %d bytes in %d leaves, %.3f s", info.location, info.nbytes, info.leaves, committed)
    return replace(info, captured=captured, committed=committed)
