"""A few named threads that run blocking work in order of submission, and how coroutines wait for it.

Long work in them gives other threads the GIL now and then, and ends once it is cancelled.
"""

from __future__ import annotations

import _thread
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context, copy_context
from itertools import chain, islice
from time import perf_counter
from types import TracebackType
from typing import Any, TypeVar

from aiostage._loop.coroutines import Finalizer, ThreadsafeEvent, finish, without_locals
from aiostage._loop.forks import register_after_fork
from aiostage._platform.threads import let_threads_run

__all__ = [
    "Job",
    "Stopped",
    "Workers",
    "all_settled",
    "empty_in_steps",
    "large_lists",
    "release_gil",
    "releasing_gil",
    "start_thread",
    "stoppable",
]

T = TypeVar("T")

_IDLE_SECONDS = 5.0
"""A guess: longer than the pause between two parts of a checkpoint, shorter than a user would look for threads."""


_TURN = 0.0004
"""Seconds after which a thread gives the GIL away, so that an event loop beside it does not wait for long. The
interpreter waits 5 ms. Each time costs 60 to 80 microseconds: with 0.3 ms a load of 50,000 tensors takes a twentieth
longer, and no more ticks of the loop are late by 1 ms with 0.4."""

_SWITCH_INTERVAL = 0.0002
"""Seconds after which the interpreter takes the GIL from a thread during the work of a load, if another waits for it,
instead of 5 ms. It costs nothing while none waits. The loop's ticks are late as often as with pauses each 0.4 ms."""

_ITEMS_AT_ONCE = 16
"""Items between two looks at the clock."""


class Stopped(BaseException):
    """Work in a thread was cancelled.

    Not an ``Exception``, as asyncio's own error is not, so that ``except Exception`` does not catch it.
    """


class _Turn(threading.local):
    """Of one thread: when it last gave the GIL away, and what says whether its work is cancelled."""

    given = 0.0
    is_cancelled: Callable[[], bool] | None = None


_turn = _Turn()


class ShorterSwitchInterval:
    """A block in which the interpreter takes the GIL from a thread after 0.2 ms, if another waits for it.

    For long work that somebody waits for, such as a load: pauses for others cost it a sixth of its time though mostly
    none waits. Not for what goes on beside a training, such as a save: that should have the GIL back for as long as it
    likes, and here both sides have turns of the same length.

    The interval is one for the process. One that the user sets meanwhile stays, and a shorter one is left alone.
    """

    __slots__ = ("__weakref__", "_blocks", "_lock", "_ours", "_users")

    def __init__(self) -> None:
        self._blocks = 0
        self._users = self._ours = 0.0
        self._lock = threading.Lock()
        register_after_fork(self)

    def after_fork_in_child(self) -> object:
        """Put the user's interval back: no thread that has entered lives in the child."""
        self._lock = threading.Lock()
        if self._blocks:
            self._blocks = 0
            self._restore()
        return None

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._users = sys.getswitchinterval()
                if self._users > _SWITCH_INTERVAL:
                    sys.setswitchinterval(_SWITCH_INTERVAL)
                # As Python has it, in whole microseconds.
                self._ours = sys.getswitchinterval()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._restore()

    def _restore(self) -> None:
        if self._users > self._ours == sys.getswitchinterval():
            # Python cuts off what is not a whole microsecond, and what it returned is sometimes a little less than one.
            sys.setswitchinterval(self._users + 5e-7)


shorter_switch_interval = ShorterSwitchInterval()
"""There is one, because there is one interval."""


def release_gil() -> None:
    """Give other threads the GIL, if this one has had it for 0.4 ms. Call it in loops over much private data.

    Works in any thread, and takes 0.1 microseconds when it is not yet time. Where the interpreter's switch interval is
    as short, that does it.

    Raises:
        Stopped: If the work was begun by :func:`stoppable` and is cancelled.
    """
    # The cancellation is looked at only when a turn is due: a call of it costs more than the look at the clock, and 0.4
    # ms later is soon enough.
    if perf_counter() - _turn.given > _TURN:
        if _turn.is_cancelled is not None and _turn.is_cancelled():
            raise Stopped
        if sys.getswitchinterval() > _TURN:
            let_threads_run()
        _turn.given = perf_counter()


