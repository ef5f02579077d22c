"""What coroutines need besides anyio, on asyncio and on trio.

Names, running concurrently, orderly ends, errors that keep no memory, functions that are called when objects die,
waking (from any thread, and when what they wait for is closed), and turns for the event loop while they have much
to do.
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import CORO_CREATED, getcoroutinestate, iscoroutine
from time import perf_counter, thread_time
from traceback import clear_frames
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import ref

import anyio
from anyio.lowlevel import checkpoint, current_token

from aiostage._platform.threads import let_threads_run
from aiostage.errors import StagerClosedError

__all__ = [
    "Closing",
    "Finalizer",
    "RarerCollections",
    "Slices",
    "ThreadsafeEvent",
    "collect_new_objects",
    "exhausted",
    "finish",
    "give_up",
    "named",
    "post",
    "run_concurrently",
    "without_locals",
]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def named(coroutine: Coroutine[Any, Any, T], name: str, inner: object = None) -> Coroutine[Any, Any, T]:
    """Give a coroutine the name of the public function that returns it, by which Python warns if it is never awaited.

    Args:
        coroutine: As an ``async def`` function returns it.
        name: Such as ``AsyncStager.stage``.
        inner: A coroutine that was made at the call too, and is awaited by this one; anything else is ignored.
    """
    coroutine.__qualname__ = name  # type: ignore[attr-defined]
    if iscoroutine(inner):
        # A finalizer, and not a coroutine around both: that would be one frame more in every wait, and would itself be
        # one that can be dropped before it has begun.
        Finalizer(coroutine, _close_unless_begun, inner)
    return coroutine


def _close_unless_begun(inner: Coroutine[Any, Any, object]) -> None:
    # A task that is cancelled before its first turn never enters its coroutine, not even the finally clauses. Python
    # would warn of the inner one, of which the caller has never heard. One that has begun ends as all do.
    if getcoroutinestate(inner) == CORO_CREATED:
        inner.close()


async def run_concurrently(*calls: Callable[[], Awaitable[object]]) -> None:
    """Run coroutines at once and wait for all of them.

    Args:
        calls: Each is called for something to await. The last runs in the calling task, the others beside it.

    Raises:
        BaseException: What the first of them to fail has raised, itself and not in a group; the others have been
            cancelled and have ended by then. What they raised meanwhile is lost.

    When cancelled, all of them are.
    """
    failures: list[BaseException] = []

    async def run(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # Ctrl-C too: Trio raises it in whichever task runs, and a group of it is nothing that programs catch.
            # Kept, and not raised: the task group would raise a group of it. Cancelling the scope ends the others as
            # raising would. The first in the list is the first that failed, because all of them run in one thread.
            failures.append(error)
            group.cancel_scope.cancel()
        except BaseException as error:
            # anyio leaves a cancelled task's error in a circle of frames, which must not lead to memory.
            without_locals(error)
            raise
        finally:
            # From Python 3.12 on, this frame is in that circle too.
            del call

    async with anyio.create_task_group() as group:
        for call in calls[:-1]:
            group.start_soon(run, call)
        # Inside the block, so that the failure of another call cancels this one too; through run(), so that its own
        # error is not put into a group either.
        await run(calls[-1])
    if failures:
        try:
            raise failures[0]
        finally:
            # The traceback now has this frame in it, which must not lead back to the error.
            failures.clear()


async def finish(wait: Callable[[], Awaitable[T]]) -> T:
    """Wait for something to its end, and deliver a cancellation that came meanwhile only then.

    A shielded cancel scope keeps anyio's cancellation out but not ``asyncio.Task.cancel()``, which has to be caught
    and kept; both reach the caller as the same exception.

    Args:
        wait: Called for something to await, and again after each cancellation. It must bear being repeated.

    Returns:
        What the awaitable returns.

    Raises:
        BaseException: The error of the awaitable. If the task was cancelled while waiting, the cancellation.
    """
    cancelled: BaseException | None = None
    with anyio.CancelScope(shield=True):
        while True:
            try:
                # asyncio delivers each cancel() once, so the wait after it is undisturbed until the next one. The
                # cancellation of an anyio scope does not come in here at all, and is delivered at the caller's next
                # await.
                result = await wait()
                break
            except anyio.get_cancelled_exc_class() as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
    return result


async def give_up(aborting: Coroutine[Any, Any, object], error: BaseException) -> None:
    """Abort something after an error.

    A coroutine that is being closed may not wait; the abort then gets as far as it gets without waiting.
    """
    # A coroutine that yields while it is being closed ends in RuntimeError, and nothing would resume it. All that
    # handle GeneratorExit apart, here and in other files, do so for this.
    if not isinstance(error, GeneratorExit):
        await aborting
        return
    with suppress(Exception):
        # StopIteration is the end; no caller is left for any other error.
        aborting.send(None)
    aborting.close()


def without_locals(error: E) -> E:
    """Drop what an error's traceback keeps alive: memory must not live as long as the report that copying it failed.

    Called where the error is caught; the frame that calls is dropped from the traceback. What the error was raised from
    is treated alike, but not what was being handled meanwhile, which is the caller's.
    """
    traceback = error.__traceback__
    cause: BaseException | None = error
    # ``raise error from error`` makes a circle.
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        # Frames that still run are left alone, so this may be called while the callers' frames are in use.
        clear_frames(cause.__traceback__)
        cause = cause.__cause__
    return error.with_traceback(traceback.tb_next if traceback is not None else None)


# Not weakref.finalize: at the end of the interpreter it goes through a dict of all that wait, in Python. If an object
# dies in another thread meanwhile, that ends in "dictionary changed size during iteration", and no finalizer is called
# any more, of other packages neither. Much of aiostage dies in daemon threads, which run until then.
class Finalizer:
    """Calls a function once: when an object dies, in whichever thread, or before that when it is called. Not at exit.

    Args:
        owner: The object, which is not kept alive.
        function: What is called. It must not lead to the owner.
        arguments: Its arguments; nor must these.
    """

    __slots__ = ()

    # Changed by single operations of a dict, and gone through by nothing.
    _waiting: ClassVar[dict[Finalizer, tuple[ref[Any], Callable[..., object], tuple[object, ...]]]] = {}

    def __init__(self, owner: object, function: Callable[..., object], *arguments: object) -> None:
        self._waiting[self] = ref(owner, self), function, arguments

    def __call__(self, _reference: object = None) -> None:
        """Call the function, unless it has been called or the owner was detached."""
        waiting = self._waiting.pop(self, None)
        if waiting is not None:
            _, function, arguments = waiting
            function(*arguments)

    @property
    def alive(self) -> bool:
        """Whether the function is still to be called."""
        return self in self._waiting

    def detach(self) -> bool:
        """Let the function not be called, and return whether it was still to be."""
        return self._waiting.pop(self, None) is not None


class ThreadsafeEvent:
    """A one-shot event that any thread may set and one event loop waits for.

    It belongs to the loop that is running when it is made. Setting it after that loop has closed wakes
    no task, and returns that.
    """

    __slots__ = ("_event", "_native", "_set")

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._native: Any = current_token().native_token
        self._set = False

    def set(self) -> bool:
        """Wake the waiters. May be called from any thread, from a finalizer, and more than once.

        Returns:
            Whether there is a loop to wake them in. False once it has closed, and its coroutines with it.
        """
        # Before posting: what wakes in the loop has to find it set. The loop's own event is set there, since anyio's
        # may be set by no other thread.
        self._set = True
        return post(self._native, self._event.set)

    def is_set(self) -> bool:
        """Return whether :meth:`set` has been called; the waiters may still be about to run."""
        return self._set

    async def wait(self, at_most: float = math.inf) -> None:
        """Wait until set. Cancelling changes nothing but that this waiter leaves.

        Args:
            at_most: Seconds after which to return in any case; all waiters then return, and it stays unset.
        """
        if at_most == math.inf:
            await self._event.wait()
        elif _is_asyncio(self._native):
            # Not a cancel scope: leaving one needs its running loop, which a coroutine that the collector closes
            # after its loop has gone does not have. Trio leaves no coroutine behind.
            # The timer sets the same event as set() does, so it cannot be waited for a second time: callers take a new
            # one for each turn. is_set() still says which of the two it was.
            timer = self._native.call_later(at_most, self._event.set)
            try:
                await self._event.wait()
            finally:
                timer.cancel()
        else:
            with anyio.move_on_after(at_most):
                await self._event.wait()


def post(native: Any, call: Callable[[], object]) -> bool:
    """Have something called in an event loop. May be called from any thread, and from a finalizer.

    Args:
        native: anyio's ``native_token`` of the loop.
        call: What to call there, between two steps of its coroutines.

    Returns:
        Whether there is such a loop still.
    """
    try:
        (native.call_soon_threadsafe if _is_asyncio(native) else native.run_sync_soon)(call)
    except RuntimeError:
        # asyncio's loop is closed, or trio's run is over.
        return False
    return True


def _is_asyncio(native: object) -> bool:
    return isinstance(native, asyncio.AbstractEventLoop)


class Closing:
    """Whether a stager is closed, and whom to tell when it is.

    Attributes:
        closed: Whether :meth:`close` was called.
    """

    def __init__(self) -> None:
        self.closed = False
        # Without a lock: the collector may close a coroutine that waits, in a thread that is closing just now.
        self._calls: dict[object, Callable[[], object]] = {}

    def check(self) -> None:
        """Raise StagerClosedError if it is closed."""
        if self.closed:
            raise StagerClosedError

    def close(self) -> None:
        """Tell all. From any thread, and more than once."""
        self.closed = True
        # closed is set before the calls are read, and on_close() enters its call before it looks at closed: one of the
        # two always sees the other. The list is made in one operation, so no thread changes the dict meanwhile; a call
        # that has been taken out since is posted for nothing.
        for call in list(self._calls.values()):
            call()

    @contextmanager
    def on_close(self, call: Callable[[], object]) -> Iterator[None]:
        """Have something called, in the event loop that is running now, if it is closed while the block runs.

        It comes after whatever the loop does at that moment, so that a caller that checks :attr:`closed` and then
        waits, without giving way in between, misses nothing. It may be called once more, or when the block was just
        left.
        """
        key = object()
        self._calls[key] = told = partial(post, current_token().native_token, call)
        try:
            if self.closed:
                told()
            yield
        finally:
            del self._calls[key]


_SHARE = 0.4
"""How much of its time a slice plans with. The rest is for the step that is under way when a slice is up, and for
getting the GIL back from threads that have just been given it."""

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


_FEW_YOUNG_RUNS = 4

_USUAL_YOUNG_RUNS = 10
"""After more young runs than this CPython's collector looks at more, unless the user has set another threshold."""


