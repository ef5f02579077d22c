"""One save of a Checkpointer: what the trainer waits for, what goes on in the background, and the handle on that.

A save is *accepted* once the source is captured and the tree is known to fit into files. Until then the call reports an
error, afterwards the handle does.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import anyio

from aiostage._loop.coroutines import run_concurrently, without_locals
from aiostage.abc import CheckpointStager, Storage
from aiostage.checkpoint.index import CheckpointIndex
from aiostage.checkpoint.progress import ProgressOption, SaveProgress
from aiostage.checkpoint.save import pending_checkpoint, source_of
from aiostage.checkpoint.writer import CheckpointInfo, CheckpointWriter, FileOptions
from aiostage.errors import CheckpointError, CheckpointExistsError
from aiostage.incremental.writing import IncrementalSaver
from aiostage.observe import span
from aiostage.snapshot import Snapshot
from aiostage.storage.locate import name_of

__all__ = ["SaveHandle", "SaveTask"]


class SaveHandle:
    """A captured checkpoint on its way into its storage. Made by :meth:`Checkpointer.save`.

    Dropping it stops nothing. An error that was not asked for by :meth:`committed` is raised by the next
    :meth:`Checkpointer.save`, or when the checkpointer's block is left.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._ended = anyio.Event()
        self._info: CheckpointInfo | None = None
        self._error: Exception | None = None
        self._told = False
        self._waiting = 0

    def __repr__(self) -> str:
        state = "under way" if not self.done() else "committed" if self._error is None else f"failed: {self._error}"
        return f"<SaveHandle of step {self._step}, {state}>"

    @property
    def step(self) -> int:
        """The step that was saved."""
        return self._step

    def done(self) -> bool:
        """Return whether it is committed, or has failed."""
        return self._ended.is_set()

    async def committed(self) -> CheckpointInfo:
        """Wait until the checkpoint is complete and safe in its storage.

        Returns:
            What was saved.

        Raises:
            CheckpointExistsError: If another writer has saved this step since the checkpointer's block was entered.
            CheckpointError: If the save was abandoned because the checkpointer's block was cancelled.
            OSError: If the storage refuses.
            StagingError: The other errors of :func:`save`.

        Several tasks may wait. May be cancelled; the save goes on.
        """
        # While a task waits, the error is that task's: the next save must not raise it too.
        self._waiting += 1
        try:
            await self.ended()
        finally:
            self._waiting -= 1
        return self.outcome()

    def outcome(self) -> CheckpointInfo:
        """Return what was saved, or raise its error, without waiting.

        Raises:
            RuntimeError: If it is still under way; look at :meth:`done`.
            Exception: As :meth:`committed` does.
        """
        error = self.take_error() if self.done() else None
        if error is not None:
            try:
                raise error
            finally:
                # The traceback now has this frame in it, which must not lead back to the error.
                del error
        if self._info is None:
            raise RuntimeError(f"the save of step {self._step} is still under way; await committed()")
        return self._info

    async def ended(self) -> None:
        """Wait until it is committed or has failed, without being told which. Cancelling changes nothing."""
        await self._ended.wait()

    def end(self, outcome: CheckpointInfo | Exception) -> None:
        """Say what became of it. Called once, by the checkpointer."""
        if isinstance(outcome, Exception):
            # Before the event: a task that it wakes finds the outcome.
            self._error = outcome
        else:
            self._info = outcome
        self._ended.set()

    @property
    def error(self) -> Exception | None:
        """Its error, if it has failed and no task has been told or waits to be."""
        return None if self._told or self._waiting else self._error

    def take_error(self) -> Exception | None:
        """Return its error, and count it as reported to the caller."""
        self._told = True
        return self._error


_log = logging.getLogger("aiostage")


