"""DCP's save on a staged copy, beside a running event loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Coroutine, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import anyio
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.checkpoint.storage import StorageWriter as TorchStorageWriter

from aiostage import _private
from aiostage._arguments import check_optional, is_stateful
from aiostage._loop.coroutines import Finalizer, named
from aiostage.abc import CheckpointStager
from aiostage.dcp.group_queue import DEFAULT_TIMEOUT, Action, QueuedOperation, operation_for
from aiostage.dcp.storage import StorageWriter
from aiostage.errors import StagingError
from aiostage.stager import AsyncStager, check_stager

__all__ = ["AsyncSaveResponse", "begin_save", "save", "start_save", "writing"]


class AsyncSaveResponse:
    """A save in progress, which can be awaited at two moments. Made by :func:`start_save`.

    Awaiting either moment stages the state. Then the save continues in a thread, with or without a waiter. A response
    that is dropped before saves nothing, warns, and reports this to the other ranks.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        stager: CheckpointStager | None,
        call: QueuedOperation[Metadata],
        write: Callable[[Any], Action[Metadata]],
        *,
        warn_if_dropped: bool,
    ) -> None:
        self._call = call
        self._write = write
        self._capturing = anyio.Lock()
        self._captured = False
        self._failure: Exception | None = None
        self._own: AsyncStager | None = None
        try:
            check_stager(stager)
            if not isinstance(state_dict, Mapping):
                raise TypeError(f"DCP saves a dict of names, not {type(state_dict).__qualname__}; put it into one")
            # Called now: the copy is that of the state at the call. One level, as in DCP.
            now = {key: item.state_dict() if is_stateful(item) else item for key, item in state_dict.items()}
            if stager is None:
                stager = self._own = AsyncStager()
            self._staging: Coroutine[Any, Any, Any] = stager.stage(now)
        except Exception as error:
            # captured() raises it and reports it to the other ranks: they have counted this call.
            self._staging = _raise(error)
        # Python would warn of the staging's coroutine, which the caller has never seen. It is closed instead, with a
        # warning of our own.
        self._dropped = Finalizer(self, partial(_drop, self._staging, warn=warn_if_dropped))

    async def captured(self) -> None:
        """Wait until the state may be changed without changing what is saved.

        Raises:
            Exception: The error of a ``state_dict`` method.
            UnsupportedLeafError: If a leaf cannot be staged faithfully; nothing was copied.
            TornSnapshotError: If the state changed on the way.
            HostMemoryError: If memory for the copy cannot be had.
            StagerClosedError: If the stager was closed on the way.

        When it raises, no rank saves, and each of the others raises :class:`~aiostage.RankFailedError` that names this
        one. The same if it is cancelled once it has begun to stage.
        """
        # Several tasks may wait for either moment; one stages, and the others find what has come of it.
        async with self._capturing:
            if self._failure is not None:
                raise self._failure
            if self._captured:
                return
            try:
                self._dropped.detach()
                async with self._own if self._own is not None else nullcontext():
                    staged = await self._staging
            except GeneratorExit:
                # A coroutine that is being closed may not wait. The finalizer of the operation informs the other ranks.
                raise
            except BaseException as error:
                await self.give_up(error)
                raise
            # No await comes between the staging and the hand-over: from here on the save goes on without any task.
            self._captured = True
            self._call.hand_over(self._write(staged))

    async def give_up(self, error: BaseException) -> None:
        """Save nothing, before the state is captured, and report why to the other ranks.

        It is shielded from cancellation.

        Args:
            error: The error or the cancellation that has ended the save.
        """
        if self._dropped.detach():
            self._staging.close()
        given_up = StagingError("the save was cancelled before the state was captured.", remedy="Save again.")
        self._failure = error if isinstance(error, Exception) else given_up
        await self._call.refuse(_reason(self._failure))

    async def committed(self) -> Metadata:
        """Wait until the checkpoint is complete in its storage, on all ranks.

        Returns:
            DCP's metadata of the checkpoint.

        Raises:
            RankFailedError: If any rank failed.
            Exception: The errors of :meth:`captured`.

        May be cancelled: before the state is captured that gives up the save, later it changes nothing.
        """
        await self.captured()
        return await self._call.outcome()

    async def complete(self) -> Metadata:
        """Wait until committed; when cancelled, give up the save, or complete it if that is too late."""
        try:
            return await self._call.complete(self.captured)
        finally:
            # If it was cancelled before it began to stage, that coroutine is still open.
            self._dropped.detach()
            self._staging.close()


