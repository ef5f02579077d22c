"""When a coroutine with much to do gives the event loop a turn."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from time import perf_counter, thread_time
from typing import TypeVar

from anyio.lowlevel import checkpoint

from aiostage._loop.workers import Job
from aiostage._platform import let_threads_run

__all__ = ["RarerCollections", "Slices", "exhausted"]

T = TypeVar("T")


_SHARE = 0.3
"""How much of its time a slice plans with. asyncio runs what its selector reports after what was ready before, so that
a task woken between two slices often waits for both; the rest is for the step that is under way when a slice is up,
and for getting the GIL back from threads that have just been given it."""

_YOUNG_OBJECTS = 7919
"""After how many new objects the collector runs meanwhile, instead of CPython's 700 (2,000 in newer ones): such a run
takes a millisecond. A number that no program sets by itself, so that it is known for ours."""

_blocks: set[object] = set()
"""The blocks of :class:`RarerCollections` that are entered."""

_users_thresholds: list[tuple[int, int, int]] = []
"""What those who are the first to enter have found, until the last leaves."""


class RarerCollections:
    """A block in which Python's cyclic collector runs less often, because many objects are made that are no garbage.

    50,000 staged tensors are as many new objects; with CPython's thresholds every second staging meets a run over the
    whole heap, which holds the GIL and so the event loop for 100 ms in a small process. The collector stays enabled.
    Thresholds that the user sets meanwhile stay, and higher ones are left alone, as is 0, which switches it off.
    """

    # Without a lock, which the handler of a signal could wait for. Of threads that enter and leave at once, one may
    # have the user's thresholds in its block; the last that leaves finds no block, and puts back what was found.

    __slots__ = ()

    def __enter__(self) -> None:
        _blocks.add(self)
        first, second, third = gc.get_threshold()
        if 0 < first < _YOUNG_OBJECTS:
            _users_thresholds[:] = [(first, second, third)]
            gc.set_threshold(_YOUNG_OBJECTS, second, third)

    def __exit__(self, *_: object) -> None:
        _blocks.discard(self)
        if not _blocks:
            _restore_thresholds()


def _restore_thresholds() -> None:
    before, _users_thresholds[:] = _users_thresholds[:], []
    # Others are the user's, set meanwhile.
    if before and gc.get_threshold() == (_YOUNG_OBJECTS, *before[0][1:]):
        gc.set_threshold(*before[0])


def _after_fork_in_child() -> None:
    """Leave the blocks to the parent's threads."""
    _blocks.clear()
    _restore_thresholds()


os.register_at_fork(after_in_child=_after_fork_in_child)


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
            try:
                self._slice(work)
                # What takes one slice makes few objects.
                with RarerCollections():
                    while True:
                        await self._turn(beside)
                        self._slice(work)
            except StopIteration as stop:
                result: T = stop.value
                return result
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
