"""When a coroutine with much to do gives the event loop a turn."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from time import perf_counter
from typing import TypeVar

from anyio.lowlevel import checkpoint

__all__ = ["Slices"]

T = TypeVar("T")


class _CollectionPause:
    """Keeps the cyclic garbage collector out of short sections, for all threads together.

    Building tens of thousands of tensors in a row triggers collections whose cost grows with the whole heap, and
    nothing that is built in a slice is garbage. Only a collector that was enabled is paused, and it is
    enabled again when the last section ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._was_enabled:
                gc.enable()


_collection_pause = _CollectionPause()


class Slices:
    """Runs generators on the event loop in slices of bounded length.

    Work is written as a generator that yields wherever it may be interrupted: between leaves, or between small
    runs of them. It stays a plain function that tests can exhaust, and one place decides when the loop gets its turn.

    Args:
        max_hold: The longest that a slice should hold the event loop, in seconds; ``math.inf`` never yields.
    """

    __slots__ = ("longest_hold", "max_hold", "yields")

    def __init__(self, max_hold: float) -> None:
        self.max_hold = max_hold
        self.longest_hold = 0.0
        self.yields = 0

    async def run(self, work: Generator[None, None, T]) -> T:
        """Run a generator to its end.

        Args:
            work: Yields between its indivisible steps.

        Returns:
            What the generator returns.

        Cancellation is delivered between slices; the generator is then closed where it stands.
        """
        try:
            while True:
                begin = perf_counter()
                with _collection_pause:
                    try:
                        deadline = begin + self.max_hold
                        while perf_counter() < deadline:
                            next(work)
                    except StopIteration as stop:
                        result: T = stop.value
                        return result
                    finally:
                        self.longest_hold = max(self.longest_hold, perf_counter() - begin)
                self.yields += 1
                await checkpoint()
        finally:
            work.close()
