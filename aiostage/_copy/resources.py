"""What the stagings of one stager share, and where the time of each goes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Inspection
from aiostage._capture.plan import Plan, compile_plan
from aiostage._device.streams import CopyStreams
from aiostage._loop.coroutines import Closing
from aiostage._loop.workers import Job, Workers, start_thread
from aiostage._memory.pinned import Pinning
from aiostage._memory.pool import Pool
from aiostage._platform import register_after_fork
from aiostage.abc import Backend
from aiostage.observe import OpenSpan
from aiostage.options import StagingOptions

__all__ = ["Counts", "Phase", "Resources", "Timings"]

_COPY_THREADS = 2
"""Measured on two cores: a second thread overlaps faulting memory in with copying, a third adds nothing."""

_COMPARED_AT_ONCE = 8192
"""Entries of two lists, at some 10 nanoseconds each."""


@dataclass
class Counts:
    """What a stager has done so far."""

    stagings: int = 0
    leaves: int = 0
    nbytes: int = 0
    plans_compiled: int = 0
    plans_replayed: int = 0
    copies: int = 0
    launches: int = 0
    longest_loop_hold: float = 0.0
    longest_loop_hold_elapsed: float = 0.0


class Resources:
    """Threads, memory, streams and what was learnt of the last state dict.

    A forked child begins with none but the last. The stager and its snapshots refer to it; when the last of them is
    dropped without a call of ``aclose()``, it warns of that.

    Args:
        options: The options of the stager.
        backend: How to reach accelerators; None when there is none to reach.
    """

    def __init__(self, options: StagingOptions, backend: Backend | None) -> None:
        self.options = options
        self.backend = backend
        self.workers = Workers(_COPY_THREADS, "aiostage-copy", prepare=torch.get_num_threads)
        self.launcher = Workers(1, "aiostage-launch")
        """One thread, so that a stream gets its copies in the order of the plan."""
        self.streams = CopyStreams(backend, low_priority=options.low_priority_copies) if backend is not None else None
        self.pool = Pool(
            self.workers,
            max_bytes=options.max_host_bytes,
            shared=options.use_shared_memory,
            pinning=_pinning(options, backend),
        )
        self.inspection = Inspection(backend.device_of if backend is not None else None)
        self.counts = Counts()
        self.running: set[Job] = set()
        """Of the stagings under way."""
        self.closing = Closing()
        self._known: tuple[list[Spec | None], list[int], Plan] | None = None
        register_after_fork(self)

    def after_fork_in_child(self) -> object:
        """Begin anew in a child, where the stagings under way never end."""
        left_behind, self.running = self.running, set()
        return left_behind

    def __del__(self) -> None:
        """Warn of memory that was not given back, and have a thread do it.

        Unmapping and unregistering take a tenth of a second a GiB, and this may be the thread of an event loop. It
        may also be a thread that holds a lock of the pool, which collects garbage just now: so no lock is taken here.
        """
        if self.closing.closed or not self.pool.used:
            return
        # Without a thread, at the end of the interpreter, memory goes with the last that refers to it.
        with suppress(RuntimeError):
            start_thread(threading.Thread(target=self.pool.close, name="aiostage-dropped", daemon=True))
        warnings.warn(
            "an AsyncStager that has staged was dropped and never closed; use `async with`, or await its aclose()",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )

    @property
    def max_bytes_in_flight(self) -> int | None:
        """How many bytes devices may be copying at once; None for any number."""
        return 0 if self.options.use_non_blocking_copy is False else self.options.max_bytes_in_flight

    def plan(self, specs: list[Spec | None], addresses: list[int]) -> Generator[None, None, Plan]:
        """Return the layout for specs and addresses, the last one if they are the same again."""
        known = self._known
        if known is not None and (yield from _same(known[0], specs)) and (yield from _same(known[1], addresses)):
            self.counts.plans_replayed += 1
            return known[2]
        plan = yield from compile_plan(specs, addresses)
        self.counts.plans_compiled += 1
        # Replaced as a whole, because stagings in other event loops may be comparing with the last one.
        self._known = (specs, addresses, plan)
        return plan

    def check_open(self) -> None:
        """Raise StagerClosedError if the stager is closed."""
        self.closing.check()

    def stop(self) -> None:
        """Let the threads end."""
        self.workers.stop()
        self.launcher.stop()


def _same(before: list[Any], now: list[Any]) -> Generator[None, None, bool]:
    """Compare two lists, yielding between parts."""
    if len(before) != len(now):
        return False
    for start in range(0, len(now), _COMPARED_AT_ONCE):
        part = slice(start, start + _COMPARED_AT_ONCE)
        if before[part] != now[part]:
            return False
        yield
    return True


def _pinning(options: StagingOptions, backend: Backend | None) -> Pinning | None:
    if backend is None or options.use_pinned_memory is False or backend.pinned_memory_reason is not None:
        return None
    return Pinning(backend, required=options.use_pinned_memory is True)


@dataclass(kw_only=True)
class Timings:
    """Where the time of one staging went, in seconds. Phases that overlap count for themselves.

    Attributes:
        walk: Copying containers and finding the leaves.
        inspect: Looking at the leaves.
        plan: Laying out the arena, or recognizing the layout.
        memory: Waiting for an arena.
        build: Making the staged leaves, while the copies already run.
        launch: Telling devices what to copy.
        copy: Waiting for the copies after everything was built.
        check: Looking for changes of the source.
        rebuild: Making the staged tree.
        yields: How often the event loop got its turn.
    """

    walk: float = 0.0
    inspect: float = 0.0
    plan: float = 0.0
    memory: float = 0.0
    build: float = 0.0
    launch: float = 0.0
    copy: float = 0.0
    check: float = 0.0
    rebuild: float = 0.0
    yields: int = 0

    def __post_init__(self) -> None:
        """Start without a span; the caller sets one. It is not a field, because it is not a figure."""
        self.span: OpenSpan | None = None


class Phase:
    """Adds the time that a section takes to a field of the timings, and tells observers of it.

    A section may be cut into slices and go on in another task, so its span is not the current one of any context.
    """

    __slots__ = ("_name", "_span", "_start", "_timings")

    def __init__(self, timings: Timings, name: str) -> None:
        self._timings = timings
        self._name = name

    def __enter__(self) -> None:
        within = self._timings.span
        self._span = within.child(self._name) if within is not None else None
        self._start = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        spent = getattr(self._timings, self._name) + perf_counter() - self._start
        setattr(self._timings, self._name, spent)
        if self._span is not None:
            self._span.end(error)
