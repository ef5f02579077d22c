"""The checkpoints of a run of many ranks: saved during training, found again, and removed by the retention policy."""

from __future__ import annotations

import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from aiostage._arguments import check_flags, require_step
from aiostage._loop.coroutines import named
from aiostage._loop.workers import Workers
from aiostage.abc import CheckpointStager
from aiostage.checkpoint.background import BackgroundSaves, OpenState
from aiostage.dcp.group_queue import DEFAULT_TIMEOUT, QueuedOperation, operation_for
from aiostage.dcp.keys import KeyedLoadPlanner
from aiostage.dcp.loader import check_into, load_in_group
from aiostage.dcp.saver import AsyncSaveResponse, begin_save, writing
from aiostage.dcp.storage import StorageReader, StorageWriter
from aiostage.errors import CheckpointError, CheckpointNotFoundError
from aiostage.storage.locate import Root, name_of, step_of, storage_at, surplus

__all__ = ["Checkpointer", "SaveHandle"]

T = TypeVar("T")

_log = logging.getLogger("aiostage")

_numbers: WeakKeyDictionary[Any, count[int]] = WeakKeyDictionary()
"""Numbers for the checkpointers of each process group. Keys in the ranks' store have this number in their names."""


class SaveHandle:
    """A captured checkpoint of many ranks that is being written. Made by :meth:`Checkpointer.save`."""

    def __init__(self, step: int, response: AsyncSaveResponse) -> None:
        self.step = step
        self._response = response
        self._ended = anyio.Event()
        self.error: Exception | None = None
        self.was_asked = False

    def done(self) -> bool:
        """Return whether it is committed, or has failed."""
        return self._ended.is_set()

    async def committed(self) -> Metadata:
        """Wait until the checkpoint is complete in its storage, on all ranks.

        Returns:
            DCP's metadata of the checkpoint.

        Raises:
            RankFailedError: If any rank failed.

        Cancelling changes nothing.
        """
        self.was_asked = True
        return await self._response.committed()

    async def ended(self) -> None:
        """Wait until it is committed, or has failed."""
        await self._ended.wait()

    async def finish(self) -> bool:
        """Wait for its end, and return whether it is committed."""
        try:
            await self._response.committed()
        except Exception as error:
            self.error = error
        finally:
            # Also when cancelled: latest() waits for this, and the save goes on in its thread.
            self._ended.set()
        return self.error is None


