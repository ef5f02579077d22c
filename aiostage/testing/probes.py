"""Probes for tests: how long code holds the event loop, and what it leaves open."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from types import FrameType, TracebackType
from typing import Any

import anyio

from aiostage import _private
from aiostage._platform.files import DESCRIPTORS
from aiostage.stager import AsyncStager

__all__ = ["LeakProbe", "Leftovers", "LoopHold", "LoopProbe"]


@dataclass(frozen=True, slots=True)
class LoopHold:
    """A time during which an event loop did not get its turn.

    Attributes:
        seconds: How long it was.
        cpu_seconds: CPU time of the loop's thread meanwhile, without passes of the garbage collector. Much less than
            ``seconds`` means that it waited for something, or that the machine was busy with other processes.
        blamed_seconds: The part of ``cpu_seconds`` that was spent in the code that the probe looks for; 0 if it
            looks for none.
        stack: Where in that code the loop's thread was seen longest, as a traceback prints it, outermost first; empty
            if it was not seen there.
    """

    seconds: float
    cpu_seconds: float
    blamed_seconds: float = 0.0
    stack: str = field(default="", repr=False)


class LoopProbe:
    """Records when the event loop is held: by how late a timer of the loop runs.

    On trio, which reports every step of every task, it records the steps that are too long. Use it in a ``with`` block
    inside a coroutine, or call :meth:`start` and :meth:`stop` on the loop's thread. It opens no task and no cancel
    scope.

    Args:
        threshold: Seconds. Shorter holds are not recorded.
        interval: How often the loop should get its turn, in seconds. On asyncio this is how often the timer runs.
        inside: Takes the name of a Python file. If given, only those holds are recorded in which the loop's thread has
            computed for ``threshold`` seconds in such files or in functions that they call. Neither a busy machine nor
            the caller's own work can cause these. A thread then samples the loop's thread while the loop is late. It
            needs the threads' clocks of Linux. Elsewhere nothing is recorded.

    Attributes:
        holds: The recorded holds, in order.
    """

    def __init__(
        self, *, threshold: float = 0.05, interval: float = 0.005, inside: Callable[[str], bool] | None = None
    ) -> None:
        self.holds: list[LoopHold] = []
        self._threshold = threshold
        self._interval = interval
        self._inside = inside
        self._beat = _Beat(0.0, 0.0)
        self._thread = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = threading.Event()
        self._started = False
        self._tracker: Any = None

    @property
    def longest(self) -> float:
        """The longest recorded hold, in seconds; 0 if there was none."""
        return max((hold.seconds for hold in self.holds), default=0.0)

    def __enter__(self) -> LoopProbe:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def start(self) -> None:
        """Begin to watch the loop that is running in this thread. May be called once.

        Raises:
            RuntimeError: If it was started before.
        """
        if self._started:
            raise RuntimeError("a LoopProbe watches one loop, once; make another one")
        self._started = True
        self._thread = threading.get_ident()
        gc.callbacks.append(self._collected)
        self._begin()
        if self._inside is not None:
            threading.Thread(target=self._watch, name="aiostage-probe", daemon=True).start()
        try:
            self._tick(asyncio.get_running_loop())
        except RuntimeError:
            self._tracker = _follow_trio(self._begin, self._end)

    def stop(self) -> None:
        """Stop watching. The hold in which this is called is recorded. May be called more than once."""
        if self._stopped.is_set() or not self._started:
            return
        self._stopped.set()
        gc.callbacks.remove(self._collected)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._tracker is not None:
            self._tracker()
        self._end()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._end()
        self._begin()
        self._timer = loop.call_later(self._interval, self._tick, loop)

    def _begin(self) -> None:
        self._beat = _Beat(perf_counter() + self._interval, thread_time())

    def _end(self) -> None:
        """Record a hold, if the loop was held since the last beat."""
        beat = self._beat
        seconds = perf_counter() - beat.due
        if seconds < self._threshold or (self._inside is not None and beat.blamed < self._threshold):
            return
        cpu_seconds = beat.computed(thread_time())
        self.holds.append(LoopHold(seconds, cpu_seconds, min(beat.blamed, cpu_seconds), beat.stack))

    def _collected(self, phase: str, details: dict[str, int]) -> None:
        # A collection runs in whichever code makes the next object, and takes longer in a larger process. Its time is
        # not that code's.
        if threading.get_ident() != self._thread:
            return
        collected, since = self._beat.collecting
        now = thread_time()
        self._beat.collecting = (collected, now) if phase == "start" else (collected + now - (since or now), None)

    def _watch(self) -> None:
        """Sample what the loop's thread does while the loop is late. Runs in a thread of its own."""
        if not hasattr(time, "pthread_getcpuclockid"):
            return
        clock = time.pthread_getcpuclockid(self._thread)
        seen, known = self._beat, 0.0
        while not self._stopped.wait(self._threshold / 10):
            beat = self._beat
            if beat is not seen:
                seen, known = beat, 0.0
            # Only when the loop is late: a frame that this thread refers to keeps its local variables alive.
            if perf_counter() < beat.due + self._threshold / 4:
                continue
            try:
                computed = beat.computed(time.clock_gettime(clock))
            except OSError:
                # The loop's thread has ended.
                return
            stack = self._stack()
            if stack:
                beat.blame(stack, computed - known)
            known = computed

    def _stack(self) -> str:
        """Return the stack of the loop's thread, if it is in the code that the probe looks for."""
        assert self._inside is not None  # noqa: S101 - the watching thread only runs if it is given
        places: list[tuple[str, int, str, None]] = []
        frame: FrameType | None = (
            _private.current_frames().get(self._thread) if _private.current_frames is not None else None
        )
        # A frame that this refers to keeps its local variables alive, also after its end. So nothing is called in the
        # loop below that may let the loop's thread continue: neither the user's function, nor what reads source lines.
        while frame is not None:
            places.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name, None))
            frame = frame.f_back
        if not any(self._inside(file) for file, _, _, _ in places):
            return ""
        return "".join(traceback.StackSummary.from_list(reversed(places)).format())


