"""What the checkpointers of one process and of many ranks share: saves run between entering and leaving."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import current_token

from aiostage._arguments import require_int
from aiostage._loop.hosting import HostedContext
from aiostage.abc import CheckpointStager
from aiostage.checkpoint.preemption import catchable, set_by_signals
from aiostage.errors import CheckpointError
from aiostage.stager import AsyncStager, check_stager

__all__ = ["BackgroundSaves", "OpenState"]


@dataclass
class OpenState:
    """What there is between entering and leaving.

    Attributes:
        stager: Takes the copies.
        group: Owns the saves.
        slots: As many as saves may be under way.
        loop: The event loop that it was entered on.
        is_open: Whether saves are taken.
    """

    stager: CheckpointStager
    group: TaskGroup
    slots: anyio.Semaphore
    loop: object
    is_open: bool = True


class BackgroundSaves(ABC):
    """Takes saves from when it is entered, or opened, until it is left.

    Args:
        stager: Takes the copies. None: one is made for the block.
        keep: How many of the last checkpoints to keep. None: all.
        keep_also: Returns whether the checkpoint of a step is kept independent of its age.
        max_in_flight: How many saves may be under way at once.
        save_on_signals: Signals that set an event instead of ending the process.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        stager: CheckpointStager | None,
        *,
        keep: int | None,
        keep_also: Callable[[int], bool] | None,
        max_in_flight: int,
        save_on_signals: Sequence[signal.Signals],
    ) -> None:
        if keep is not None:
            keep = require_int("keep", keep, least=1, hint=" (None to keep all)")
        max_in_flight = require_int("max_in_flight", max_in_flight, least=1)
        if keep_also is not None and keep is None:
            raise ValueError("keep_also goes with keep; without it all checkpoints are kept")
        check_stager(stager)
        self._stager = stager
        self._keep = keep
        self._keep_also = keep_also
        self._max_in_flight = max_in_flight
        self._signals = catchable(save_on_signals)
        self._preempted = anyio.Event()
        self._removing = anyio.Lock()
        self._removal_waits = False
        self._opened: OpenState | None = None
        self._host: HostedContext[OpenState] | None = None

    @abstractmethod
    async def _prepare(self) -> None:
        """Do what comes before the first save, such as removing what writers that died have left."""

    @abstractmethod
    async def _remove_surplus(self) -> None:
        """Remove what the retention policy does not keep. Where that fails it is tried again after the next save."""

    async def _apply_retention(self) -> None:
        """Remove what the retention policy does not keep, one removal at a time.

        A save that is committed while another removal waits for its turn leaves the work to that one.
        """
        if self._removal_waits:
            return
        self._removal_waits = True
        try:
            await self._removing.acquire()
        finally:
            # With the lock, and before this removal lists the checkpoints: it may not see a save that is committed from
            # here on, so that save must start another one. Also if acquire() was cancelled, or none would ever run.
            self._removal_waits = False
        try:
            await self._remove_surplus()
        finally:
            self._removing.release()

    @abstractmethod
    def _take_failures(self) -> list[Exception]:
        """Return the errors that no caller has received, for the caller that receives them by this."""

    async def open(self) -> None:
        """Remove what writers that died have left behind, and begin to take saves and to listen for signals.

        For programs that cannot enter a block, such as actors: ``aclose()`` ends what begins here, in any task. Of
        many ranks the first removes.

        Raises:
            CheckpointError: If it was opened or entered before.
            RuntimeError: If it is to receive signals and this is not the main thread.
            OSError: If the storage refuses.

        When cancelled, nothing has begun, and it may be called again.
        """
        if self._host is not None:
            raise CheckpointError("it was entered before.", remedy="Make a new Checkpointer for another block.")
        # Set before the first await, so that a second open() at the same time is refused.
        host = self._host = HostedContext(self._serving())
        try:
            await self._prepare()
            self._opened = await host.open()
        except BaseException:
            self._host = None
            raise

    async def aclose(self) -> None:
        """Wait for the saves under way, and take no more. May be called by any task of the loop, and again.

        Raises:
            CheckpointError: If it was opened on another event loop, which still runs it.
            Exception: The error of a save, if neither its handle nor a later save has told it; several as an
                ``ExceptionGroup``.
            OSError: If checkpoints that were to be removed could not be.

        When cancelled, the saves under way are abandoned, and nothing of them is left; those of many ranks go on by
        themselves.
        """
        await self._leave()
        failures = self._take_failures()
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup(f"{len(failures)} checkpoints failed", failures)

    async def __aenter__(self) -> Self:
        """Begin, as :meth:`open` does.

        Raises:
            CheckpointError: If it was entered before.
            RuntimeError: If it is to receive signals and this is not the main thread.
            OSError: If the storage refuses.

        When cancelled, nothing has begun.
        """
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the saves under way, unless the block is cancelled. Take no more.

        Raises:
            Exception: As :meth:`aclose` does.

        An error of the block goes first; the errors of the saves are then in its notes.
        """
        if error is None:
            await self.aclose()
            return
        if isinstance(error, GeneratorExit):
            # A coroutine that is being closed may not wait. The host's task ends the saves by itself.
            if self._opened is not None and self._host is not None:
                self._opened.is_open = False
                self._host.abandon()
            return
        # An Exception or sys.exit() says nothing about what was captured before. A cancellation or Ctrl-C means that
        # the program does not want to wait.
        await self._leave(abandon=not isinstance(error, (Exception, SystemExit)))
        for failure in self._take_failures():
            error.add_note(f"aiostage: a checkpoint failed too: {type(failure).__name__}: {failure}")

    async def _leave(self, *, abandon: bool = False) -> None:
        """Take no more saves, and wait for those under way, or abandon them."""
        opened, host = self._opened, self._host
        if opened is None or host is None:
            return
        if not host.has_ended and opened.loop is not current_token().native_token:
            raise CheckpointError(
                "the checkpointer was entered on another event loop, which its saves belong to.",
                remedy="Close it there, say through asyncio.run_coroutine_threadsafe().",
            )
        # Before the await: no save is taken while the group waits for the others.
        opened.is_open = False
        if abandon:
            host.abandon()
        await host.aclose()

    @asynccontextmanager
    async def _serving(self) -> AsyncGenerator[OpenState, None]:
        """Take saves, and listen for signals."""
        # Left in the opposite order: first the saves end, then the stager that they use is closed, then signals have
        # their old handlers again.
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(set_by_signals(self._preempted, self._signals))
            stager = self._stager
            if stager is None:
                stager = await stack.enter_async_context(AsyncStager())
            group = await stack.enter_async_context(anyio.create_task_group())
            opened = OpenState(stager, group, anyio.Semaphore(self._max_in_flight), current_token().native_token)
            try:
                yield opened
            finally:
                # The event loop may end this as well, when it shuts down without aclose().
                opened.is_open = False

    def _entered(self) -> OpenState:
        if self._opened is None or not self._opened.is_open:
            raise CheckpointError(
                f"the checkpointer was {'not entered' if self._opened is None else 'left'}.",
                remedy="Save inside its `async with` block, or between open() and aclose().",
            )
        return self._opened
