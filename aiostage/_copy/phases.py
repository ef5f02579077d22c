"""The phases of a staging: the inspection of its source, its copies, and how far these are. Each notes its time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np

from aiostage._capture.build import build_batch, build_destinations
from aiostage._capture.casting import cast_specs
from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Leaves
from aiostage._capture.plan import LOOKED_AT, Batch, MixedCast, Plan, compile_plan
from aiostage._capture.versions import Changes, Sources
from aiostage._capture.walk import Walk
from aiostage._copy.device import DeviceCopy
from aiostage._copy.host import HostCopy
from aiostage._copy.pending import StagingCopies
from aiostage._copy.resources import Resources
from aiostage._copy.window import Chunk, Window
from aiostage._device.streams import CallerStreams
from aiostage._loop.coroutines import Slices, collect_new_objects, exhausted
from aiostage._loop.workers import Job, release_gil
from aiostage._memory.arena import Arena
from aiostage.errors import StagingError, UnsupportedLeafError
from aiostage.leaf import Path, format_path
from aiostage.observe import OpenSpan

__all__ = ["Copies", "CopyProgress", "Phase", "SourceInspection", "Timings", "leaves_within"]


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


class Phase:
    """Adds the time that a section takes to a field of the timings, and tells observers of it.

    A section may be cut into slices and go on in another task, so its span is not the current one of any context.

    Args:
        timings: Of the staging.
        name: Of the field.
        within: The span of the staging; None without an observer.
    """

    __slots__ = ("_name", "_span", "_start", "_timings", "_within")

    def __init__(self, timings: Timings, name: str, within: OpenSpan | None) -> None:
        self._timings = timings
        self._name = name
        self._within = within

    def __enter__(self) -> None:
        self._span = self._within.child(self._name) if self._within is not None else None
        self._start = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Added and not set: a phase that is cut in two, or repeated for each chunk, is the sum.
        spent = getattr(self._timings, self._name) + perf_counter() - self._start
        setattr(self._timings, self._name, spent)
        if self._span is not None:
            self._span.end(error)


_PLANNED_ON_LOOP = 4 * LOOKED_AT
"""Up to so many leaves are laid out on the event loop, which takes less than a slice or two."""

_MOST_SPECS = 1 << 14
"""Kinds of leaves that are remembered, at about a kilobyte each. A tree of more is never recognized."""


def _planned(work: Generator[None, None, Plan]) -> Plan:
    """Lay out many leaves that are new; runs in a worker thread."""
    # Their storages are new objects of Python, and as many tensors will be.
    collect_new_objects()
    return exhausted(work, release_gil)


class SourceInspection:
    """Inspects one state dict: the walk over it, its leaves, and where they are to go.

    Args:
        resources: The resources of the stager.
        timings: Where to note what it takes.
        span: What it is part of, for observers.
        caller: Whose streams the code of objects follows; None without an accelerator.

    Attributes:
        walk: Over the containers.
        specs: What each leaf is to become; None for one that others are put together to.
        changes: What is noticed to have changed since.
    """

    def __init__(
        self, resources: Resources, timings: Timings, span: OpenSpan | None, caller: CallerStreams | None
    ) -> None:
        self._resources = resources
        self._timings = timings
        self._span = span
        before_code = caller.order_code if caller is not None else None
        self.walk = Walk(passthrough=resources.options.passthrough, before_code=before_code)
        self.specs: list[Spec | None] = []
        self.changes = Changes(self.walk.leaves, self.walk.changes, self.walk.path, resources.inspection)

    @property
    def leaves(self) -> Leaves:
        """What the walk has found."""
        return self.walk.leaves

    @property
    def whole_leaves(self) -> int:
        """How many leaves the tree has; a tensor that is reached by several paths counts once."""
        return len(self.leaves) - sum(map(len, self.leaves.owners.values()))

    def whole(self, indices: Iterable[int]) -> Iterator[int]:
        """Return those that are leaves of the tree, and not only parts of one."""
        return (index for index in indices if self.leaves.owners.find(index) is None)

    def without_bytes(self) -> list[int]:
        """Return the leaves that no batch completes: those without memory of their own, or without elements."""
        return [index for index, spec in enumerate(self.specs) if spec is None or spec.extent == 0]

    def torn(self, lost: Collection[int]) -> list[Path]:
        """Return where the source has changed.

        Args:
            lost: The leaves that could not be copied, because their memory had been replaced by then.
        """
        return list(dict.fromkeys((*self.changes.paths, *map(self.walk.path, sorted(lost)))))

    def run(self, source: Any) -> Generator[None, None, None]:
        """Find the leaves, and what each of them is.

        Args:
            source: The state dict.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully.
        """
        walk, inspection = self.walk, self._resources.inspection
        if len(inspection.table.known) > _MOST_SPECS:
            inspection.forget()
        with Phase(self._timings, "walk", self._span):
            yield from walk.run(source, inspection)
        with Phase(self._timings, "inspect", self._span):
            yield from walk.inspect(inspection)
            # Everything else has been noted: now comes the moment of the copy.
            yield from walk.settle(inspection)
            self.specs = walk.leaves.specs
            rule = self._resources.options.dtype
            if rule is not None:
                self.specs = yield from cast_specs(walk.leaves, inspection.table, rule, walk.path)

    async def plan(self, slices: Slices) -> Plan:
        """Return where the leaves are to go.

        Args:
            slices: Of the staging.

        Raises:
            UnsupportedLeafError: If a leaf cannot be cast apart from what it shares memory with.

        May be cancelled.
        """
        specs, addresses, plans = self.specs, self.leaves.addresses, self._resources.plans
        with Phase(self._timings, "plan", self._span):
            try:
                known = await slices.run(plans.replay(specs, addresses))
                if known is not None:
                    return known
                work = compile_plan(specs, addresses)
                if len(specs) > _PLANNED_ON_LOOP and self._resources.options.use_async_staging:
                    # To sort 50,000 addresses takes a millisecond or two, which nothing divides.
                    plan = await self._resources.planner.run(partial(_planned, work))
                else:
                    plan = await slices.run(work)
                plans.keep(specs, addresses, plan)
                return plan
            except MixedCast as mixed:
                raise UnsupportedLeafError(
                    "it is to be cast, but shares memory with a leaf of another dtype.",
                    path=format_path(self.walk.path(mixed.index)),
                    remedy="Leave one of the two out, or return None for it from the dtype function.",
                ) from None


class Copies:
    """Makes the staged leaves and starts the copies into them.

    Those from host memory become steps of a job; those from devices are returned, for they are launched in order and
    not by several threads.

    Args:
        inspection: The inspection of the source.
        job: For the threads.
        batches: The batches of the plan, with their numbers, in the order in which they are copied.
        copied: Where the threads note the numbers of the batches that they have copied.
        span: What the copies are part of, for observers.
        inline: Whether to copy in the calling thread, and at once.

    Attributes:
        arena: Where the copies go, if all of them go to one.
    """

    def __init__(
        self,
        inspection: SourceInspection,
        job: Job,
        batches: Iterable[tuple[int, Batch]],
        *,
        copied: set[int],
        span: OpenSpan | None,
        inline: bool,
    ) -> None:
        self._inspection = inspection
        self.sources = Sources(inspection.leaves, inspection.specs)
        self._job = job
        self._batches = list(batches)
        self._span = span
        self._copied = copied
        self._inline = inline
        self.arena: Arena | None = None

    def build(self, memory: np.ndarray[Any, Any], staged: list[Any]) -> Generator[None, None, list[DeviceCopy]]:
        """Make the staged leaves; threads copy what they can meanwhile.

        Args:
            memory: One-dimensional uint8, the arena.
            staged: Where to put the leaves, by their indices.

        Returns:
            The copies from devices.
        """
        # Two passes. The first starts every copy that needs the arena alone, so that threads are busy while the second
        # makes the leaves.
        waiting: dict[int, HostCopy] = {}
        for number, batch in self._batches:
            if batch.device is None:
                copies = HostCopy(self.sources, staged, memory)
                yield from copies.fill(batch)
                if copies.ready:
                    self._start(number, batch, copies)
                else:
                    waiting[number] = copies
                yield
        from_devices: list[DeviceCopy] = []
        for number, batch in self._batches:
            yield from build_batch(batch, memory, staged, self._inspection.specs)
            if batch.device is not None:
                # After their leaves, because copies of whole leaves go into these and not to addresses.
                from_devices.append((yield from DeviceCopy.of(number, batch, self.sources, staged, memory)))
            elif number in waiting:
                self._start(number, batch, waiting.pop(number))
            yield
        return from_devices

    def outline(self, addresses: np.ndarray[Any, Any], staged: list[Any]) -> Generator[None, None, None]:
        """Make the staged leaves over addresses that have no memory behind them, and copy nothing."""
        for _, batch in self._batches:
            yield from build_batch(batch, addresses, staged, self._inspection.specs)

    def fill(self, chunk: Chunk, memory: np.ndarray[Any, Any]) -> Generator[None, None, list[DeviceCopy]]:
        """Start the copies into a part of what passes through memory.

        Args:
            chunk: The part.
            memory: One-dimensional uint8, of the chunk's size.

        Returns:
            The copies from devices.
        """
        from_devices: list[DeviceCopy] = []
        for number, placed in self._batches[chunk.batches.start : chunk.batches.stop]:
            # The plan counts from the beginning of the arena, this memory from that of the chunk.
            batch = placed.moved(-chunk.start)
            destinations = build_destinations(batch, memory)
            if batch.device is not None:
                from_devices.append((yield from DeviceCopy.of(number, batch, self.sources, destinations, memory)))
            else:
                copies = HostCopy(self.sources, destinations, memory)
                yield from copies.fill(batch)
                self._start(number, batch, copies)
            yield
        return from_devices

    def _start(self, number: int, batch: Batch, copies: HostCopy) -> None:
        step: Callable[[], None] = partial(self._copy, number, batch, copies)
        self._job.put(step)
        # The job has no threads then.
        if self._inline:
            self._job.run_next()

    def _copy(self, number: int, batch: Batch, copies: HostCopy) -> None:
        """Copy one batch; runs in a worker thread."""
        # A cold arena is faulted in by the copy itself: measured as fast as populating it first at best, twice as fast
        # where huge pages are slow to come, and two threads do it at once.
        arena = self.arena
        cold = arena.cold(batch.start, batch.stop) if arena is not None else None
        span = self._span
        with span.child("batch", number=number, nbytes=batch.stop - batch.start) if span else nullcontext():
            # Not if it was cancelled half-way: then neither the pages are all there nor the bytes.
            if copies.run(self._job, cold):
                if arena is not None:
                    arena.written(batch.start, batch.stop)
                # One operation of a set, which needs no lock. It comes before the end of the step: those who wait for
                # the batch look at the set when a step has ended.
                self._copied.add(number)


class CopyProgress:
    """How far the copies of one staging are, for those who wait for some of them.

    Args:
        job: The job of the threads that copy from host memory.

    Attributes:
        pending: The copies from devices; None without an accelerator, and once the staging is over.
        batches: The batches of the plan.
        window: What the copy passes through, if it is larger than the memory for it.
        memory: The addresses of the staged memory.
        copied: The numbers of the batches that were seen to have been copied.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.pending: StagingCopies | None = None
        self.batches: Sequence[Batch] = ()
        self.window: Window | None = None
        self.memory = range(0)
        self.copied: set[int] = set()

    async def batch(self, number: int) -> bool:
        """Wait until a batch has been copied.

        Returns:
            False if it will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        if self.window is not None:
            # Before that the batch has no memory, and no copy that could be waited for.
            await self.window.launched(number)
        if self.batches[number].device is not None and self.pending is not None:
            await self.pending.wait_for_batch(number)
            self.copied.add(number)
        await self._job.until(lambda: number in self.copied)
        return number in self.copied

    async def bytes(self, address: int, nbytes: int) -> bool:
        """Wait until the copies into a range of staged memory have been made; elsewhere there is nothing to wait for.

        Returns:
            False if they will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        start = max(address - self.memory.start, 0)
        stop = min(address + nbytes, self.memory.stop) - self.memory.start
        # Batches lie in the arena in the order of their numbers, without overlap: the first one that ends behind the
        # start, and those after it until one begins behind the stop.
        for number in range(bisect_right(self.batches, start, key=_stop), len(self.batches)):
            if self.batches[number].start >= stop:
                break
            if not await self.batch(number):
                return False
        return True

    def order_before(self, stream: Any | None, numbers: Collection[int] | None) -> None:
        """Make later work of a stream wait, on the device, for the copies.

        Args:
            stream: Whose work; None for the current stream of each device that copies.
            numbers: The batches to wait for; None for all.

        Raises:
            StagingError: If copies from host memory are under way, for which no stream can wait.
        """
        # Its later copies do not exist yet, so there is no event that a stream could wait for.
        if self.window is not None and not self._job.finished():
            raise StagingError(
                "the copy passes through memory smaller than itself, so some of its copies wait for memory.",
                remedy="Await captured() before you change the source.",
            )
        in_host_memory = {number for number, batch in enumerate(self.batches) if batch.device is None} - self.copied
        if in_host_memory if numbers is None else not in_host_memory.isdisjoint(numbers):
            raise StagingError(
                "tensors in host memory are being copied by threads, for which no stream of a device can wait.",
                remedy="Await source_free() or captured() before you change them.",
            )
        if self.pending is not None:
            self.pending.order_before(stream, numbers)


