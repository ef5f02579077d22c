"""One staging under way: from the walk to the captured copy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar

import anyio
import numpy as np

from aiostage import _private
from aiostage._capture.build import build_empty, finish_leaves, keep_freed_memory
from aiostage._capture.plan import Batch, Plan
from aiostage._copy.device import DeviceCopy
from aiostage._copy.pending import StagingCopies
from aiostage._copy.phases import Copies, CopyProgress, Phase, SourceInspection, Timings, leaves_within
from aiostage._copy.resources import Resources
from aiostage._copy.window import Chunk, Window
from aiostage._device.streams import CallerStreams
from aiostage._loop.coroutines import Slices, exhausted, finish, without_locals
from aiostage._loop.workers import Job
from aiostage._memory.pool import Lease
from aiostage.errors import StagingError, TornSnapshotError
from aiostage.leaf import Path, StagedLeaf, format_path
from aiostage.observe import everywhere, here, start_span

__all__ = ["Staging", "State"]

T = TypeVar("T")

_logger = logging.getLogger("aiostage")

_DROPPED_AT_ONCE = 256
"""Leaves whose destructors run between two yields, a tenth of a millisecond."""

_NO_MEMORY = np.empty(0, dtype=np.uint8)


_NOT_BUILT = object()
_ABANDONED = "the staging was abandoned while a task waited for it."


class State(Enum):
    """Where a staging is in its life. Only :meth:`Staging.move` changes it."""

    NEW = "new"
    """Called; what its first slice has met is noted."""
    NOTING = "noting"
    """Begun: the source is walked, memory is leased, copies are started."""
    COPYING = "copying"
    """All copies are under way, or will be as their consumer makes room."""
    CAPTURED = "captured"
    """The source may change; the staged tree is whole."""
    FAILED = "failed"
    """Ended by an error."""
    DROPPED = "dropped"
    """Ended because the copy is not wanted: cancelled, or its context was exited."""


_TRANSITIONS = {
    State.NEW: {State.NOTING, State.DROPPED},
    State.NOTING: {State.COPYING, State.FAILED, State.DROPPED},
    State.COPYING: {State.CAPTURED, State.FAILED, State.DROPPED},
    State.CAPTURED: {State.DROPPED},
    State.FAILED: {State.DROPPED},
    State.DROPPED: set[State](),
}


class _Turns:
    """Lets one task in at a time.

    Unlike a lock it can be left by a coroutine that is closed after its loop has gone.
    """

    def __init__(self) -> None:
        self._taken: anyio.Event | None = None

    async def __aenter__(self) -> None:
        # A loop: all who wait are woken at once, and the first to run takes the turn. A waiter that is cancelled has
        # taken nothing, so there is no turn to hand on.
        while self._taken is not None:
            await self._taken.wait()
        self._taken = anyio.Event()

    async def __aexit__(self, *_: object) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.set()


class Staging:
    """Captures one state dict.

    Made at the call: from then on changes are noticed, as far as the first slice of the walk gets. :meth:`start`
    returns once every copy is under way, :meth:`complete` once the source may change again. Memory safety rests on
    references alone: whatever a running copy touches is kept alive by that copy, so a staging that is cancelled, or
    whose event loop is gone, can simply be dropped.

    Args:
        resources: The resources of the stager.
        source: The state dict.
        streamed: Whether there will be a consumer, so that the copy may be larger than the memory for it.

    Attributes:
        state: What it is at. Whatever else can be asked of a staging follows from this.
        failure: What is raised for those who wait for it.
        tree: The staged tree, once it is built and until it is dropped.
        staged: The staged leaves, by their indices.
    """

    def __init__(self, resources: Resources, source: Any, *, streamed: bool = False) -> None:
        self._resources = resources
        self._streamed = streamed
        self._options = resources.options
        # One for the whole staging: what the first slice has used of the caller's turn counts for the slices after it.
        self._slices = Slices(resources.options.max_loop_hold)
        self.state = State.NEW
        self.failure: BaseException | None = None
        # What holds memory is kept here and not in locals: there the traceback of an error, or of a cancellation,
        # would keep it for as long as somebody keeps the error.
        self._lease: Lease | None = None
        self.tree: Any = _NOT_BUILT
        self.plan: Plan | None = None
        self.staged: list[Any] = []
        self.job: Job = resources.workers.job(inline=not resources.options.use_async_staging)
        self.progress = CopyProgress(self.job)
        self.timings = Timings()
        self._span = start_span("stage") if everywhere or here.get() else None
        self._copies: Copies | None = None
        self._waiters = 0
        self._building = _Turns()
        self._completing = _Turns()
        self._finishing: Generator[None, None, None] | None = None
        backend = resources.backend
        # Without an accelerator there is no stream to follow.
        self._caller = caller = CallerStreams.record(backend, source) if backend is not None else None
        self._inspection = SourceInspection(resources, self.timings, self._span, caller)
        self._inspecting: Generator[None, None, None] | None = self._inspection.run(source)
        if backend is not None and resources.streams is not None and caller is not None:
            self.progress.pending = StagingCopies(backend, resources.streams, caller, resources.closing)
        try:
            self._inspection.walk.at_call = True
            if self._slices.take(self._inspecting):
                self._inspecting = None
            self._inspection.walk.at_call = False
            if caller is not None:
                caller.include()
        except BaseException as error:
            # To be raised where it is waited for, like any that comes later.
            self.failure = error

    def move(self, to: State, error: BaseException | None = None) -> None:
        """Change the state, and release what the new one does not need.

        Nothing happens if it cannot come there from where it is: it has ended otherwise before.

        Args:
            to: The next state.
            error: What has ended it. It is kept for those who wait while it is copying.
        """
        # No lock: all of this runs on one event loop, or once none runs it any more, and nothing below awaits. Two ends
        # that meet (a failure, and the exit of the context) come one after the other; the second finds no way from here
        # and changes nothing.
        if to not in _TRANSITIONS[self.state]:
            return
        # Before that start() raises the error to its caller, and no other task has a handle to ask by.
        waited_for = self.state is State.COPYING
        self.state = to
        if to is State.NOTING:
            # For aclose(), which has to wait for the copies of every staging. It is taken out when it is captured, or
            # in _end() once its steps are over.
            self._resources.running.add(self.job)
        if to in (State.NOTING, State.COPYING):
            return
        # The source, the plan's copies and the lease; the staged tensors hold what they need.
        # Closed and not only dropped: their frames hold the source. One that is running right now cannot be closed, and
        # is not met here, because a slice has no await in it.
        for work in (self._inspecting, self._finishing):
            if work is not None:
                work.close()
        self._inspecting = self._finishing = self._copies = self._lease = None
        if to is State.CAPTURED:
            self._inspection.walk.release()
            self._resources.running.discard(self.job)
        else:
            self.failure = error if to is State.FAILED and waited_for else None
            self.tree, self.staged = _NOT_BUILT, []
            self.job.cancel()
            if self.progress.window is not None:
                self.progress.window.close()
            if self.progress.pending is not None:
                # Copies that a device was told to make go on; a thread keeps their memory until they are over.
                self.progress.pending.abandon()
        self.progress.pending = None
        counts = self._resources.counts
        counts.longest_loop_hold = max(counts.longest_loop_hold, self._slices.longest_hold)
        counts.longest_loop_hold_elapsed = max(counts.longest_loop_hold_elapsed, self._slices.longest_elapsed)
        self.timings.yields = self._slices.yields

    # The public life of a staging

    async def start(self) -> None:
        """Walk, plan, get memory, build the leaves and start the copies.

        With leaves on devices it returns once those copies are enqueued and everything in host memory is copied.

        Raises:
            UnsupportedLeafError: If a leaf cannot be staged faithfully.
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed.

        May be cancelled; whatever was begun is then dropped, and the copies that run have ended.
        """
        self._resources.closing.check()
        self.move(State.NOTING)
        try:
            from_devices = await self._start_copies()
            if from_devices:
                await self._launch(from_devices)
                # The next step may change what is in host memory without asking any stream.
                await self.job.join()
        except BaseException as error:
            await self._end(error)
            raise
        self.move(State.COPYING)

    async def complete(self) -> Any:
        """Wait for the copies, compare the source, and return the staged tree. Several tasks may wait.

        Raises:
            TornSnapshotError: If the source changed meanwhile.
            StagerClosedError: If the stager was closed meanwhile.
            StagingError: If it was dropped meanwhile.

        May be cancelled. A waiter that is cancelled leaves the rest to the others; with the last one the staging is
        dropped, and the copies that run have ended.
        """
        # Counted before the first await, so that of two waiters that are cancelled in one turn the second knows that it
        # is the last.
        self._waiters += 1
        try:
            return await self._complete()
        except BaseException as error:
            # An error is one for all who wait. A cancellation is this task's own, and another waiter goes on from where
            # it stands.
            if self.state is not State.CAPTURED and (isinstance(error, Exception) or self._waiters == 1):
                await self._end(error)
            raise
        finally:
            self._waiters -= 1

    async def drop(self, error: BaseException | None = None) -> None:
        """Drop what there is, for the context was exited; the copies that run in threads have ended then.

        Args:
            error: What the context was exited with.

        Staged leaves are dropped in steps, because destructors of 50,000 take 20 ms; when cancelled, all at once.
        """
        if self.state is not State.CAPTURED:
            await self._end(error, State.DROPPED)
            return
        staged, self.staged = self.staged, []
        self.move(State.DROPPED)
        try:
            # A coroutine that is being closed may not wait.
            if not isinstance(error, GeneratorExit):
                await self._slices.run(_dropping(staged))
        finally:
            # Cancelled or closed in the middle of it: the rest goes at once, because this frame may be kept by the
            # traceback.
            staged.clear()

    async def _end(self, error: BaseException | None, to: State | None = None) -> None:
        """End it before it is captured: start no more copies, and wait for those that run in threads.

        Copies that devices are making cannot be stopped; their memory is kept until they are done.
        """
        # A failure stays, for those who ask later.
        # It may have been ended by another task while this one waited; move() then changes nothing, and the wait below
        # is for the same steps.
        staged = self.staged
        if self.state is not State.FAILED:
            self.move(to or (State.FAILED if isinstance(error, Exception) else State.DROPPED), error)
        try:
            # A coroutine that is being closed may not wait; what runs keeps its memory.
            if not isinstance(error, GeneratorExit):
                await finish(self.job.settled)
                # Destructors of 50,000 leaves take 20 ms, and those of a million nodes 0.3 s.
                await finish(lambda: self._slices.run(self._releasing(staged)))
        finally:
            self._inspection.walk.release()
            staged.clear()
            # A second cancellation is raised from that wait, once it is over.
            self._resources.running.discard(self.job)
            self._report(error)

    def _releasing(self, staged: list[Any]) -> Generator[None, None, None]:
        """Drop the source and of staged leaves, yielding between small steps."""
        # Copies that devices are making read the columns of leaves still.
        if all(batch.device is None for batch in self._batches):
            yield from self._inspection.leaves.releasing()
        yield from self._inspection.walk.releasing()
        yield from _dropping(staged)

    async def build_early(self) -> bool:
        """Build the staged tree, :attr:`tree`, although its bytes may not have been copied.

        Returns:
            False if that is not possible, because building it looks at them, or because the staging has ended.

        May be cancelled, and called again then.
        """
        if not self._is_early:
            return False
        # Of a consumer that asks for the outline and the capture itself, one builds and the other finds it built. A
        # build that was cancelled has kept nothing of its own and begins again.
        async with self._building:
            if self.state is State.COPYING and self.tree is _NOT_BUILT:
                try:
                    await self._slices.run(self._rebuilding(), self.job)
                except Exception:
                    # The end of a staging takes leaves away that are being built. What ended it is the error to raise.
                    if self.state in (State.COPYING, State.CAPTURED):
                        raise
            is_there = self.state in (State.COPYING, State.CAPTURED)
            if not is_there:
                # Built in spite of the end, it would keep memory.
                self.tree = _NOT_BUILT
        return is_there

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
            leaves, numbers = exhausted(leaves_within(parts, self._inspection.walk, self._batches))
        self.progress.order_before(stream, numbers)
        if self._options.detect_torn:
            # At once and not in slices: what is ordered behind the copies may change the source as soon as this
            # returns, so the comparison has to be over by then.
            exhausted(self._inspection.changes.compare(leaves))

    async def parts_free(self, parts: Collection[Path]) -> bool:
        """Wait until some parts of the tree have been copied.

        Returns:
            False if they will not be, as :meth:`CopyProgress.batch` says.

        Raises:
            KeyError: If one of the parts has no tensor in it that is copied.
            StagingError: If the device has failed.

        Cancelling changes nothing.
        """
        _, numbers = await self._slices.run(leaves_within(parts, self._inspection.walk, self._batches))
        for number in numbers:
            if not await self.progress.batch(number):
                return False
        return True

    # Its parts

    async def _start_copies(self) -> list[DeviceCopy]:
        """Start the copies from host memory, and return those from devices."""
        if self.failure is not None:
            raise self.failure
        if self._inspecting is not None:
            await self._slices.run(self._inspecting)
            self._inspecting = None
            # What was written meanwhile is in the versions that were read, so the copies have to have it too.
            if self._caller is not None:
                self._caller.record_again()
        plan = self.plan = await self._inspection.plan(self._slices)
        self.progress.batches = plan.batches
        device = next((batch.device for batch in plan.batches if batch.device is not None), None)
        if device is not None and self._caller is not None:
            self._caller.check()
        copies = self._copies = Copies(
            self._inspection,
            self.job,
            self.in_order(),
            copied=self.progress.copied,
            span=self._span,
            inline=not self._options.use_async_staging,
        )
        if plan.nbytes and self._is_streamed(plan.nbytes):
            self.progress.window = Window(plan, self._options.max_host_bytes or plan.nbytes)
            await self._slices.run(self._make(plan, copies.outline))
            return []
        if plan.nbytes:
            with Phase(self.timings, "memory", self._span):
                self._lease = await self._resources.pool.acquire(plan.nbytes, device=device)
                copies.arena = self._lease.arena
        self._resources.closing.check()
        with Phase(self.timings, "build", self._span):
            from_devices = await self._slices.run(self._make(plan, copies.build), self.job)
        self.job.close()
        return from_devices

    async def _launch(self, copies: list[DeviceCopy]) -> None:
        if self.progress.pending is not None and copies:
            with Phase(self.timings, "launch", self._span):
                await self.progress.pending.launch(
                    copies, self._resources.launcher, self._resources.max_bytes_in_flight
                )

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
        return not (self._inspection.walk.calls_out or self._inspection.leaves.composites)

    def _make(
        self, plan: Plan, build: Callable[[np.ndarray[Any, Any], list[Any]], Generator[None, None, T]]
    ) -> Generator[None, None, T]:
        """Make the staged leaves, those that have memory in one way or another."""
        staged = self.staged = [None] * len(self._inspection.leaves.tensors)
        # Thousands of tensors are put into this list while the collector may run; untracked, it is not gone through
        # each time.
        _private.untrack_all((staged,))
        keep_freed_memory()
        # To make the first batch ready is a step of 0.4 ms, which a slice that is nearly over has no time for.
        yield
        yield from build_empty(plan.empty, staged)
        if self.progress.window is not None:
            memory = self.progress.window.addresses
        else:
            memory = self._lease.buffer if self._lease is not None else _NO_MEMORY
        self.progress.memory = range(memory.ctypes.data, memory.ctypes.data + memory.nbytes)
        return (yield from build(memory, staged))

    async def fill(self) -> None:
        """Copy, chunk after chunk, what does not fit the budget at once, as the consumer makes room for it.

        Raises:
            HostMemoryError: If memory cannot be had.
            StagerClosedError: If the stager is closed.
            StagingError: If the device has failed.

        May be cancelled; whatever was begun is then dropped, like all of it.
        """
        copies, window = self._copies, self.progress.window
        if copies is None or window is None:
            return
        try:
            for chunk in window.chunks:
                if self.state is not State.COPYING:
                    raise self.failure or StagingError(_ABANDONED)
                # One after the other: the next chunk's memory is asked for only when the copies into this one are under
                # way, so a staging never waits with memory in hand that nothing fills.
                await self._fill_chunk(copies, window, chunk)
            self.job.close()
        except BaseException as error:
            await self._end(without_locals(error))
            raise

    async def _fill_chunk(self, copies: Copies, window: Window, chunk: Chunk) -> None:
        """Get memory for a chunk and start the copies into it. Here alone memory is in locals, which end with it."""
        with Phase(self.timings, "memory", self._span):
            memory = await window.lease(chunk, self._resources.pool)
        self._resources.closing.check()
        from_devices = await self._slices.run(copies.fill(chunk, memory))
        await self._launch(from_devices)
        # After the launch: who waits for a batch of the chunk finds its copy.
        window.filled(chunk, memory)

    async def _complete(self) -> Any:
        async with self._completing:
            if self.state is State.COPYING:
                await self._capture()
        if self.state is State.CAPTURED:
            return self.tree
        raise self.failure or StagingError(_ABANDONED)

    async def _capture(self) -> None:
        """Wait for the copies, and finish; returns early if it is ended by another task."""
        early = await self.build_early()
        with Phase(self.timings, "copy", self._span):
            # Joining would end the job when this is cancelled, and another may go on here.
            await self.job.settled()
            # Joined only for its error, which join() raises; the job has settled, so this does not wait.
            if self.job.error is not None:
                await self.job.join()
            for number, batch in enumerate(self._batches):
                if batch.device is not None:
                    await self.progress.batch(number)
            self._resources.closing.check()
        if self.state is not State.COPYING:
            return
        if self._finishing is None:
            # Kept across cancellations: each comparison is for the last time, so a second waiter goes on in the same
            # generator and does not start it anew.
            self._finishing = self._finish(rebuild=not early)
        await self._slices.run(self._finishing, self.job, resumable=True)
        if self.state is not State.COPYING:
            return
        counts = self._resources.counts
        # Before the state changes, which drops the copies that are counted here.
        counts.stagings += 1
        counts.leaves += len(self._inspection.specs)
        counts.nbytes += self.nbytes
        counts.copies += self.job.done
        for copy in self.progress.pending or ():
            counts.copies += copy.copies
            counts.launches += copy.launches
        self.move(State.CAPTURED)
        self._report(None)

    def _finish(self, *, rebuild: bool) -> Generator[None, None, None]:
        """Compare the source with what was noted, and make the staged tree, in small steps."""
        if self._options.detect_torn:
            with Phase(self.timings, "check", self._span):
                yield from self._inspection.changes.compare()
        # Lost leaves last: threads add to that set while they copy, and all of them have ended by now.
        torn = self._inspection.torn(self._copies.sources.lost if self._copies is not None else ())
        if torn:
            raise TornSnapshotError([format_path(path) for path in torn])
        if rebuild:
            yield from self._rebuilding()
        # In steps, while the source is still referred to: destructors of many leaves in one go would hold the loop.
        yield from self._inspection.leaves.releasing()
        yield from self._inspection.walk.releasing()

    def _rebuilding(self) -> Generator[None, None, None]:
        """Make the staged tree."""
        walk = self._inspection.walk
        with Phase(self.timings, "rebuild", self._span):
            yield from finish_leaves(walk.leaves, self.staged)
            self.tree = yield from walk.rebuild(self.staged)

    def _report(self, error: BaseException | None) -> None:
        """Tell the log and observers that it is over, and what became of it."""
        if error is None:
            _logger.debug("staged %d bytes of %d leaves: %s", self.nbytes, self.leaves, self.timings)
        span = self._span
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
        return self._inspection.whole_leaves

    def leaves_of(self, batch: Batch | None) -> Iterator[int]:
        """Return the numbers of the leaves that a batch completes; None for those that no batch does."""
        return self._inspection.whole(self._inspection.without_bytes() if batch is None else batch.completes)

    def leaf(self, index: int) -> StagedLeaf:
        """Return a staged leaf."""
        return StagedLeaf(self._inspection.walk.path(index), self.staged[index])

    @property
    def nbytes(self) -> int:
        """Size of the staged copy."""
        return self.plan.nbytes if self.plan is not None else 0


def _dropping(staged: list[Any]) -> Generator[None, None, None]:
    while staged:
        del staged[-_DROPPED_AT_ONCE:]
        yield
