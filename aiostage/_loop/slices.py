"""When a coroutine with much to do gives the event loop a turn."""

from __future__ import annotations

from collections.abc import Generator
from time import perf_counter, thread_time
from typing import TypeVar

from anyio.lowlevel import checkpoint

from aiostage._loop.workers import Job
from aiostage._platform import let_threads_run

__all__ = ["Slices", "exhausted"]

T = TypeVar("T")


_SHARE = 0.3
"""How much of its time a slice plans with. asyncio runs what its selector reports after what was ready before, so that
a task woken between two slices often waits for both; the rest is for the step that is under way when a slice is up,
and for getting the GIL back from threads that have just been given it."""


class Slices:
    """Runs generators on the event loop in slices of bounded length.

    Work is written as a generator that yields wherever it may be interrupted: between leaves, or between small
    runs of them. It stays a plain function that tests can exhaust, and one place decides when the loop gets its turn.

    Args:
        max_hold: The longest that a slice should hold the event loop, in seconds; ``math.inf`` never yields.

    Attributes:
        longest_hold: The most CPU time of the loop's thread that went by without a turn for the loop, in seconds.
        longest_elapsed: The same by the clock. A system with too few cores takes the thread off its core in the
            middle of a slice, other threads have the GIL meanwhile, and that is no work of the slice.
        yields: How often the loop had a turn.
    """

    __slots__ = ("_computed", "_used", "longest_elapsed", "longest_hold", "max_hold", "yields")

    def __init__(self, max_hold: float) -> None:
        self.max_hold = max_hold
        self.longest_hold = self.longest_elapsed = 0.0
        self.yields = 0
        self._used = self._computed = 0.0

    def take(self, work: Generator[None, None, object]) -> bool:
        """Run the first slice of a generator at once, for callers who cannot wait; :meth:`run` goes on from there.

        It may use all of ``max_hold``: what is done in it is done at the call.

        Returns:
            Whether the generator has ended.
        """
        try:
            self._slice(work, share=1.0)
        except StopIteration:
            return True
        return False

    async def run(self, work: Generator[None, None, T], beside: Job | None = None, *, resumable: bool = False) -> T:
        """Run a generator to its end.

        Args:
            work: Yields between its indivisible steps.
            beside: What threads do meanwhile. They get the GIL now and then, and the slices are cut for that.
            resumable: Leave the generator open when cancelled, for another call to go on with it.

        Returns:
            What the generator returns.

        Cancellation is delivered between slices; the generator is then closed where it stands, unless resumable.
        """
        try:
            if self._used and self._used >= self.max_hold * _SHARE:
                await self._turn(beside)
            while True:
                try:
                    self._slice(work)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                await self._turn(beside)
        finally:
            if not resumable:
                work.close()
            # Python 3.13 leaves a generator that is closed before it has begun the arguments of its call, and the
            # traceback of a cancellation keeps this frame.
            del work

    async def _turn(self, beside: Job | None) -> None:
        """Let others run."""
        self.yields += 1
        if beside is not None and beside.busy:
            let_threads_run()
        await checkpoint()
        self._used = self._computed = 0.0

    def _slice(self, work: Generator[None, None, object], share: float = _SHARE) -> None:
        begin, computed = perf_counter(), thread_time()
        deadline = begin + self.max_hold * share - self._used
        try:
            # At least one step, or a max_hold below the clock's own cost would never get anywhere.
            next(work)
            while perf_counter() < deadline:
                next(work)
        finally:
            self._used += perf_counter() - begin
            self._computed += thread_time() - computed
            self.longest_elapsed = max(self.longest_elapsed, self._used)
            self.longest_hold = max(self.longest_hold, self._computed)


def exhausted(work: Generator[None, None, T]) -> T:
    """Run a generator to its end at once, and return what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            result: T = stop.value
            return result