_stop = attrgetter("stop")


def leaves_within(
    parts: Collection[Path], walk: Walk, batches: Sequence[Batch]
) -> Generator[None, None, tuple[set[int], set[int]]]:
    """Find what lies in some parts of a tree, yielding between small steps.

    Args:
        parts: Paths that lead to the parts; the empty one is everything.
        walk: Which met the leaves.
        batches: Which copy them.

    Returns:
        The numbers of the leaves, and of the batches that copy them.

    Raises:
        KeyError: If one of the parts has no tensor in it that is copied.
    """
    lengths = sorted(set(map(len, parts)))
    missing = set(parts) - {()}
    leaves: set[int] = set()
    numbers: set[int] = set()
    for number, batch in enumerate(batches):
        for index in batch.completes:
            path = walk.path(index)
            heads = {path[:length] for length in lengths if length <= len(path)}
            if not heads.isdisjoint(parts):
                missing -= heads
                leaves.add(index)
                numbers.add(number)
            yield
    for number in tuple(numbers):
        # A large leaf is cut into several batches, and only the last of them completes it. The part is free once the
        # earlier ones are copied too.
        while batches[number].continues:
            number -= 1
            numbers.add(number)
    if missing:
        raise KeyError(f"{format_path(min(missing, key=str))} does not lead to a tensor that is copied")
    return leaves, numbers
