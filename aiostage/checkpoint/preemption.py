"""Being told by a signal that the process has to end soon."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import anyio

from aiostage._loop.forks import register_after_fork
from aiostage.errors import shown

__all__ = ["Handlers", "catchable", "set_by_signals"]

_log = logging.getLogger("aiostage")


def catchable(signals: Iterable[int]) -> tuple[signal.Signals, ...]:
    """Return what was given as ``save_on_signals=``, checked.

    Raises:
        TypeError: If it is one signal and no list of them.
        ValueError: If there is one among them that no process can handle.
    """
    if isinstance(signals, (str, int)):
        raise TypeError(f"save_on_signals must be a list of signals, such as [signal.SIGTERM], not {shown(signals)}")
    signals = tuple(signals)
    for number in signals:
        if number not in signal.valid_signals() or number in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(
                f"save_on_signals takes signals that can be handled, like signal.SIGTERM, not {shown(number)}"
            )
    return tuple(map(signal.Signals, signals))


class Handlers:
    """The handlers that some signals had before, to be put back.

    A forked child gets them back at once. With the parent's handler it would ignore the signals that should end it.

    Args:
        signals: Which.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._before = {number: signal.getsignal(number) for number in signals}
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Put them back in a child, whose signals are not to be told to its parent's event loop either."""
        if self._before:
            # The child shares the socket by which Python wakes the parent's event loop. A signal of the child would run
            # the handlers in the parent.
            signal.set_wakeup_fd(-1)
            self.put_back()

    def put_back(self) -> None:
        """Put them back, once."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            # None means a handler that was installed in C, which Python cannot install again.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@asynccontextmanager
async def set_by_signals(event: anyio.Event, signals: Sequence[signal.Signals]) -> AsyncIterator[None]:
    """Set an event when one of some signals comes, instead of what the signal would have done.

    Further signals change nothing, as launchers like to send theirs to the process and to its group. Afterwards the
    signals have the handlers again that they had before.

    Args:
        event: Set on the event loop.
        signals: None of them is fine too.

    Raises:
        RuntimeError: If this is not the main thread, the only one that Python lets handle signals.
    """
    if not signals:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"signals ({', '.join(each.name for each in signals)}) can only be received in the main thread. "
            "Pass save_on_signals=() here, handle them in the main thread, and have this event loop call "
            "checkpoints.preempted.set(), with loop.call_soon_threadsafe."
        )
    handlers = Handlers(signals)
    try:
        with anyio.open_signal_receiver(*signals) as received:
            async with anyio.create_task_group() as group:
                group.start_soon(_set, event, received)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
    finally:
        # When asyncio removes a handler, the signal has the system's default, and not the handler from before.
        handlers.put_back()


async def _set(event: anyio.Event, received: AsyncIterator[signal.Signals]) -> None:
    async for number in received:
        if not event.is_set():
            _log.warning("%s: the process is to end; waiting for the trainer to save and leave", number.name)
        event.set()