class SaveTask:
    """A save, to be run as a task. Making it is the moment of the copy.

    Args:
        number: Counts the saves.
        step: Which one.
        state_dict: What to save.
        stager: Takes the copy.
        storage: Where to.
        files: How the tensors are laid out in files.
        progress: As for :func:`save`.
        incremental: Writes what has changed only; None: all is written.
        index: Gets to know of the checkpoint.

    Attributes:
        source: A snapshot, a coroutine that returns a staged tree, or such a tree; None once it was written.
    """

    def __init__(
        self,
        number: int,
        step: int,
        state_dict: Any,
        *,
        stager: CheckpointStager,
        storage: Storage,
        files: FileOptions,
        progress: ProgressOption[SaveProgress],
        incremental: IncrementalSaver | None,
        index: CheckpointIndex,
    ) -> None:
        self.number = number
        self.handle = SaveHandle(step)
        # Whether there is a checkpoint of the step to be replaced. Set by the checkpointer before run().
        self.replaces = False
        self._began = perf_counter()
        self._captured_after: float | None = None
        # Whether it is known that files can carry the tree.
        self._planned = False
        self._writer: CheckpointWriter | None = None
        # Set when it is captured and planned, and also when the task ends without that.
        self._accepted = anyio.Event()
        # Made by run(): a scope belongs to a task, and the save may be called for in a thread without an event loop.
        self._scope: anyio.CancelScope | None = None
        self._abandoned = False
        self._target = (storage, name_of(step))
        self._files = files
        self._progress = progress
        self._incremental = incremental
        self._index = index
        # The result of the snapshot and not itself: the caller may exit its context before the save is done, and the
        # tree lives on.
        self.source: Any = state_dict.result() if isinstance(state_dict, Snapshot) else source_of(state_dict, stager)

    async def accepted(self) -> None:
        """Wait until the source is captured and files can carry it, or it will not be. Cancelling changes nothing."""
        await self._accepted.wait()

    @property
    def is_accepted(self) -> bool:
        """Whether the source is captured, so that it may change, and nothing but the storage can refuse it."""
        return self._captured_after is not None and self._planned

    @property
    def reported_by_handle(self) -> bool:
        """Whether its handle reports the outcome, and not the call that asked for the copy.

        That another writer was faster may be found out before that or after; the handle tells it either way.
        """
        return self.is_accepted or isinstance(self.handle.error, CheckpointExistsError)

    def abandon(self) -> None:
        """End it, with nothing left behind, unless it is committed already. Its handle tells when that is done."""
        self._abandoned = True
        if self._scope is not None:
            self._scope.cancel()

    def drop(self) -> None:
        """Give it up before it was run."""
        if not isinstance(self.source, Snapshot):
            self.source.close()

    async def run(self) -> bool:
        """Copy and write; its handle has the outcome.

        Returns:
            Whether it was committed.
        """
        outcome: CheckpointInfo | Exception = CheckpointError(
            "the save was abandoned before it was committed.", path=self._target[1]
        )
        try:
            with anyio.CancelScope() as self._scope:
                # abandon() may have come before the first turn of this task, when there was no scope yet.
                if self._abandoned:
                    self._scope.cancel()
                # Committed from here on: an abandonment during aclose() does not change the outcome.
                outcome = await self._write()
                self.source = None
                if self._writer is not None:
                    await self._writer.aclose()
        except Exception as error:
            # Its frames refer to the staged memory, which must not live as long as the report.
            outcome = without_locals(error)
            if isinstance(error, CheckpointExistsError) and not self.replaces:
                # The storage's remedy names overwrite=, which a Checkpointer does not have.
                error.remedy = "Save another step; or pass replace=True, if it is a checkpoint."
            if self.is_accepted or isinstance(error, CheckpointExistsError):
                _log.error("the checkpoint of step %d failed: %s: %s", self.handle.step, type(error).__name__, error)
        except BaseException as error:
            # anyio leaves a cancelled task's error in a circle of frames, which must not lead to memory either.
            without_locals(error)
            raise
        finally:
            self.source = None
            if self._writer is not None:
                self._writer.close()
            # However the task ends, also if it is cancelled: tasks that wait for the handle or for the capture must not
            # wait for ever.
            self.handle.end(outcome)
            self._accepted.set()
        return isinstance(outcome, CheckpointInfo)

    async def _write(self) -> CheckpointInfo:
        writer = self._writer = CheckpointWriter(self._target[1], self._files)
        if isinstance(self.source, Snapshot):
            written: list[CheckpointInfo] = []

            async def write(snapshot: Snapshot[Any]) -> None:
                await writer.plan(await snapshot.outline(), snapshot)
                self._set_planned()
                written.append(await self._send(writer))

            # Leaves are written as they are copied, while the other coroutine waits for the last of them.
            async with self.source as snapshot:
                await run_concurrently(partial(self._notice_capture, snapshot), partial(write, snapshot))
            info = written[0]
        else:
            staged = await self.source
            self._set_captured()
            await writer.plan(staged)
            self._set_planned()
            info = await self._send(writer)
        committed = perf_counter() - self._began
        return replace(
            info, captured=committed if self._captured_after is None else self._captured_after, committed=committed
        )

    async def _notice_capture(self, snapshot: Snapshot[Any]) -> None:
        try:
            await snapshot.fill()
            await snapshot.captured()
        except Exception:
            # The writer waits for the same capture and raises this error, or the error that has caused it.
            return
        self._set_captured()

    async def _send(self, writer: CheckpointWriter) -> CheckpointInfo:
        storage, name = self._target
        opening, placement = partial(storage.open, name, overwrite=self.replaces), None
        # What replaces a checkpoint is written whole. Other processes may have noted of the old one that no checkpoint
        # refers to it, and would delete the new one while one does.
        incremental = None if self.replaces else self._incremental
        async with nullcontext() if incremental is None else incremental.compared() as changes:
            if changes is not None:
                opening = partial(changes.open, name)
            with span("save", target=name):
                async with pending_checkpoint(name, opening, self._progress) as (pending, report):
                    info = await writer.write(pending, report)
        if changes is not None:
            written = changes.written
            assert written is not None  # noqa: S101 - it was committed
            info, placement = replace(info, written_bytes=written.nbytes), written.placement
        self._index.add(name, placement)
        return info

    def _set_captured(self) -> None:
        if self._captured_after is None:
            self._captured_after = perf_counter() - self._began
        self._set_accepted()

    def _set_planned(self) -> None:
        self._planned = True
        self._set_accepted()

    def _set_accepted(self) -> None:
        if self.is_accepted:
            self._accepted.set()
