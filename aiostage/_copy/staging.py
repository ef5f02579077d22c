"""One staging under way: from the walk to the captured copy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, TypeVar

import anyio
import numpy as np

from aiostage._capture.plan import Batch, Plan
from aiostage._capture.rebuild import finish_leaves
from aiostage._copy.building import build_empty, keep_freed_memory
from aiostage._copy.changes import within
from aiostage._copy.copies import Copies
from aiostage._copy.device import DeviceCopy
from aiostage._copy.flights import Flights
from aiostage._copy.landing import Landing
from aiostage._copy.looking import Look
from aiostage._copy.resources import Resources
from aiostage._copy.timings import Phase, Timings
from aiostage._copy.window import Chunk, Window
from aiostage._device.streams import CallerStreams
from aiostage._loop.cleanup import finish, without_locals
from aiostage._loop.collection import untrack_all
from aiostage._loop.slices import Slices, exhausted
from aiostage._loop.workers import Job
from aiostage._memory.pool import Lease
from aiostage.errors import StagingError, TornSnapshotError
from aiostage.leaf import Path, StagedLeaf, format_path
from aiostage.observe import begin

__all__ = ["Staging"]

T = TypeVar("T")

_logger = logging.getLogger("aiostage")

_DROPPED_AT_ONCE = 256
"""Leaves whose destructors run between two yields, a tenth of a millisecond."""

_NO_MEMORY = np.empty(0, dtype=np.uint8)


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
        # What holds memory is kept here and not in locals: there the traceback of an error, or of a cancellation,
        # would keep it for as long as somebody keeps the error.
        self._lease: Lease | None = None
        self.tree: Any = None
        self.plan: Plan | None = None
        self.staged: list[Any] = []
        self.job: Job = resources.workers.job()
        self.landing = Landing(self.job)
        self.timings = Timings()
        self.timings.span = begin("stage")
        self._copies: Copies | None = None
        self._outlining: anyio.Event | None = None
        self._outlined = self._retired = False
        self._reason: Exception | None = None
        self._finishing: Generator[None, None, None] | None = None
        self._look = Look(resources, self.timings)
        self._looking = self._look.run(source)
        self._refused: BaseException | None = None
        self._looked = False
        self._caller = caller = CallerStreams.record(resources.backend, source)
        if resources.backend is not None and resources.streams is not None:
            self.landing.flights = Flights(
                resources.backend, resources.streams, caller, resources.traffic, resources.closing
            )
        try:
            self._looked = self._slices.take(self._looking)
            caller.include()
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
            from_devices = await self._begin()
            if from_devices:
                await self._launch(from_devices)
                # The next step may change what is in host memory without asking any stream.
                await self.job.join()
        except BaseException as error:
            await self.abandon(error)
            raise

    async def complete(self, *, resumable: bool = False) -> Any:
        """Wait for the copies, compare the source, and return the staged tree.

        Args:
            resumable: Leave the staging as it is when cancelled. Another call may then complete it; otherwise it has to
                be abandoned.

        Raises:
            TornSnapshotError: If the source changed meanwhile.
            StagerClosedError: If the stager was closed meanwhile.

        May be cancelled; whatever was begun is then dropped, and the copies that run have ended.
        """
        try:
            tree = await self._complete()
        except BaseException as error:
            if not resumable or isinstance(error, Exception):
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
        if self.landing.window is not None:
            self.landing.window.close()
        try:
            # A coroutine that is being closed may not wait; what runs keeps its memory.
            if not isinstance(error, GeneratorExit):
                await finish(self.job.settled)
        finally:
            # A second cancellation is raised from that wait, once it is over.
            if self.landing.flights is not None:
                self.landing.flights.abandon()
            self._retire()
            self.staged = []
            self._end(error)

    async def drop(self) -> None:
        """Let go of the staged leaves, in steps: destructors of 50,000 take 20 ms. When cancelled, all at once."""
        try:
            await self._slices.run(self._dropping())
        finally:
            self.staged = []

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
                await self._slices.run(self._rebuilding(), self.job)
                self._outlined = True
            finally:
                self._outlining = None
                done.set()
        return not self._retired

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
            leaves, numbers = exhausted(within(parts, self._look.walk, self._batches))
        if self.landing.window is not None and not self.job.finished():
            raise StagingError(
                "the copy passes through memory smaller than itself, so some of its copies wait for room.",
                remedy="Await captured() before you change the source.",
            )
        left = self.landing.left_in_host_memory()
        if left if numbers is None else not left.isdisjoint(numbers):
            raise StagingError(
                "tensors in host memory are being copied by threads, for which no stream of a device can wait.",
                remedy="Await source_free() or captured() before you change them.",
            )
        if self.landing.flights is not None:
            self.landing.flights.order_before(stream, numbers)
        if self._options.detect_torn:
            exhausted(self._look.changes.compare(leaves))

    async def parts_free(self, parts: Collection[Path]) -> bool:
        """Wait until some parts of the tree have been copied.

        Returns:
            False if they will not be, as :meth:`land` says.

        Raises:
            KeyError: If one of the parts has no tensor in it that is copied.
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        _, numbers = await self._slices.run(within(parts, self._look.walk, self._batches))
        for number in numbers:
            if not await self.landing.batch(number):
                return False
        return True

    # Its parts

    async def _begin(self) -> list[DeviceCopy]:
        """Start the copies from host memory, and return those from devices."""
        if self._refused is not None:
            raise self._refused
        if not self._looked:
            await self._slices.run(self._looking)
            # What was written meanwhile is in the versions that were read, so the copies have to have it too.
            self._caller.renew()
        plan = self.plan = await self._slices.run(self._look.plan())
        self.landing.batches = plan.batches
        copies = self._copies = Copies(
            self._look,
            self.job,
            self.in_order(),
            landed=self.landing.landed,
            span=self.timings.span,
            inline=not self._options.use_async_staging,
        )
        if plan.nbytes and self._is_streamed(plan.nbytes):
            self.landing.window = Window(plan, self._options.max_host_bytes or plan.nbytes)
            await self._slices.run(self._make(plan, copies.outline))
            return []
        device = next((batch.device for batch in plan.batches if batch.device is not None), None)
        if device is not None:
            self._caller.check()
        if plan.nbytes:
            with Phase(self.timings, "memory"):
                self._lease = await self._resources.pool.acquire(plan.nbytes, populate=False, device=device)
        self._resources.check_open()
        with Phase(self.timings, "build"):
            from_devices = await self._slices.run(self._make(plan, copies.build), self.job)
        self.job.close()
        return from_devices

    async def _launch(self, copies: list[DeviceCopy]) -> None:
        if self.landing.flights is not None and copies:
            with Phase(self.timings, "launch"):
                await self.landing.flights.launch(copies, self._resources.launcher, self._resources.max_bytes_in_flight)

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
        return not (self._look.walk.calls_out or self._look.leaves.composites)

    def _make(
        self, plan: Plan, build: Callable[[np.ndarray[Any, Any], list[Any]], Generator[None, None, T]]
    ) -> Generator[None, None, T]:
        """Make the staged leaves, those that have memory in one way or another."""
        staged = self.staged = [None] * len(self._look.leaves.tensors)
        untrack_all((staged,))
        keep_freed_memory()
        yield from build_empty(plan.empty, staged)
        if self.landing.window is not None:
            memory = self.landing.window.addresses
        else:
            memory = self._lease.buffer if self._lease is not None else _NO_MEMORY
        self.landing.memory = range(memory.ctypes.data, memory.ctypes.data + memory.nbytes)
        return (yield from build(memory, staged))

    async def fill(self) -> None:
        """Copy, chunk after chunk, what does not fit the budget at once, as the consumer makes room for it.

        Raises:
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed.
            StagingError: If the device has failed.

        May be cancelled; whatever was begun is then dropped, as by :meth:`abandon`.
        """
        copies, window = self._copies, self.landing.window
        if copies is None or window is None:
            return
        try:
            for chunk in window.chunks:
                await self._fill_chunk(copies, window, chunk)
            self.job.close()
        except BaseException as error:
            without_locals(error)
            if isinstance(error, Exception):
                # For whoever waits for the capture.
                self._reason = error
            await self.abandon(error)
            raise

    async def _fill_chunk(self, copies: Copies, window: Window, chunk: Chunk) -> None:
        """Get memory for a chunk and start the copies into it. Here alone memory is in locals, which end with it."""
        with Phase(self.timings, "memory"):
            memory = await window.lease(chunk, self._resources.pool)
        self._resources.check_open()
        from_devices = await self._slices.run(copies.fill(chunk, memory))
        await self._launch(from_devices)
        window.filled(chunk, memory)

    async def _complete(self) -> Any:
        resources = self._resources
        early = await self.outline()
        with Phase(self.timings, "copy"):
            # Joining would end the job when this is cancelled, and another may go on here.
            await self.job.settled()
            if self.job.error is not None:
                await self.job.join()
            for number, batch in enumerate(self._batches):
                if batch.device is not None:
                    await self.landing.batch(number)
            resources.check_open()
            if self._reason is not None:
                raise self._reason
            if self.job.cancelled:
                raise StagingError("the staging was abandoned while somebody waited for it.")
        if self._finishing is None:
            self._finishing = self._finish(rebuild=not early)
        await self._slices.run(self._finishing, self.job, resumable=True)
        if self._retired:
            raise StagingError("the staging was abandoned while somebody waited for it.")
        counts = resources.counts
        counts.stagings += 1
        counts.leaves += len(self._look.specs)
        counts.nbytes += self.nbytes
        counts.copies += self.job.done
        for flight in self.landing.flights or ():
            counts.copies += flight.copies
            counts.launches += flight.launches
        return self.tree

    def _finish(self, *, rebuild: bool) -> Generator[None, None, None]:
        """Compare the source with what was noted, and make the staged tree, in small steps."""
        if self._options.detect_torn:
            with Phase(self.timings, "check"):
                yield from self._look.changes.compare()
        torn = dict.fromkeys(self._look.changes.paths) | dict.fromkeys(self._lost_paths())
        if torn:
            raise TornSnapshotError([format_path(path) for path in torn])
        if rebuild:
            yield from self._rebuilding()
        yield from self._look.walk.releasing()

    def _lost_paths(self) -> list[Path]:
        """Return where leaves are that could not be copied, because their memory had been replaced by then."""
        lost = self._copies.sources.lost if self._copies is not None else ()
        return [self._look.walk.path(index) for index in sorted(lost)]

    def _dropping(self) -> Generator[None, None, None]:
        while self.staged:
            del self.staged[-_DROPPED_AT_ONCE:]
            yield

    def _rebuilding(self) -> Generator[None, None, None]:
        """Make the staged tree."""
        walk = self._look.walk
        with Phase(self.timings, "rebuild"):
            finish_leaves(walk.leaves, self.staged)
            self.tree = yield from walk.rebuild(self.staged)

    def _retire(self) -> None:
        """Let go of the source and of the lease; the staged tensors hold what they need."""
        self._resources.running.discard(self)
        counts = self._resources.counts
        counts.longest_loop_hold = max(counts.longest_loop_hold, self._slices.longest_hold)
        self.timings.yields = self._slices.yields
        self._retired = True
        self._lease = None
        self.tree = self.landing.flights = self._copies = self._refused = None
        if self._finishing is not None:
            self._finishing.close()
            self._finishing = None
        self._looking.close()
        self._look.walk.release()

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
        return len(self._look.leaves) - len(self._look.leaves.owners)

    def is_whole(self, index: int) -> bool:
        """Return whether a leaf is one of the tree's, and not only a part of one."""
        return index not in self._look.leaves.owners

    def leaf(self, index: int) -> StagedLeaf:
        """Return a staged leaf."""
        return StagedLeaf(self._look.walk.path(index), self.staged[index])

    def not_copied(self) -> list[int]:
        """Return the leaves that no batch completes: those without memory of their own, or without elements."""
        return [index for index, spec in enumerate(self._look.specs) if spec is None or spec.extent == 0]

    @property
    def nbytes(self) -> int:
        """Size of the staged copy."""
        return self.plan.nbytes if self.plan is not None else 0