def collect_new_objects() -> None:
    """Let the collector look at what was made since it last did more than its young runs, if much was and it is on.

    Called half-way through much new work. It comes to that by itself after eleven young runs, which are twice as many
    objects for one hold of the GIL: 6 ms in the first staging of 50,000 tensors, instead of 3. A user who has set a
    higher threshold wants it later, and it is left to that.
    """
    first, second, _ = gc.get_threshold()
    if gc.isenabled() and first and second <= _USUAL_YOUNG_RUNS and gc.get_count()[1] > _FEW_YOUNG_RUNS:
        gc.collect(1)


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


class _Busy(Protocol):
    """What threads do beside a coroutine: a :class:`~aiostage._loop.workers.Job`."""

    @property
    def busy(self) -> bool:
        """Whether steps run or wait to."""
        ...


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

    # _used and _computed: what has gone by since the loop had its last turn, in seconds of the clock and of the
    # thread's CPU time. They outlive a generator, so that several short ones in a row count as one hold.
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

    async def run(self, work: Generator[None, None, T], beside: _Busy | None = None, *, resumable: bool = False) -> T:
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
            # What take(), or an earlier generator, has used of this turn counts. Otherwise a staging of many small
            # steps would never give way.
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

    async def _turn(self, beside: _Busy | None) -> None:
        """Let others run."""
        self.yields += 1
        # Where nothing else is due the loop gives the GIL away for an instant only, too short for another thread to
        # wake up and take it.
        if beside is not None and beside.busy:
            let_threads_run()
        await checkpoint()
        # Twice, because asyncio runs what its selector reports after what was ready before, such as this task: what
        # came during one slice would wait for the next as well.
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
            # Also for the slice that ends the generator, or fails: its time was used all the same.
            self._used += perf_counter() - begin
            self._computed += thread_time() - computed
            self.longest_elapsed = max(self.longest_elapsed, self._used)
            self.longest_hold = max(self.longest_hold, self._computed)


def exhausted(work: Generator[None, None, T], between: Callable[[], object] | None = None) -> T:
    """Run a generator to its end at once, and return what it returns.

    Args:
        work: The generator.
        between: Called wherever it yields.
    """
    while True:
        try:
            next(work)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if between is not None:
            between()
