"""An event loop in a thread, for code that PyTorch calls from threads of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from aiostage._loop.coroutines import Finalizer
from aiostage.errors import StagingError

__all__ = ["LoopThread"]

T = TypeVar("T")


class LoopThread:
    """An asyncio event loop in a daemon thread, which ends when this is stopped or dropped.

    A daemon, so that a thread that is never closed does not keep the interpreter from exiting.

    Args:
        name: The name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._process = os.getpid()
        # Made here, so that submit() has it at once. Only the thread runs it.
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=_serve, args=(self._loop,), name=name, daemon=True)
        self.thread.start()
        # It may run in any thread, in the middle of other code, as finalizers do. It only posts to a loop, so it cannot
        # deadlock.
        self._stop = Finalizer(self, self._loop.call_soon_threadsafe, self._loop.stop)

    @property
    def running(self) -> bool:
        """Whether it takes coroutines."""
        return self._stop.alive and os.getpid() == self._process

    def check(self) -> None:
        """Refuse a forked child, which does not have the thread.

        Raises:
            StagingError: If this is one.
        """
        if os.getpid() != self._process:
            raise StagingError(
                f"this was made by process {self._process}, from which this one was forked.",
                remedy="Make another one in this process.",
            )

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it.

        Raises:
            StagingError: If this is a forked child.
        """
        try:
            self.check()
        except StagingError:
            coroutine.close()
            raise
        return self.submit(coroutine).result()

    def stop(self) -> None:
        """End the loop and wait for its thread. Idempotent."""
        self._stop()
        self.thread.join()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    # The thread refers to the loop alone, not to the LoopThread, so that dropping that stops it.
    try:
        loop.run_forever()
    finally:
        loop.close()
