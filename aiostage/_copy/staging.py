"""One staging under way: from the walk to the captured copy."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import anyio
import numpy as np
import torch

from aiostage._capture.faithful import Refusal, Spec
from aiostage._capture.leaves import NotPlain
from aiostage._capture.plain import PlainWalk
from aiostage._capture.plan import Batch, MixedCast, Plan
from aiostage._capture.rebuild import Results, finish_leaves
from aiostage._capture.walk import Walk
from aiostage._copy.building import build_batch, build_destinations, build_empty, keep_freed_memory
from aiostage._copy.changes import Changes, within
from aiostage._copy.device import DeviceCopy
from aiostage._copy.flights import Flights
from aiostage._copy.host import HostCopy
from aiostage._copy.resources import Resources
from aiostage._copy.timings import Phase, Timings
from aiostage._copy.window import Chunk, Window
from aiostage._loop.cleanup import finish, without_locals
from aiostage._loop.collection import untrack_all
from aiostage._loop.slices import Slices, exhausted
from aiostage._loop.workers import Job
from aiostage._memory.pool import Lease
from aiostage.errors import StagingError, TornSnapshotError, UnsupportedLeafError
from aiostage.leaf import Path, StagedLeaf, format_path
from aiostage.observe import begin, inside

__all__ = ["Staging"]

_logger = logging.getLogger("aiostage")


class Staging:
    """Captures one state dict.

    Made at the call: from then on changes are noticed, as far as the first slice of the walk gets. :meth:`begin`
    returns once every copy is under way, :meth:`complete` once the source may change again. Memory safety rests on
    references alone: whatever a running copy touches is kept alive by that copy, so a staging that is cancelled, or
    whose event loop is gone, can simply be dropped.

    Args:
        resources: Of the stager.
        source: The state dict.
        streamed: Whether there will be a consumer, so that the copy may be larger than the memory for it.
    """

    def __init__(self, resources: Resources, source: Any, *, streamed: bool = False) -> None:
        self._resources = resources
        self._streamed = streamed
        self._options = resources.options
        self._slices = Slices(resources.options.max_loop_hold)
        self._walk: Walk | PlainWalk = PlainWalk()
        self._specs: list[Spec | None] = []
        # What holds memory is kept here and not in locals: there the traceback of an error, or of a cancellation,
        # would keep it for as long as somebody keeps the error.
        self._lease: Lease | None = None
        self.window: Window | None = None
        """What the copy passes through, if it is larger than the memory for it."""
        self._results: Results | None = None
        self.tree: Any = None
        self._changes = Changes(self._walk)
        self.plan: Plan | None = None
        self.staged: list[Any] = []
        self.job: Job = resources.workers.job()
        self.timings = Timings()
        self.timings.span = begin("stage")
        self.memory = range(0)
        """The addresses of the staged memory."""
        self._landed: set[int] = set()
        self._outlining: anyio.Event | None = None
        self._outlined = self._retired = False
        self._reason: Exception | None = None
        self._flights: Flights | None = None
        self._looking = self._look(source)
        self._refused: BaseException | None = None
        self._looked = False
        try:
            if resources.backend is not None and resources.streams is not None:
                self._flights = Flights(resources.backend, resources.streams, resources.traffic, resources.closing)
            self._looked = self._slices.take(self._looking)
        except BaseException as error:
            # To be raised where it is waited for, like any that comes later.
            self._refused = error

    # The public life of a staging

    async def begin(self) -> None:
        """Walk, plan, get memory, build the leaves and start the copies.

        With leaves on devices it returns once those copies are enqueued and everything in host memory is copied.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully.
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed.

        May be cancelled; whatever was begun is then dropped, and the copies that run have ended.
        """
        self._resources.check_open()
        self._resources.running.add(self)
        try:
            await self._begin()
        except BaseException as error:
            await self.abandon(error)
            raise

    async def complete(self) -> Any:
        """Wait for the copies, compare the source, and return the staged tree.

        Raises:
            TornSnapshotError: If the source changed meanwhile.
            StagerClosedError: If the stager was closed meanwhile.

        May be cancelled; whatever was begun is then dropped, and the copies that run have ended.
        """
        try:
            tree = await self._complete()
        except BaseException as error:
            await self.abandon(error)
            raise
        self._retire()
        self._end(None)
        return tree

    async def abandon(self, error: BaseException | None = None) -> None:
        """Drop the copies not yet begun, wait for those that run in threads, and give everything up.

        Copies that devices are making cannot be stopped; their memory is kept until they are done.
        """
        self.job.cancel()
        if self.window is not None:
            self.window.close()
        # A coroutine that is being closed may not wait; what runs keeps its memory.
        if not isinstance(error, GeneratorExit):
            await finish(self.job.settled)
        if self._flights is not None:
            self._flights.abandon()
        self._retire()
        self.staged = []
        self._end(error)

    async def land(self, number: int) -> bool:
        """Wait until a batch has been copied.

        Returns:
            False if it will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        batch = self._batches[number]
        if self.window is not None:
            await self.window.launched(number)
        if batch.device is not None and self._flights is not None:
            await self._flights.land(number)
            self._landed.add(number)
        while number not in self._landed and not self.job.finished():
            await self.job.progressed(self.job.done)
        return number in self._landed

    async def outline(self) -> bool:
        """Make the staged tree, :attr:`tree`, although its bytes may not have arrived.

        Returns:
            False if that is not possible, because making it looks at them, or because the staging has ended.

        May be cancelled, and called again then.
        """
        if not self._is_early:
            return False
        while not (self._outlined or self._retired):
            if self._outlining is not None:
                await self._outlining.wait()
                continue
            # Not a lock: it could not be let go of by a coroutine that is closed after its loop has gone.
            self._outlining = done = anyio.Event()
            try:
                await self._rebuild()
                self._outlined = True
            finally:
                self._outlining = None
                done.set()
        return not self._retired

    async def landed(self, address: int, nbytes: int) -> bool:
        """Wait until the copies into a range of staged memory have been made; elsewhere there is nothing to wait for.

        Returns:
            False if they will not be: the staging has failed, was abandoned or closed.

        Raises:
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        start = max(address - self.memory.start, 0)
        stop = min(address + nbytes, self.memory.stop) - self.memory.start
        for number in range(bisect_right(self._batches, start, key=_stop), len(self._batches)):
            if self._batches[number].start >= stop:
                break
            if not await self.land(number):
                return False
        return True

    def order_before(self, stream: Any | None, parts: Collection[Path] | None) -> None:
        """Make later work of a stream wait, on the device, for the copies, and look for changes up to now.

        Args:
            stream: Whose work; None for the current stream of each device that copies.
            parts: Where the leaves are that it waits for; None for everything.

        Raises:
            KeyError: If one of the parts has no tensor in it that is copied.
            StagingError: If copies from host memory are under way, for which no stream can wait.
        """
        leaves = numbers = None
        if parts is not None:
            leaves, numbers = exhausted(within(parts, self._walk, self._batches))
        if self.window is not None and not self.job.finished():
            raise StagingError(
                "the copy passes through memory smaller than itself, so some of its copies wait for room.",
                remedy="Await captured() before you change the source.",
            )
        for number, batch in enumerate(self._batches):
            if batch.device is None and number not in self._landed and (numbers is None or number in numbers):
                raise StagingError(
                    "tensors in host memory are being copied by threads, for which no stream of a device can wait.",
                    remedy="Await source_free() or captured() before you change them.",
                )
        if self._flights is not None:
            self._flights.order_before(stream, numbers)
        if self._options.detect_torn:
            exhausted(self._changes.compare(leaves))

    async def parts_free(self, parts: Collection[Path]) -> bool:
        """Wait until some parts of the tree have been copied.

        Returns:
            False if they will not be, as :meth:`land` says.

        Raises:
            KeyError: If one of the parts has no tensor in it that is copied.
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        _, numbers = await self._slices.run(within(parts, self._walk, self._batches))
        for number in numbers:
            if not await self.land(number):
                return False
        return True

    # Its parts

    def _look(self, source: Any) -> Generator[None, None, None]:
        """Find the leaves, and what each of them is; the short way if it leads to the end."""
        if self._options.passthrough is None:
            try:
                yield from self._look_along(self._walk, source)
                return
            except NotPlain:
                # Its nodes refer to each other in circles, and to the source.
                self._walk.release()
        self._walk = Walk(passthrough=self._options.passthrough)
        self._changes = Changes(self._walk)
        yield from self._look_along(self._walk, source)

    def _look_along(self, walk: Walk | PlainWalk, source: Any) -> Generator[None, None, None]:
        with Phase(self.timings, "walk"):
            yield from walk.run(source)
        with Phase(self.timings, "inspect"):
            try:
                yield from walk.leaves.inspect(self._resources.inspection)
            except Refusal as refusal:
                raise refusal.at(walk.path(len(walk.leaves.specs))) from None
            self._specs = walk.leaves.specs
            if self._options.dtype is not None:
                self._specs = yield from self._cast()

    async def _begin(self) -> None:
        if self._refused is not None:
            raise self._refused
        if not self._looked:
            await self._slices.run(self._looking)
            if self._flights is not None:
                # What was written meanwhile is in the versions that were read, so the copies have to have it too.
                self._flights.renew()
        walk, leaves = self._walk, self._walk.leaves
        with Phase(self.timings, "plan"):
            try:
                plan = self.plan = await self._slices.run(self._resources.plan(self._specs, leaves.addresses))
            except MixedCast as mixed:
                raise UnsupportedLeafError(
                    "it is to be cast, but shares memory with a leaf of another dtype.",
                    path=format_path(walk.path(mixed.index)),
                    remedy="Leave one of the two out, or return None for it from the dtype function.",
                ) from None
        device = next((batch.device for batch in plan.batches if batch.device is not None), None)
        if plan.nbytes and self._is_streamed(plan.nbytes):
            self.window = Window(plan, self._options.max_host_bytes or plan.nbytes)
            await self._slices.run(self._build(plan))
            return
        if plan.nbytes:
            with Phase(self.timings, "memory"):
                self._lease = await self._resources.pool.acquire(plan.nbytes, populate=False, device=device)
        self._resources.check_open()
        with Phase(self.timings, "build"):
            copies = await self._slices.run(self._build(plan), self.job)
        self.job.close()
        if self._flights is not None and copies:
            with Phase(self.timings, "launch"):
                await self._flights.launch(copies, self._resources.launcher, self._resources.max_bytes_in_flight)
                # The next step may change what is in host memory without asking any stream.
                await self.job.join()

    def _cast(self) -> Generator[None, None, list[Spec | None]]:
        """Return the specs with the dtypes that the options ask for."""
        rule, table = self._options.dtype, self._resources.inspection.table
        leaves = self._walk.leaves
        specs: list[Spec | None] = []
        for index, spec in enumerate(leaves.specs):
            if spec is not None and spec.dtype.is_floating_point:
                target = rule if isinstance(rule, torch.dtype) else None
                if target is None and callable(rule):
                    path = self._walk.path(index)
                    target = rule(path, leaves.tensors[index])
                    _check_target(target, path)
                if target is not None and target is not spec.dtype:
                    spec = table.cast(spec, target)
            specs.append(spec)
            if index % 64 == 0:
                yield
        return specs

    def _is_streamed(self, nbytes: int) -> bool:
        """Return whether the copy is to pass through memory smaller than itself."""
        limit = self._options.max_host_bytes
        if not self._streamed or limit is None or not self._is_early:
            return False
        # Where two fit, the next one need not wait for the last.
        return 2 * nbytes > limit

    @property
    def _is_early(self) -> bool:
        """Whether the tree can be made before its bytes have arrived."""
        # What is put into containers needs no bytes in it yet; whatever may look at values does.
        return not (self._walk.calls_out or self._walk.leaves.composites)

    def _build(self, plan: Plan) -> Generator[None, None, list[DeviceCopy]]:
        """Make the staged leaves, handing each batch over as soon as its leaves are there.

        Returns:
            The copies from devices, which are launched in order and not by several threads.
        """
        tensors, specs, addresses = self._walk.leaves.tensors, self._specs, self._walk.leaves.addresses
        staged = self.staged = [None] * len(tensors)
        untrack_all((staged,))
        keep_freed_memory()
        yield from build_empty(plan.empty, staged)
        from_devices: list[DeviceCopy] = []
        if self.window is not None:
            memory = self.window.addresses
        elif self._lease is not None:
            memory = self._lease.buffer
        else:
            return from_devices
        self.memory = range(memory.ctypes.data, memory.ctypes.data + memory.nbytes)
        waiting: dict[int, HostCopy] = {}
        # Threads copy what they can while the leaves are being built here.
        for number, batch in self.in_order() if self.window is None else ():
            if batch.device is None:
                copies = HostCopy(batch, tensors, staged, specs, addresses, memory)
                if copies.ready:
                    self._start(partial(self._copy, number, copies))
                else:
                    waiting[number] = copies
                yield
        for number, batch in self.in_order():
            yield from build_batch(batch, memory, staged, specs)
            if self.window is not None:
                continue
            if batch.device is not None:
                from_devices.append(DeviceCopy(number, batch, tensors, staged, specs, memory))
            elif number in waiting:
                self._start(partial(self._copy, number, waiting.pop(number)))
            yield
        return from_devices

    async def fill(self) -> None:
        """Copy, chunk after chunk, what does not fit the budget at once, as the consumer makes room for it.

        Raises:
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed.
            StagingError: If the device has failed.

        May be cancelled; whatever was begun is then dropped, as by :meth:`abandon`.
        """
        window = self.window
        if window is None:
            return
        try:
            for chunk in window.chunks:
                await self._fill_chunk(window, chunk)
            self.job.close()
        except BaseException as error:
            without_locals(error)
            if isinstance(error, Exception):
                # For whoever waits for the capture.
                self._reason = error
            await self.abandon(error)
            raise

    async def _fill_chunk(self, window: Window, chunk: Chunk) -> None:
        """Get memory for a chunk and start the copies into it. Here alone memory is in locals, which end with it."""
        with Phase(self.timings, "memory"):
            memory = await window.lease(chunk, self._resources.pool)
        self._resources.check_open()
        copies = await self._slices.run(self._build_chunk(chunk, memory))
        if self._flights is not None and copies:
            with Phase(self.timings, "launch"):
                await self._flights.launch(copies, self._resources.launcher, self._resources.max_bytes_in_flight)
        window.filled(chunk, memory)

    def _build_chunk(self, chunk: Chunk, memory: np.ndarray[Any, Any]) -> Generator[None, None, list[DeviceCopy]]:
        """Start the copies into a chunk, and return those from devices."""
        tensors, specs, addresses = self._walk.leaves.tensors, self._specs, self._walk.leaves.addresses
        from_devices: list[DeviceCopy] = []
        for number in chunk.batches:
            batch = self._batches[number].moved(-chunk.start)
            destinations = build_destinations(batch, memory)
            if batch.device is not None:
                from_devices.append(DeviceCopy(number, batch, tensors, destinations, specs, memory))
            else:
                copies = HostCopy(batch, tensors, destinations, specs, addresses, memory)
                self._start(partial(self._copy, number, copies))
            yield
        return from_devices

    def _start(self, step: Callable[[], None]) -> None:
        self.job.put(step)
        if not self._options.use_async_staging:
            self.job.run_next()

    def _copy(self, number: int, copies: HostCopy) -> None:
        """Copy one batch; runs in a worker thread."""
        # A cold arena is faulted in by the copy itself: measured as fast as populating it first at best, twice as fast
        # where huge pages are slow to come, and two threads do it at once.
        batch = self._batches[number]
        with inside(self.timings.span, "batch", number=number, nbytes=batch.stop - batch.start):
            if copies.run(self.job):
                self._landed.add(number)

    async def _complete(self) -> Any:
        resources = self._resources
        early = await self.outline()
        with Phase(self.timings, "copy"):
            await self.job.join()
            for number, batch in enumerate(self._batches):
                if batch.device is not None:
                    await self.land(number)
            resources.check_open()
            if self._reason is not None:
                raise self._reason
            if self.job.cancelled:
                raise StagingError("the staging was abandoned while somebody waited for it.")
        if self._options.detect_torn:
            with Phase(self.timings, "check"):
                await self._slices.run(self._changes.compare())
            if self._changes.paths:
                raise TornSnapshotError([format_path(path) for path in self._changes.paths])
        if not early:
            await self._rebuild()
        await self._slices.run(self._walk.releasing())
        counts = resources.counts
        counts.stagings += 1
        counts.leaves += len(self._specs)
        counts.nbytes += self.nbytes
        counts.copies += self.job.done
        for flight in self._flights or ():
            counts.copies += flight.copies
            counts.launches += flight.launches
        return self.tree

    async def _rebuild(self) -> None:
        """Make the staged tree."""
        walk = self._walk
        with Phase(self.timings, "rebuild"):
            finish_leaves(walk.leaves, self.staged)
            self._results = Results(self.staged, walk.late)
            self.tree = await self._slices.run(walk.rebuild(self._results), self.job)

    def _retire(self) -> None:
        """Let go of the source and of the lease; the staged tensors hold what they need."""
        self._resources.running.discard(self)
        counts = self._resources.counts
        counts.longest_loop_hold = max(counts.longest_loop_hold, self._slices.longest_hold)
        self.timings.yields = self._slices.yields
        self._retired = True
        self._lease = None
        self._results = self.tree = self._flights = self._refused = None
        self._looking.close()
        self._walk.release()

    def _end(self, error: BaseException | None) -> None:
        """Tell the log and observers that it is over, and what became of it."""
        if error is None:
            _logger.debug("staged %d bytes of %d leaves: %s", self.nbytes, self.leaves, self.timings)
        span = self.timings.span
        if span is not None:
            span.span.attributes |= {"nbytes": self.nbytes, "leaves": self.leaves, "batches": len(self._batches)}
            span.end(error)

    # What can be seen of it

    @property
    def _batches(self) -> Sequence[Batch]:
        return self.plan.batches if self.plan is not None else ()

    def in_order(self) -> Iterator[tuple[int, Batch]]:
        """Return the batches with their numbers, in the order in which they are copied."""
        if self._streamed:
            # That of the files, so that writing can begin with the first.
            return iter(enumerate(self._batches))
        order = self.plan.order if self.plan is not None else ()
        return ((number, self._batches[number]) for number in order)

    @property
    def leaves(self) -> int:
        """How many leaves the tree has, once planned; a tensor that is reached by several paths counts once."""
        if self.plan is None:
            return 0
        return len(self._walk.leaves) - len(self._walk.leaves.owners)

    def is_whole(self, index: int) -> bool:
        """Return whether a leaf is one of the tree's, and not only a part of one."""
        return index not in self._walk.leaves.owners

    def leaf(self, index: int) -> StagedLeaf:
        """Return a staged leaf."""
        return StagedLeaf(self._walk.path(index), self.staged[index])

    def not_copied(self) -> list[int]:
        """Return the leaves that no batch completes: those without memory of their own, or without elements."""
        return [index for index, spec in enumerate(self._specs) if spec is None or spec.extent == 0]

    @property
    def nbytes(self) -> int:
        """Size of the staged copy."""
        return self.plan.nbytes if self.plan is not None else 0


_stop = attrgetter("stop")


def _check_target(target: object, path: Path) -> None:
    if target is not None and not (isinstance(target, torch.dtype) and target.is_floating_point):
        raise TypeError(
            f"{format_path(path)}: the dtype function must return a floating-point torch.dtype or None, not {target!r}"
        )
