"""The checkpoints of a run: saved beside the training, a few at a time, and removed by the retention policy."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from typing import Any

import anyio
from anyio.lowlevel import current_token

from aiostage._arguments import check_flags, check_progress, require_step
from aiostage._device import CallerStreams, checked_backend
from aiostage._loop.coroutines import finish, named, without_locals
from aiostage.abc import CheckpointStager
from aiostage.checkpoint.background import BackgroundSaves, OpenState
from aiostage.checkpoint.index import CheckpointIndex
from aiostage.checkpoint.load import load_after
from aiostage.checkpoint.progress import ProgressOption, SaveProgress
from aiostage.checkpoint.save_task import SaveHandle, SaveTask
from aiostage.checkpoint.writer import DEFAULT_SHARD_BYTES, file_options
from aiostage.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError, listed, shown
from aiostage.incremental.writing import IncrementalSaver
from aiostage.storage.locate import Root, name_of, storage_at, surplus

__all__ = ["Checkpointer"]

_log = logging.getLogger("aiostage")

_ATTEMPTS = 10
"""Attempts to open the latest checkpoint when other processes delete it before it is opened."""

_NOTHING_THERE = "Save one first, or give the Checkpointer the target of another run; load() reads one by its own path."


class Checkpointer(BackgroundSaves):
    """Saves the checkpoints of a run, and finds them again.

    Enter it with ``async with``; or, where no block holds it (a service, a fixture, an actor), call :meth:`open` and
    :meth:`aclose`. Any tasks of one event loop may do that, and save. Leaving waits for the saves that are under way;
    when cancelled it abandons them, and nothing of them is left. An exception that leaves the block does not: what was
    captured before is good, and is committed first. :meth:`steps`, :meth:`latest` and :meth:`restore` only read, and
    need not be entered for.

    Args:
        target: Where the checkpoints lie, each below it under a name like ``step-00000100``: a directory, a URL, a
            store of obstore, or a :class:`~aiostage.abc.Storage`.
        stager: Takes the copies. None: one is made for the block.
        keep: How many of the last checkpoints to keep; older ones are removed after each commit. None: all.
        keep_also: Returns whether the checkpoint of a step is kept independent of its age.
        max_in_flight: How many saves may be under way at once. Each holds its staged copy; one more waits for its turn
            before it copies anything.
        incremental: Write only what has changed since the last checkpoint, in blocks of 1 MiB, and refer to where the
            rest lies. When a checkpoint is removed, its files stay that others refer to, until none does.
        max_shard_bytes: As for :func:`save`, for every save.
        duplicate_tied: As for :func:`save`, for every save.
        progress: As for :func:`save`, for every save.
        save_on_signals: Signals, say ``signal.SIGTERM``, that set :attr:`preempted` instead of ending the process.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        target: Root,
        stager: CheckpointStager | None = None,
        *,
        keep: int | None = None,
        keep_also: Callable[[int], bool] | None = None,
        max_in_flight: int = 1,
        incremental: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        duplicate_tied: bool = False,
        progress: ProgressOption[SaveProgress] = None,
        save_on_signals: Sequence[signal.Signals] = (),
    ) -> None:
        super().__init__(
            stager, keep=keep, keep_also=keep_also, max_in_flight=max_in_flight, save_on_signals=save_on_signals
        )
        check_flags(incremental=incremental)
        check_progress(progress)
        self._storage = storage_at(target)
        self._index = CheckpointIndex(self._storage)
        self._incremental = IncrementalSaver(self._storage) if incremental else None
        self._files = file_options(max_shard_bytes=max_shard_bytes, duplicate_tied=duplicate_tied)
        self._progress = progress
        self._numbers = count()
        self._tasks: list[SaveTask] = []
        self._failed: list[SaveHandle] = []
        # The number and the step of the last save that was committed. Of two saves that overlap, the one that was
        # called later counts, whichever is committed first.
        self._newest = (-1, -1)
        self._not_removed: Exception | None = None

    def __repr__(self) -> str:
        return f"<Checkpointer {self._storage!r}, {len(self._tasks)} in flight>"

    @property
    def preempted(self) -> anyio.Event:
        """Set when the process has to end soon: by one of ``save_on_signals``, or by you.

        The trainer looks at it between two steps, saves a last time and leaves the block, which waits for the commit.
        """
        return self._preempted

    def save(self, step: int, state_dict: Any, *, replace: bool = False) -> Coroutine[Any, Any, SaveHandle]:
        """Return a coroutine that returns once a checkpoint is captured; it is written in the background.

        A plain function: the caller's moment is that of the call, also if the coroutine is started later by a task.

        Args:
            step: Which one, from 0. There must be no checkpoint of it, unless it may be replaced.
            state_dict: A tree as for :func:`save`, which must not change before the coroutine has returned; or an
                entered :class:`~aiostage.Snapshot`, which may be left as soon as it has, and is not copied again.
            replace: Replace a checkpoint of the step that is there now, in one step once everything is written. What
                replaces one is written whole, also if the checkpointer is incremental.

        Returns:
            A coroutine, which waits for its turn if ``max_in_flight`` saves are under way; then for the copy. It
            returns a handle on the rest.

        Raises:
            CheckpointExistsError: If there was a checkpoint of this step when the block was entered, or one was saved
                in it or is under way; before anything is copied. What another process has saved since, the handle says.
                With ``replace``, if it is under way; if it is a link, which may lead to another run's checkpoint; or if
                others may refer to its files, because it was saved incrementally.
            UnsupportedLeafError: If something in the tree cannot be staged or carried; nothing was written.
            TornSnapshotError: If the tree changed before it was captured.
            HostMemoryError: If memory for the copy cannot be had.
            CheckpointError: If the block was not entered, was left, or was entered on another event loop.
            TypeError: If the step is not an integer, or ``replace`` no bool.
            ValueError: If it is below 0.
            OSError: If the storage refuses.
            Exception: The error of an earlier save that has failed since, and whose handle was not asked. Nothing of
                this step is saved then; the next call starts again.

        The coroutine may be cancelled: either the checkpoint was complete already, or nothing of it is left.
        """
        step = require_step(step)
        check_flags(replace=replace)
        task = SaveTask(
            next(self._numbers),
            step,
            state_dict,
            stager=self._entered().stager,
            storage=self._storage,
            files=self._files,
            progress=self._progress,
            incremental=self._incremental,
            index=self._index,
        )
        return named(self._start(task, replace), "Checkpointer.save", task.source)

    async def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, in ascending order.

        Raises:
            OSError: If the storage refuses.

        Cancelling changes nothing.
        """
        return await self._index.steps()

    async def latest(self) -> int | None:
        """Return the highest step that there is a checkpoint of, or None if there is none.

        Raises:
            OSError: If the storage refuses.

        Cancelling changes nothing.
        """
        return max(await self.steps(), default=None)

    def restore(self, into: Any = None, step: int | None = None, **options: Any) -> Coroutine[Any, Any, Any]:
        """Return a coroutine that reads a checkpoint.

        A plain function, as :func:`load` is: copies to devices follow what the caller's streams were given before.

        Args:
            into: A live tree to change in place, as for :func:`load`. None: return a new tree.
            step: Which one. None: the latest.
            **options: More that :func:`load` takes: ``in_place``, ``strict``, ``cast``, ``device``, ``only``,
                ``classes``, ``verify``, ``progress``, ``backend``.

        Returns:
            The tree that was saved; or ``into``.

        Raises:
            CheckpointNotFoundError: If there is no checkpoint of that step, or none at all.
            CheckpointCorruptError: If it is damaged. An earlier one is not taken in its place: pass its step for that.
            CheckpointMismatchError: If it does not fit ``into``.
            OSError: If the storage refuses.
            TypeError: If the step is not an integer, or was passed as ``into``; or if ``backend`` is none.
            ValueError: If it is below 0.

        May be cancelled: unless ``in_place``, either nothing of ``into`` has been changed then, or everything.
        """
        if isinstance(into, int):
            raise TypeError(
                f"into must be a live tree, not {shown(into)}. A step is passed by name: restore(step={shown(into)})"
            )
        caller = CallerStreams.record(checked_backend(options.get("backend")), into)
        return named(self._restore(caller, into, step, options), "Checkpointer.restore")

    async def _restore(self, caller: CallerStreams, into: Any, step: int | None, options: dict[str, Any]) -> Any:
        if step is not None:
            name = name_of(require_step(step))
            try:
                return await load_after(caller, (self._storage, name), into=into, foreign=False, **options)
            except CheckpointNotFoundError as error:
                steps = await self.steps()
                raise CheckpointNotFoundError(
                    f"there is no checkpoint of step {step}.",
                    path=f"{self._storage.location}/{name}",
                    remedy=f"There is one of {listed(list(map(str, steps)))}." if steps else _NOTHING_THERE,
                ) from error
        for _ in range(_ATTEMPTS):
            latest = await self.latest()
            if latest is None:
                raise CheckpointNotFoundError(
                    f"there is no checkpoint of a run there, of a name like {name_of(0)}.",
                    path=self._storage.location,
                    remedy=_NOTHING_THERE,
                )
            try:
                return await load_after(caller, (self._storage, name_of(latest)), into=into, foreign=False, **options)
            except CheckpointNotFoundError:
                # Deleted between the listing and the reading, as a retention policy does.
                continue
        raise CheckpointError(
            f"the latest checkpoint was deleted concurrently, {_ATTEMPTS} times.", path=self._storage.location
        )

    async def delete(self, step: int) -> None:
        """Remove a checkpoint. A missing one is not an error.

        To go back in a run, remove the later ones first: the latest is what a restart begins with.

        Args:
            step: Which one.

        Raises:
            CheckpointCorruptError: If one that stays is damaged and may refer to it.
            OSError: If the storage refuses.
            TypeError: If the step is not an integer.
            ValueError: If it is below 0.

        When cancelled, it is there as a whole, or can no longer be found.
        """
        step = require_step(step)
        async with self._removing:
            await self._index.remove([step])

    async def _prepare(self) -> None:
        await self._storage.clean_up()
        async with self._removing:
            await self._index.open()

    def _take_failures(self) -> list[Exception]:
        """Return the errors that no caller has received, for the caller that receives them by this."""
        failed = sorted(self._failed, key=lambda handle: handle.step)
        failures = [failure for handle in failed if (failure := handle.error) is not None]
        if self._not_removed is not None:
            failures.append(self._not_removed)
        self._failed.clear()
        self._not_removed = None
        return failures

    async def _start(self, task: SaveTask, replace: bool) -> SaveHandle:
        """Wait for a free slot, then for the capture."""
        name = name_of(task.handle.step)
        try:
            opened = self._entered()
            if opened.loop is not current_token().native_token:
                raise CheckpointError(
                    "the checkpointer was entered on another event loop, which its saves belong to.",
                    remedy="Save there, say through asyncio.run_coroutine_threadsafe(); without a loop of your own "
                    "use aiostage.blocking.Checkpointer.",
                )
            if any(other.handle.step == task.handle.step and not other.handle.done() for other in self._tasks):
                raise CheckpointExistsError("it is being saved already.", path=name, remedy="Save each step once.")
        except CheckpointError:
            task.drop()
            raise
        # No await since the look at the other tasks, so two calls for one step cannot both come here.
        self._tasks.append(task)
        try:
            self._raise_earlier_failure(task.handle.step)
            task.replaces = await self._index.refuse(name, replace=replace)
            await opened.slots.acquire()
            try:
                # Both again, after the wait: the save that had the slot may have failed, and the block may have ended.
                self._raise_earlier_failure(task.handle.step)
                self._entered().group.start_soon(self._run, opened, task, name=f"save {name}")
            except BaseException:
                opened.slots.release()
                raise
        except BaseException:
            self._tasks.remove(task)
            task.drop()
            raise
        try:
            await task.accepted()
        except BaseException as error:
            # Cancelled before the capture: the caller will change the source, so the save must not go on.
            task.abandon()
            # A coroutine that is being closed may not wait; the task ends all the same.
            if not isinstance(error, GeneratorExit):
                await finish(task.handle.ended)
            task.handle.take_error()
            raise
        if not task.reported_by_handle:
            # It has ended without being accepted. This raises its error.
            await task.handle.committed()
        return task.handle

    def _raise_earlier_failure(self, step: int) -> None:
        """Raise the error of the first save that has failed, if no caller has received it yet."""
        while self._failed:
            handle = self._failed.pop(0)
            if handle.error is not None:
                error = handle.take_error()
                assert error is not None  # noqa: S101 - it was there above
                error.add_note(
                    f"aiostage: the checkpoint of step {handle.step} failed; its handle was not asked, so the save of "
                    f"step {step} raises this and saves nothing."
                )
                try:
                    raise error
                finally:
                    # The traceback now has this frame in it, which must not lead back to the error.
                    del error, handle

    async def _run(self, opened: OpenState, task: SaveTask) -> None:
        """Save, then remove what the retention policy does not keep; the next save may begin meanwhile."""
        try:
            saved = await task.run()
            if saved:
                self._newest = max(self._newest, (task.number, task.handle.step))
            elif task.reported_by_handle:
                self._failed.append(task.handle)
        finally:
            self._tasks.remove(task)
            opened.slots.release()
        # After the slot is free: the next save does not wait for a removal.
        if saved:
            await self._apply_retention()

    async def _remove_surplus(self) -> None:
        """Remove old checkpoints. If that fails, the new one is valid all the same, and the next save tries again."""
        try:
            steps = await self.steps() if self._keep is not None else []
            old = surplus(steps, keep=self._keep, keep_also=self._keep_also, newest=self._newest[1])
            await self._index.remove(old)
        except Exception as error:
            _log.warning("old checkpoints could not be removed: %s: %s", type(error).__name__, error)
            self._not_removed = without_locals(error)
        else:
            self._not_removed = None