def releasing_gil(items: Iterable[T]) -> Iterator[T]:
    """Iterate over items, and call :func:`release_gil` now and then."""
    # Out of 16 items, 15 come without a step of the interpreter: a load of 50,000 tensors takes a million this way.
    return chain.from_iterable(_runs(iter(items)))


def _runs(items: Iterator[T]) -> Iterator[Iterable[T]]:
    for first in items:
        release_gil()
        yield chain((first,), islice(items, _ITEMS_AT_ONCE - 1))


_MANY = 1000
"""Elements that take noticeable time to drop at once."""


def large_lists(containers: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Return the lists among some containers that :func:`empty_in_steps` is worth calling for. Blocks."""
    found: list[list[Any]] = []
    for each in releasing_gil(containers):
        if isinstance(each, list) and len(each) > _MANY:
            found.append(each)  # noqa: PERF401 - a comprehension would be one more function that a save enters
    return found


def empty_in_steps(containers: list[list[Any] | dict[Any, Any]]) -> None:
    """Drop what private containers have in them, and give other threads the GIL meanwhile.

    Objects that end in one go, with the last variable that leads to them, hold the GIL, and so the event loop, for 10
    ms for each 50,000 of them. The last container is emptied first.
    """
    while containers:
        # Taken out of the list, so that this frame holds the only reference and each element dies where it is deleted,
        # not all of them at the end.
        container = containers.pop()
        if isinstance(container, dict):
            while container:
                for _ in range(min(_ITEMS_AT_ONCE, len(container))):
                    container.popitem()
                release_gil()
        else:
            while container:
                del container[-_ITEMS_AT_ONCE:]
                release_gil()


@contextmanager
def stoppable(is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Have :func:`release_gil` end the work of the block once it is cancelled."""
    # Restored, because the thread goes on to steps of other jobs, which the cancellation of this one must not end.
    before, _turn.is_cancelled = _turn.is_cancelled, is_cancelled
    try:
        yield
    finally:
        _turn.is_cancelled = before


class Job:
    """A growing sequence of short blocking steps that worker threads take in order.

    Several threads may run different steps of one job at once. After :meth:`cancel`, or after a step has failed,
    the steps not yet begun are dropped; those that run are always waited for. Steps hold references to what they
    touch, so memory outlives the last step that uses it, also when the coroutine that made the job is gone. Each runs
    in a copy of the context of the caller of put, as with ``asyncio.to_thread``.

    A coroutine that fills a job from beginning to end does so in its ``async with`` block, which ends as :meth:`join`
    does, and after an error as a cancelled :meth:`join` does.
    """

    __slots__ = (
        "__weakref__",
        "_cancellations",
        "_done",
        "_error",
        "_lock",
        "_open",
        "_running",
        "_steps",
        "_submit",
        "_waiters",
    )

    def __init__(self, submit: Callable[[Job], None]) -> None:
        self._submit = submit
        # Reentrant, because the collector may close a coroutine that waits for this job while this thread has the lock.
        self._lock = threading.RLock()
        self._steps: deque[tuple[Context, Callable[[], object]]] = deque()
        self._running = 0
        self._done = 0
        self._open = True
        self._cancellations = 0
        self._error: BaseException | None = None
        # Each with how many steps and cancellations it has seen; infinitely many to wait for the end.
        self._waiters: dict[ThreadsafeEvent, float] = {}

    @property
    def done(self) -> int:
        """How many steps have completed."""
        return self._done

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called; a long step may look at this and end early."""
        return self._cancellations > 0

    @property
    def error(self) -> BaseException | None:
        """What the first failing step raised."""
        return self._error

    @property
    def busy(self) -> bool:
        """Whether steps run or wait to."""
        return bool(self._steps or self._running)

    def put(self, step: Callable[[], object]) -> None:
        """Add a step. After a failure or a cancellation it is dropped."""
        # Taken in the caller's thread: it is the caller's span and context variables that the step belongs to. A copy
        # for each step, since two threads cannot be in one context at once.
        context = copy_context()
        with self._lock:
            if not self._open:
                return
            self._steps.append((context, step))
        # Outside of the lock, so that it is never held together with the workers' condition. The job may be cancelled
        # in between: a worker that finds no step only returns.
        self._submit(self)

    def close(self) -> None:
        """Say that no step will be added."""
        with self._lock:
            self._open = False
            waiters = self._take_waiters()
        # Outside of the lock, here and below: waking a waiter may take locks of its event loop.
        _wake(waiters)

    def cancel(self) -> None:
        """Drop the steps not yet begun, and take no more."""
        with self._lock:
            self._open = False
            # With the lock, like _open: a step that put() adds at the same time is either dropped here or refused
            # there.
            self._steps.clear()
            # Each call counts: a step that runs may hang, and a closed stager does not wait for it.
            self._cancellations += 1
            waiters = self._take_waiters()
        _wake(waiters)

    def run_next(self) -> None:
        """Run the next step, if there is one, in the calling thread."""
        with self._lock:
            if not self._steps:
                return
            # Before the step is taken out: finished() takes no lock, and must not see a moment at which the step is
            # neither waiting nor running.
            self._running += 1
            context, step = self._steps.popleft()
        error: BaseException | None = None
        try:
            context.run(step)
        except BaseException as raised:
            error = without_locals(raised)
        # The step keeps tensors alive; it must be gone before a waiter learns that it is over.
        del context, step
        with self._lock:
            self._done += 1
            if error is not None:
                self._error = self._error or error
                error = None
                self._open = False
                self._steps.clear()
            # Last, for the same reason: a thread that sees that it is over finds its error.
            self._running -= 1
            waiters = self._take_waiters()
        _wake(waiters)
        # An error's frames lead back to the one that called them, which is this, and that must not lead to the error.
        del self

    def finished(self) -> bool:
        """Return whether no step runs, none is left and none can be added."""
        # Without the lock, and in this order: a step goes from waiting to running and counts as both in between, so it
        # is found in one of the two.
        return not (self._open or self._steps or self._running)

    async def until(self, met: Callable[[], object] | None = None) -> None:
        """Wait until something holds that a step or a cancellation brings about, or the job is finished.

        Args:
            met: Returns whether it holds. Asked at first, and after each step and each call of :meth:`cancel`. None:
                only the end of the job is waited for.

        Cancelling changes nothing.
        """
        while True:
            # Read before the question, so that a step or a cancellation that comes after the answer, from another
            # thread, is not missed.
            seen = math.inf if met is None else self._done + self._cancellations
            if met is not None and met():
                return
            with self._lock:
                # One step with the enlisting, or the last step could end in between, and find no waiter to wake.
                if not (self._open or self._steps or self._running):
                    return
                if self._done + self._cancellations > seen:
                    continue
                event = ThreadsafeEvent()
                self._waiters[event] = seen
            try:
                await event.wait()
            finally:
                with self._lock:
                    # Gone already if a thread has taken the waiters in order to wake them; the event is then set for
                    # nothing.
                    self._waiters.pop(event, None)
            if met is None:
                return

    async def settled(self) -> None:
        """Wait until the job is finished, without raising a step's error. Cancelling changes nothing."""
        await self.until()

    async def join(self) -> None:
        """Wait until the job is finished.

        Raises:
            BaseException: What the first failing step raised.

        When cancelled, drops the steps not yet begun, waits for those that run, and only then is cancelled.
        """
        try:
            # As in settled(). It is not called, because nearly all that waits in a thread stands on this frame.
            await self.until()
        except BaseException as error:
            await self._give_up(error)
            raise
        failure = self._error
        if failure is not None:
            try:
                raise failure
            finally:
                # The traceback now has this frame in it, which must not lead back to the error.
                del self, failure

    async def __aenter__(self) -> Job:
        """Return self."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the steps that the block has put; after an error in it, only for those that run.

        Raises:
            BaseException: What the first failing step raised, unless the block itself has failed.
        """
        try:
            if error is None:
                self.close()
                await self.join()
            else:
                await self._give_up(error)
        finally:
            # The traceback of a step's error will have the block's frame in it, which leads here.
            self._error = None

    async def _give_up(self, error: BaseException) -> None:
        """Drop the steps that have not started and wait for those that run. It is shielded from cancellation."""
        self.cancel()
        # A coroutine that is being closed may not wait; the running steps keep their own memory alive.
        if not isinstance(error, GeneratorExit):
            await finish(self.settled)

    def _take_waiters(self) -> list[ThreadsafeEvent]:
        """Return those to wake now. A step that is not the last wakes none that waits for the end, nor its loop."""
        # Exchanged first: the collector may close a coroutine that waits at any moment, and that takes its event out.
        waiters, self._waiters = self._waiters, {}
        finished, woken = self.finished(), []
        for event, seen in waiters.items():
            if finished or self._done + self._cancellations > seen:
                woken.append(event)
            else:
                self._waiters[event] = seen
        return woken


async def all_settled(jobs: Iterable[Job]) -> None:
    """Wait until jobs are finished, without raising the errors of their steps. Shielded from cancellation.

    A cancellation is delivered when all of them are, and not when the first is.
    """
    waited_for = tuple(jobs)

    async def settled() -> None:
        for job in waited_for:
            await job.settled()

    await finish(settled)


def _submit_nothing(_: Job) -> None:
    """Leave the steps of a job to the caller."""


def _wake(waiters: list[ThreadsafeEvent]) -> None:
    for waiter in waiters:
        waiter.set()


class Workers:
    """A few daemon threads, started when there is work and ended when there has been none for a while.

    A forked child has threads of its own. What its parent has submitted is the parent's, and is not done again there.

    Args:
        threads: How many steps may run at once.
        name: What the threads are called, followed by a number.
        prepare: What each thread calls first, with the GIL; pass ``torch.get_num_threads`` where steps copy tensors.
            PyTorch makes its own threads anew when a thread of a forked child first uses it, without a lock: two
            threads that do so at once end in "Invalid thread pool!". That call does it, and keeps the GIL.
        switches_soon: Whether the calls of :meth:`run` lose the GIL by a shorter switch interval, and not by pauses.
        idle_seconds: How long an idle thread waits for work before it ends.
    """

    def __init__(
        self,
        threads: int,
        name: str,
        *,
        prepare: Callable[[], object] | None = None,
        switches_soon: bool = False,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self._turns: AbstractContextManager[object] = shorter_switch_interval if switches_soon else nullcontext()
        self._state = _WorkerState(threads, name, prepare, idle_seconds)
        Finalizer(self, self._state.stop)

    def job(self, *, inline: bool = False) -> Job:
        """Return a new job, open and empty.

        Args:
            inline: No thread takes its steps; the caller of :meth:`Job.put` calls :meth:`Job.run_next`.
        """
        return Job(_submit_nothing if inline else self._state.submit)

    async def run(self, call: Callable[[], T]) -> T:
        """Run one blocking call in a worker thread.

        Args:
            call: Takes no argument; bind them.

        Returns:
            What the call returns.

        Raises:
            BaseException: The error of the call.

        When cancelled before it begins, the call never runs; afterwards it is waited for, and its result is lost.
        A :func:`release_gil` in it ends it early.
        """
        job = self.job()
        # Taken out, because the traceback of an error leads to the step, and must not lead to the arguments.
        calls, results, turns = [call], list[T](), self._turns
        del call

        def step() -> None:
            with turns, stoppable(lambda: job.cancelled):
                results.append(calls.pop()())

        try:
            job.put(step)
            job.close()
            await job.join()
        finally:
            # The traceback of the call's error will have this frame in it, which leads here.
            # A job is used by this call only, so no other waiter loses the error by it.
            job._error = None
        return results[0]

    @property
    def threads(self) -> int:
        """How many threads are alive now."""
        return self._state.alive

    def stop(self) -> None:
        """Let the threads end once the work that was submitted is done. Later work starts them again."""
        self._state.stop()


class _WorkerState:
    """What the threads share. They refer to this and not to Workers, so that dropping Workers ends them."""

    def __init__(self, threads: int, name: str, prepare: Callable[[], object] | None, idle_seconds: float) -> None:
        self.limit = threads
        self.idle_seconds = idle_seconds
        self.name = name
        self.prepare = prepare
        self.alive = 0
        self.idle = 0
        self.started = 0
        self.stopping = False
        self.queue: deque[Job] = deque()
        self.condition = threading.Condition()
        register_after_fork(self)

    def after_fork_in_child(self) -> object:
        # A new lock: a thread of the parent may have held the old one at the fork, and does not exist here.
        self.condition = threading.Condition()
        self.alive = self.idle = 0
        left_behind, self.queue = self.queue, deque()
        return left_behind

    def submit(self, job: Job) -> None:
        with self.condition:
            # New work takes back an earlier stop(). Threads that have not ended by then go on, so nothing is started
            # twice.
            self.stopping = False
            self.queue.append(job)
            # Enough idle threads for all that is queued, this job included: one that was woken for an earlier job still
            # counts as idle until it runs, so comparing with 1 could leave this job without a thread.
            if self.idle >= len(self.queue):
                self.condition.notify()
                return
            if self.alive >= self.limit:
                return
            self.alive += 1
            self.started += 1
            number = self.started
        try:
            # Daemon threads do not keep an interpreter from exiting; a step that runs then is a copy into memory
            # that goes away with the process.
            start_thread(threading.Thread(target=self._serve, name=f"{self.name}-{number}", daemon=True))
        except RuntimeError:
            with self.condition:
                self.alive -= 1
                if self.alive == 0:
                    # No thread is left to serve it. With fewer threads than wished, work only takes longer.
                    self.queue.remove(job)
                    raise

    def stop(self) -> None:
        with self.condition:
            self.stopping = True
            # Only idle threads are woken. One that runs a step sees the mark when it finds the queue empty.
            self.condition.notify_all()

    def _serve(self) -> None:
        # Outside of the lock and before the first step: it may take long the first time in a process.
        if self.prepare is not None:
            self.prepare()
        while True:
            with self.condition:
                while not self.queue:
                    if self.stopping:
                        self.alive -= 1
                        return
                    self.idle += 1
                    woken = self.condition.wait(self.idle_seconds)
                    self.idle -= 1
                    # The queue too: a job may have come after the wait timed out and before this thread got the lock.
                    if not woken and not self.queue:
                        self.alive -= 1
                        return
                job = self.queue.popleft()
            job.run_next()
            # Otherwise an idle thread would keep its last job's memory, and with it a lease.
            del job


def start_thread(thread: threading.Thread) -> None:
    """Start a thread that was not started; it appears among the threads of the process a moment later.

    ``Thread.start()`` returns when the new thread has had its first turn, for which that waits like any other: where
    all cores are busy an event loop was held for up to 3 ms. So another, internal thread waits for it.

    Args:
        thread: A daemon; what it runs is run at once or, if the interpreter ends, never.

    Raises:
        RuntimeError: If no thread can be had.
    """
    # The internal thread is not known to the threading module, and is not waited for at exit.
    _thread.start_new_thread(_start_thread, (thread,))


def _start_thread(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:
        # The system grants one more thread and not two, so this internal thread does the work.
        thread.run()
