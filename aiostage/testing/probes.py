"""What code does to the event loop that it runs on, and what it leaves behind."""

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
from aiostage._platform import DESCRIPTORS
from aiostage.stager import AsyncStager

__all__ = ["LeakProbe", "Leftovers", "LoopHold", "LoopProbe"]


@dataclass(frozen=True, slots=True)
class LoopHold:
    """A time during which an event loop did not get its turn.

    Attributes:
        seconds: How long.
        cpu_seconds: How long the loop's thread computed meanwhile, apart from passes of the garbage collector. Much
            less than ``seconds`` means that it waited for something, or that the machine was busy with others.
        blamed_seconds: How much of ``cpu_seconds`` was spent in the code that the probe looks for; 0 if it looks
            for none.
        stack: Where the loop's thread was when it last was seen in that code, as a traceback prints it, outermost
            first; empty if it was not seen there.
    """

    seconds: float
    cpu_seconds: float
    blamed_seconds: float = 0.0
    stack: str = field(default="", repr=False)


class LoopProbe:
    """Notes when the event loop is held, with the loop's own eyes: by how late its timers run.

    On trio, which tells of every step of every task, it notes the steps that are too long. Use it in a ``with`` block
    inside a coroutine, or call :meth:`start` and :meth:`stop` on the loop's thread. It opens no task and no cancel
    scope.

    Args:
        threshold: What is shorter is not noted, in seconds.
        interval: How often the loop is to get its turn, in seconds. On asyncio this is how often a timer runs.
        inside: Takes the name of a Python file. If given, only those holds are noted in which the loop's thread has
            computed for ``threshold`` seconds in such files or in what they call, which neither a busy machine nor
            a caller's own work can cause. A thread then looks at the loop's thread while the loop is late. Needs the
            threads' clocks of Linux; elsewhere nothing is noted.

    Attributes:
        holds: Those noted so far, in order.
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
        """The longest hold noted, in seconds; 0 if there was none."""
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
        """Begin to look at the loop that is running in this thread. May be done once.

        Raises:
            RuntimeError: If it was started before.
        """
        if self._started:
            raise RuntimeError("a LoopProbe looks at one loop, once; make another one")
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
        """Look no more. What holds the loop while this is called is noted. May be called more than once."""
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
        """Note a hold, if the loop was held since the last beat."""
        beat = self._beat
        seconds = perf_counter() - beat.due
        if seconds < self._threshold or (self._inside is not None and beat.blamed < self._threshold):
            return
        cpu_seconds = beat.computed(thread_time())
        self.holds.append(LoopHold(seconds, cpu_seconds, min(beat.blamed, cpu_seconds), beat.stack))

    def _collected(self, phase: str, details: dict[str, int]) -> None:
        # A collection runs in any code that makes an object at that moment, and takes longer in a larger process.
        if threading.get_ident() != self._thread:
            return
        collected, since = self._beat.collecting
        now = thread_time()
        self._beat.collecting = (collected, now) if phase == "start" else (collected + now - (since or now), None)

    def _watch(self) -> None:
        """Find out what the loop's thread does while the loop is late; runs in a thread of its own."""
        if not hasattr(time, "pthread_getcpuclockid"):
            return
        clock = time.pthread_getcpuclockid(self._thread)
        seen, known = self._beat, 0.0
        while not self._stopped.wait(self._threshold / 10):
            beat = self._beat
            if beat is not seen:
                seen, known = beat, 0.0
            # A frame that is looked at keeps what it refers to, so none is without need.
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
        """Return where the loop's thread is, if it is in the code that is looked for."""
        assert self._inside is not None  # noqa: S101 - the watching thread only runs if it is given
        places: list[tuple[str, int, str, None]] = []
        frame: FrameType | None = (
            _private.current_frames().get(self._thread) if _private.current_frames is not None else None
        )
        # A frame that is looked at keeps what it refers to, after its end too. So nothing is called meanwhile that may
        # let the loop's thread go on: not what the user gave, and not what reads the lines of files.
        while frame is not None:
            places.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name, None))
            frame = frame.f_back
        if not any(self._inside(file) for file, _, _, _ in places):
            return ""
        return "".join(traceback.StackSummary.from_list(reversed(places)).format())


@dataclass(slots=True, eq=False)
class _Beat:
    """From one turn of the loop to the next.

    The watching thread adds to what it found until the loop's thread has put another beat in its place.
    """

    due: float
    cpu: float
    # How long the collector has run, and since when it does now, if it does. One value, so that both are of one moment.
    collecting: tuple[float, float | None] = (0.0, None)
    blamed: float = 0.0
    # How long the loop's thread has computed in each place in which it was seen.
    shares: dict[str, float] = field(default_factory=dict)
    stack: str = ""

    def blame(self, stack: str, seconds: float) -> None:
        """Note where the loop's thread was seen, and what it has computed since the look before.

        The place with the largest share counts: the last look often finds the thread already past what has held it.
        """
        self.blamed += seconds
        self.shares[stack] = self.shares.get(stack, 0.0) + seconds
        self.stack = max(self.shares, key=self.shares.__getitem__)

    def computed(self, now: float) -> float:
        """Return how long the loop's thread has computed at a time of its clock, apart from collections."""
        collected, since = self.collecting
        return (now if since is None else since) - self.cpu - collected


def _follow_trio(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
    """Have the steps of all tasks of the running trio loop reported; return what ends that."""
    import trio

    class Tracker(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            begin()

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            end()

    tracker = Tracker()

    def forget() -> None:
        # A loop that has ended has no instruments.
        with suppress(RuntimeError):
            trio.lowlevel.remove_instrument(tracker)

    trio.lowlevel.add_instrument(tracker)
    return forget


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is there now and was not before.

    Attributes:
        threads: Names of threads.
        descriptors: What open file descriptors refer to, as ``/proc/self/fd`` shows it.
        arenas: How many more arenas are leased, of the stagers that are looked at.
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
    """Counts threads, file descriptors, tasks and leased arenas, and tells what has been added.

    Make it on the running event loop when things are as they should be again later.

    Args:
        stagers: Those whose leases count.
        ignore_threads: Beginnings of the names of threads that may come and go.
    """

    def __init__(self, *stagers: AsyncStager, ignore_threads: tuple[str, ...] = ()) -> None:
        self._stagers = stagers
        # That of a LoopProbe ends by itself, a moment after it was stopped.
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
        """Wait until nothing is left of what has been added.

        Threads end a moment after their work, and what a coroutine that was cancelled refers to may be a circle: hence
        the waiting, with the collector at work.

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