@dataclass(slots=True, eq=False)
class _Beat:
    """The time from one turn of the loop to the next.

    The watching thread adds to it until the loop's thread replaces it by the next one. No lock: a sample that comes too
    late changes a beat that is over.
    """

    due: float
    cpu: float
    # How long the collector has run, and when its current pass began, if there is one. One tuple, so that a thread
    # reads both of one moment.
    collecting: tuple[float, float | None] = (0.0, None)
    blamed: float = 0.0
    # CPU time by the stack in which the loop's thread was seen.
    shares: dict[str, float] = field(default_factory=dict)
    stack: str = ""

    def blame(self, stack: str, seconds: float) -> None:
        """Add a sample: where the loop's thread was seen, and its CPU time since the last sample.

        The stack with the largest share counts. The last sample often finds the thread already past the hold.
        """
        self.blamed += seconds
        self.shares[stack] = self.shares.get(stack, 0.0) + seconds
        self.stack = max(self.shares, key=self.shares.__getitem__)

    def computed(self, now: float) -> float:
        """Return the CPU time of the beat at a time of the thread's clock, without collections."""
        collected, since = self.collecting
        return (now if since is None else since) - self.cpu - collected


def _follow_trio(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
    """Report the steps of all tasks of the running trio loop; return a function that ends this."""
    import trio

    class Tracker(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            begin()

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            end()

    tracker = Tracker()

    def forget() -> None:
        # After the end of the loop there is no instrument to remove.
        with suppress(RuntimeError):
            trio.lowlevel.remove_instrument(tracker)

    trio.lowlevel.add_instrument(tracker)
    return forget


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is there now and was not there when a :class:`LeakProbe` was made.

    Attributes:
        threads: Names of threads.
        descriptors: Targets of open file descriptors, as ``/proc/self/fd`` shows them.
        arenas: How many more arenas are leased, of the stagers that the probe knows.
        tasks: Names of tasks of the running event loop.
    """

    threads: tuple[str, ...] = ()
    descriptors: tuple[str, ...] = ()
    arenas: int = 0
    tasks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return whether there is anything."""
        return bool(self.threads or self.descriptors or self.arenas or self.tasks)


class LeakProbe:
    """Finds threads, file descriptors, tasks and leased arenas that were not there before.

    Make it on the running event loop, before the code that must leave nothing behind.

    Args:
        stagers: The stagers whose leases count.
        ignore_threads: Prefixes of the names of threads that may come and go.
    """

    def __init__(self, *stagers: AsyncStager, ignore_threads: tuple[str, ...] = ()) -> None:
        self._stagers = stagers
        # The thread of a LoopProbe ends by itself, a moment after stop().
        self._ignored = ("aiostage-probe", *ignore_threads)
        self._threads = set(threading.enumerate())
        self._descriptors = _descriptors()
        self._leases = self._count_leases()
        self._tasks = {task.id for task in anyio.get_running_tasks()}

    def leftovers(self) -> Leftovers:
        """Return what has been added since the probe was made, and is there now."""
        threads = set(threading.enumerate()) - self._threads
        return Leftovers(
            threads=tuple(sorted(thread.name for thread in threads if not thread.name.startswith(self._ignored))),
            descriptors=tuple(sorted((_descriptors() - self._descriptors).elements())),
            arenas=max(self._count_leases() - self._leases, 0),
            tasks=tuple(sorted(str(task.name) for task in anyio.get_running_tasks() if task.id not in self._tasks)),
        )

    async def settled(self, within: float = 10.0) -> None:
        """Wait until nothing is left over.

        It waits and runs the garbage collector, because threads end a moment after their work, and the objects of a
        cancelled coroutine may be a circle.

        Args:
            within: How long at most, in seconds.

        Raises:
            AssertionError: If something still is there, with its names.
        """
        deadline = perf_counter() + within
        pause = 0.001
        while leftovers := self.leftovers():
            if perf_counter() > deadline:
                raise AssertionError(f"after {within:g} seconds there still is {leftovers}")
            gc.collect()
            await anyio.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _count_leases(self) -> int:
        return sum(stager.statistics().leases for stager in self._stagers)


def _descriptors() -> Counter[str]:
    """Count what is open, by what it refers to."""
    found: Counter[str] = Counter()
    for number in os.listdir(DESCRIPTORS):
        try:
            found[os.readlink(f"{DESCRIPTORS}/{number}")] += 1
        except FileNotFoundError:
            # The one that the directory itself was read through.
            continue
        except OSError:
            # Not a link.
            found[number] += 1
    return found
