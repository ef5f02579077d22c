"""What the stagings of one stager share."""

from __future__ import annotations

import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch

from aiostage._capture.faithful import Inspection
from aiostage._capture.plan import PlanCache
from aiostage._device.streams import CopyStreams
from aiostage._loop.coroutines import Closing
from aiostage._loop.forks import register_after_fork
from aiostage._loop.workers import Job, Workers, start_thread
from aiostage._memory.pinned import Pinning
from aiostage._memory.pool import Pool
from aiostage.abc import Backend
from aiostage.options import StagingOptions

__all__ = ["Counts", "Resources"]

_COPY_THREADS = 2
"""Measured on two cores: a second thread overlaps faulting memory in with copying, a third adds nothing."""


@dataclass
class Counts:
    """What a stager has done so far."""

    stagings: int = 0
    leaves: int = 0
    nbytes: int = 0
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
        # Nothing here starts a thread or maps memory before it is used.
        self.options = options
        self.backend = backend
        self.workers = Workers(_COPY_THREADS, "aiostage-copy", prepare=torch.get_num_threads)
        self.launcher = Workers(1, "aiostage-launch")
        """One thread, so that a stream gets its copies in the order of the plan."""
        self.planner = Workers(1, "aiostage-copy-plan")
        """Not those of the copies: a plan would wait until all copies of other stagings are made."""
        self.streams = CopyStreams(backend, low_priority=options.low_priority_copies) if backend is not None else None
        self.pool = Pool(
            self.workers,
            max_bytes=options.max_host_bytes,
            shared=options.use_shared_memory,
            pinning=_pinning(options, backend),
        )
        self.inspection = Inspection(
            backend.device_of if backend is not None else None, needs_versions=options.detect_torn
        )
        self.plans = PlanCache()
        self.counts = Counts()
        self.running: set[Job] = set()
        """Of the stagings under way."""
        self.closing = Closing()
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

    def stop(self) -> None:
        """Let the threads end."""
        self.workers.stop()
        self.launcher.stop()
        self.planner.stop()


def _pinning(options: StagingOptions, backend: Backend | None) -> Pinning | None:
    if backend is None or options.use_pinned_memory is False or backend.pinned_memory_reason is not None:
        return None
    return Pinning(backend, required=options.use_pinned_memory is True)