class Checkpointer(BackgroundSaves):
    """Saves the checkpoints of a run of many ranks with DCP, and finds them again.

    Every rank makes one with the same arguments, enters it, and makes the same calls in the same order, like the
    functions of :mod:`aiostage.dcp`. A checkpoint appears whole or not at all. Leaving waits for the saves under way;
    when cancelled they go on by themselves. Where no block holds it, as in an actor, call :meth:`open` and
    :meth:`aclose`; any tasks of one event loop may do that, and save.

    Args:
        root: The place of the run's checkpoints, with names like ``step-00000100`` below it: as for
            :class:`~aiostage.dcp.StorageWriter`. All ranks need to reach it.
        stager: Takes the copies. None: one is made for the block.
        keep: How many of the last checkpoints to keep; older ones are removed after each commit. None: all.
        keep_also: Returns whether the checkpoint of a step is kept independent of its age.
        max_in_flight: How many saves may be under way at once. Each holds its staged copy.
        process_group: The ranks that save together; None for all ranks.
        no_dist: This process saves alone, as it does if there are no process groups.
        timeout: Seconds to wait for other ranks, as for :func:`~aiostage.dcp.save`.
        save_on_signals: Signals, say ``signal.SIGTERM``, that :meth:`should_stop` tells of instead of ending the
            process. One rank that receives one is enough.

    Raises:
        TypeError: If an argument has the wrong type, or the storage does not let several processes write.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        root: Root,
        stager: CheckpointStager | None = None,
        *,
        keep: int | None = None,
        keep_also: Callable[[int], bool] | None = None,
        max_in_flight: int = 1,
        process_group: Any = None,
        no_dist: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
        save_on_signals: Sequence[signal.Signals] = (),
    ) -> None:
        super().__init__(
            stager, keep=keep, keep_also=keep_also, max_in_flight=max_in_flight, save_on_signals=save_on_signals
        )
        check_flags(no_dist=no_dist)
        self._storage = storage_at(root)
        self._root = root
        StorageWriter(root)  # refuses what several processes cannot write
        self._alone = no_dist or not dist.is_available() or not dist.is_initialized()
        self._parent: Any = None
        if not self._alone:
            self._parent = process_group if process_group is not None else dist.group.WORLD
        self._is_first = self._alone or dist.get_rank(self._parent) == 0
        self._call: Callable[[Any], QueuedOperation[Any]] = partial(
            operation_for, process_group, no_dist=no_dist, timeout=timeout
        )
        self._options = {"process_group": process_group, "no_dist": no_dist, "timeout": timeout}
        # The same on all ranks, because all make their checkpointers in one order. Two checkpointers need different
        # keys in the store.
        self._number = 0 if self._alone else next(_numbers.setdefault(self._parent, count()))
        self._store: Any = None
        self._workers = Workers(1, "aiostage-dcp-stop")
        self._newest: int | None = None
        self._handles: list[SaveHandle] = []

    def __repr__(self) -> str:
        return f"<dcp.Checkpointer {self._storage!r}, {sum(not each.done() for each in self._handles)} in flight>"

    @property
    def preempted(self) -> anyio.Event:
        """Set on this rank when its process has to end soon, by one of ``save_on_signals`` or by you."""
        return self._preempted

    async def should_stop(self, step: int) -> bool:
        """Return whether the training is to stop after this step, the same on all ranks.

        Call it after every step, with its number. When any rank is preempted, all are told so after the step that
        follows: then save, and leave the loop. It asks the store of the process group, in a thread, with one small
        message; no collective waits. Ranks must not be more than one step apart, as they are not where each step
        reads a value that all have computed, such as the loss. Otherwise they may stop at different steps; saving then
        fails on all of them.

        Args:
            step: The step that has just been done.

        Raises:
            OSError: If the store does not answer.
        """
        if self._alone:
            await anyio.lowlevel.checkpoint()
            return self._preempted.is_set()
        return await self._workers.run(partial(self._ask, step, self._preempted.is_set()))

    def _ask(self, step: int, preempted: bool) -> bool:
        key = f"aiostage/stop/{self._number}"
        try:
            if self._store is None:
                # A connection of its own: a wait of another thread would block the parent's.
                self._store = self._parent.get_group_store().clone()
            if preempted:
                # The step after this one. Other ranks may already have asked about this step, and got False. No rank
                # asks about the next step before this rank has begun it, and by then the key is set. If several ranks
                # are preempted, the first that sets the key decides.
                self._store.compare_set(key, "", str(step + 1))
            if not self._store.check([key]):
                return False
            return step >= int(self._store.get(key))
        except RuntimeError as error:
            raise OSError(f"the store of the process group does not answer: {error}") from error

    def save(
        self, step: int, state_dict: Mapping[str, Any], *, planner: SavePlanner | None = None
    ) -> Coroutine[Any, Any, SaveHandle]:
        """Return a coroutine that returns once this rank's part of a checkpoint is captured.

        A plain function: the caller's moment is that of the call. The rest happens in the background.

        Args:
            step: The step, from 0, the same on all ranks. There must be no checkpoint of it.
            state_dict: As for :func:`~aiostage.dcp.save`.
            planner: DCP's; None is DCP's default.

        Returns:
            A coroutine, which waits for its turn if ``max_in_flight`` saves are under way; then for the copy. It
            returns a handle on the rest.

        Raises:
            CheckpointError: If the block was not entered, or was left.
            Exception: The errors of :meth:`AsyncSaveResponse.captured`.
            ValueError: If the step is below 0.

        If a checkpoint of this step exists already, the handle reports it.
        """
        opened, name = self._entered(), name_of(require_step(step))
        write = writing(name, StorageWriter(self._root), planner)
        # Python itself warns of the coroutine if it is never awaited.
        response = begin_save(state_dict, opened.stager, write, **self._options)
        return named(self._capture(opened, SaveHandle(step, response), response), "Checkpointer.save")

    async def _capture(self, opened: OpenState, handle: SaveHandle, response: AsyncSaveResponse) -> SaveHandle:
        try:
            await opened.slots.acquire()
        except BaseException as error:
            # The other ranks wait for this one. A coroutine that is being closed may not wait: its response informs
            # them when it is dropped.
            if not isinstance(error, GeneratorExit):
                await response.give_up(error)
            raise
        try:
            try:
                self._entered()
            except CheckpointError as error:
                await response.give_up(error)
                raise
            await response.captured()
            # No await from here on: the save goes on by itself, and a cancellation must not lose its handle. Handles of
            # saves that have succeeded, or whose error a caller has received, are dropped. The other errors are raised
            # when the block is left.
            self._handles = [each for each in self._handles if not (each.done() and (each.was_asked or not each.error))]
            self._handles.append(handle)
            opened.group.start_soon(self._finish, opened, handle, name=f"save step {handle.step}")
        except BaseException:
            opened.slots.release()
            raise
        return handle

    async def _finish(self, opened: OpenState, handle: SaveHandle) -> None:
        try:
            saved = await handle.finish()
            if saved:
                self._newest = handle.step
        finally:
            opened.slots.release()
        if saved and self._is_first and self._keep is not None:
            await self._apply_retention()

    async def _remove_surplus(self) -> None:
        """Remove old checkpoints, on the first rank. If that fails, the next save tries again."""
        try:
            old = surplus(await self.steps(), keep=self._keep, keep_also=self._keep_also, newest=self._newest)
            for step in old:
                await self._storage.delete(name_of(step))
        except Exception as error:
            _log.warning("old checkpoints could not be removed: %s: %s", type(error).__name__, error)

    async def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, in ascending order, as this rank sees them now.

        Raises:
            OSError: If the storage refuses.
        """
        return sorted(step for name in await self._storage.list() if (step := step_of(name)) is not None)

    def latest(self) -> Coroutine[Any, Any, int | None]:
        """Return a coroutine that returns the highest step that there is a checkpoint of, or None.

        The first rank looks, and all return what it has found. Saves of this checkpointer that were captured before end
        first.

        Raises:
            RankFailedError: If any rank failed.
            OSError: On the first rank, if the storage refuses.
        """
        return self._from_first(self._call({}), self._latest, lambda step, group: step)

    def restore(
        self,
        into: dict[str, Any],
        step: int | None = None,
        *,
        planner: LoadPlanner | None = None,
        weights_only: bool = True,
    ) -> Coroutine[Any, Any, int]:
        """Return a coroutine that loads a checkpoint into a state dict, in place, together with the other ranks.

        Args:
            into: As for :func:`~aiostage.dcp.load`: each rank reads what it needs.
            step: The step, the same on all ranks. None: the latest, as for :meth:`latest`.
            planner: As for :func:`~aiostage.dcp.load`.
            weights_only: As for :func:`~aiostage.dcp.load`.

        Returns:
            A coroutine that returns the step that was loaded.

        Raises:
            CheckpointNotFoundError: If there is no checkpoint at all.
            RankFailedError: If any rank failed, also because there is no checkpoint of the step.
            ValueError: If the step is below 0.
        """
        reader = StorageReader(self._root)
        if step is not None:
            step = require_step(step)
        check_flags(weights_only=weights_only)
        check_into(into, planner)
        used = planner if planner is not None else KeyedLoadPlanner(weights_only=weights_only)

        async def choose() -> int | None:
            return step if step is not None else await self._latest()

        def read(chosen: int | None, group: Any) -> int | None:
            if chosen is not None:
                reader.reset(name_of(chosen))
                load_in_group(into, reader, used, group)
            return chosen

        call = self._call(into)
        loading = self._from_first(call, choose, read)
        return named(self._restored(call, loading), "Checkpointer.restore", loading)

    async def _restored(self, call: QueuedOperation[int | None], loading: Coroutine[Any, Any, int | None]) -> int:
        try:
            step = await loading
        finally:
            # DCP has copied on the streams of the call. Now others may be current: they wait for the copies.
            call.caller.order_current_stream_after()
        if step is None:
            raise CheckpointNotFoundError(
                f"there is no checkpoint of a run there, of a name like {name_of(0)}.",
                path=self._storage.location,
                remedy="Save one first; `await latest()` is None until then.",
            )
        return step

    async def _latest(self) -> int | None:
        return max(await self.steps(), default=None)

    async def _from_first(
        self, call: QueuedOperation[T], find: Callable[[], Awaitable[Any]], act: Callable[[Any, Any], T]
    ) -> T:
        """Find something out on the first rank, and act on it on all ranks."""

        async def ready() -> None:
            found = None
            if self._is_first:
                try:
                    # A save that was captured before may become the latest when it ends.
                    for handle in list(self._handles):
                        await handle.ended()
                    found = await find()
                except Exception as error:
                    await call.refuse(f"{type(error).__name__}: {error}")
                    raise
            # All ranks hand it over. Those that did not look get the answer by the broadcast.
            call.hand_over(lambda: lambda group: act(_broadcast(found, group), group))

        return await call.complete(ready)

    async def _prepare(self) -> None:
        if self._is_first:
            await self._storage.clean_up()

    async def _leave(self, *, abandon: bool = False) -> None:
        try:
            await super()._leave(abandon=abandon)
        finally:
            self._workers.stop()

    def _take_failures(self) -> list[Exception]:
        """Return the errors that no caller has received, for the caller that receives them by this."""
        failures = [each.error for each in self._handles if each.error is not None and not each.was_asked]
        self._handles.clear()
        return failures


def _broadcast(found: Any, group: Any) -> Any:
    """Return what the first rank has found."""
    if group is None:
        return found
    box = [found]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]