def start_save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: TorchStorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: Any = None,
    stager: CheckpointStager | None = None,
    no_dist: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> AsyncSaveResponse:
    """Begin a save, to be waited for in two moments: the awaitable twin of PyTorch's ``AsyncSaveResponse``.

    A plain function: the caller's moment is that of the call. Every rank of the group has to make the same calls in
    the same order; they are carried out in that order, whichever is staged first.

    Args:
        state_dict: As for ``torch.distributed.checkpoint.save``. Values with ``state_dict`` and ``load_state_dict``
            methods are asked for their state now, on the calling thread.
        checkpoint_id: The checkpoint, as the writer names it; a directory if there is no writer.
        storage_writer: One of DCP's, or a :class:`StorageWriter`. None: the one that DCP finds for the id.
        planner: DCP's; None is DCP's default.
        process_group: The ranks that save together; None for all ranks. Its own collectives are not used.
        stager: Takes the copy. None: one is made for this call. A stager of your own uses its memory again in the
            next save.
        no_dist: This process saves alone, as it does if there are no process groups.
        timeout: Seconds to wait for other ranks: to come, and then in each step for the slowest to write.

    Returns:
        A handle with ``captured()`` and ``committed()``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is neither an id nor a writer, or this rank is not in the group, or the timeout is not
            above 0.
    """
    write = writing(checkpoint_id, storage_writer, planner)
    return begin_save(state_dict, stager, write, process_group, no_dist=no_dist, timeout=timeout, warn_if_dropped=True)


def save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: TorchStorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: Any = None,
    stager: CheckpointStager | None = None,
    no_dist: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> Coroutine[Any, Any, Metadata]:
    """Return a coroutine that saves a staged copy with ``torch.distributed.checkpoint``, together with other ranks.

    Planning, writing and DCP's collectives run in a thread, the collectives on a gloo process group that is made once
    for each group and used for nothing else. A plain function: the caller's moment is that of the call.

    Args:
        state_dict: As for :func:`start_save`.
        checkpoint_id: As for :func:`start_save`.
        storage_writer: As for :func:`start_save`.
        planner: As for :func:`start_save`.
        process_group: As for :func:`start_save`.
        stager: As for :func:`start_save`.
        no_dist: As for :func:`start_save`.
        timeout: As for :func:`start_save`.

    Returns:
        A coroutine that returns DCP's metadata once the checkpoint is complete on all ranks.

    Raises:
        RankFailedError: If any other rank failed, or this one while planning or writing.
        Exception: The errors of :meth:`AsyncSaveResponse.captured`, if this rank cannot stage.
        ValueError: As for :func:`start_save`.

    When cancelled before all ranks have entered the collectives, no rank saves, and the others raise
    :class:`~aiostage.RankFailedError` that names this one. Later it is completed first.
    """
    write = writing(checkpoint_id, storage_writer, planner)
    response = begin_save(state_dict, stager, write, process_group, no_dist=no_dist, timeout=timeout)
    return named(response.complete(), "save")


def begin_save(
    state_dict: Mapping[str, Any],
    stager: CheckpointStager | None,
    write: Callable[[Any], Action[Metadata]],
    process_group: Any,
    *,
    no_dist: bool,
    timeout: float,
    warn_if_dropped: bool = False,
) -> AsyncSaveResponse:
    """Begin a save of what :func:`writing` has returned.

    Args:
        state_dict: As for :func:`start_save`.
        stager: As for :func:`start_save`.
        write: Makes an action of a staged state dict.
        process_group: As for :func:`start_save`.
        no_dist: As for :func:`start_save`.
        timeout: As for :func:`start_save`.
        warn_if_dropped: Whether to warn if nothing is awaited. Where a coroutine awaits it, Python itself warns.
    """
    call: QueuedOperation[Metadata] = operation_for(process_group, state_dict, no_dist=no_dist, timeout=timeout)
    return AsyncSaveResponse(state_dict, stager, call, write, warn_if_dropped=warn_if_dropped)


def writing(
    checkpoint_id: str | os.PathLike[str] | None, storage_writer: TorchStorageWriter | None, planner: SavePlanner | None
) -> Callable[[Any], Action[Metadata]]:
    """Return what makes an action of a staged state dict."""
    if storage_writer is None and checkpoint_id is None:
        raise ValueError("a save needs a checkpoint_id or a storage_writer to say where to")
    if storage_writer is None:
        # What a writer of the caller's takes for an id is its own affair.
        check_optional("checkpoint_id", checkpoint_id, (str, os.PathLike), "a path")
    check_optional("storage_writer", storage_writer, TorchStorageWriter, "a StorageWriter of DCP")
    check_optional("planner", planner, SavePlanner, "a SavePlanner of DCP")
    return lambda staged: partial(_write, staged, checkpoint_id, storage_writer, planner)


def _write(
    staged: Any,
    checkpoint_id: str | os.PathLike[str] | None,
    storage_writer: TorchStorageWriter | None,
    planner: SavePlanner | None,
) -> Callable[[Any], Metadata]:
    """Find the writer, and return what needs the other ranks."""
    writer: Any = _private.require("storage_setup")(storage_writer, checkpoint_id, reader=False)

    def collectives(group: Any) -> Metadata:
        try:
            metadata: Metadata = torch_save(
                staged, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None
            )
        except BaseException:
            # DCP does not inform a writer that a save has failed. Its files would stay until the next save.
            if isinstance(writer, StorageWriter):
                writer.abandon()
            raise
        return metadata

    return collectives


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _drop(staging: Coroutine[Any, Any, Any], *, warn: bool) -> None:
    staging.close()
    if warn:
        warnings.warn("a save was dropped before it was awaited, so nothing was saved", RuntimeWarning, stacklevel=2)


async def _raise(error: Exception) -> Any:
    raise error
