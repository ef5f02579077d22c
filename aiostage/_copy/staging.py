"""One staging under way: from the walk to the captured copy."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
import torch

from aiostage._capture.faithful import Refusal, Spec
from aiostage._capture.leaves import Inspection, changed
from aiostage._capture.plan import MixedCast, Plan, compile_plan
from aiostage._capture.rebuild import Results, build_block, build_run, finish_leaves, perform
from aiostage._capture.walk import Walk
from aiostage._copy.host import HostCopy
from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Job, Workers
from aiostage._memory.pool import Lease, Pool
from aiostage.abc import Backend
from aiostage.errors import StagerClosedError, TornSnapshotError, UnsupportedLeafError
from aiostage.leaf import Path, StagedLeaf, format_path
from aiostage.options import StagingOptions

__all__ = ["Resources", "Staging", "Timings"]


@dataclass(kw_only=True)
class Timings:
    """Where the time of one staging went, in seconds. Phases that overlap count for themselves.

    Attributes:
        walk: Copying containers and finding the leaves.
        inspect: Looking at the leaves.
        plan: Laying out the arena, or recognizing the layout.
        memory: Waiting for an arena.
        build: Making the staged leaves, while the copies already run.
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
    copy: float = 0.0
    check: float = 0.0
    rebuild: float = 0.0
    yields: int = 0


@dataclass
class _Counts:
    """What a stager has done so far."""

    stagings: int = 0
    leaves: int = 0
    nbytes: int = 0
    plans_compiled: int = 0
    plans_replayed: int = 0
    copies: int = 0
    launches: int = 0
    longest_loop_hold: float = 0.0


class Resources:
    """What the stagings of one stager share.

    Args:
        options: Of the stager.
        backend: How to reach accelerators; None when there is none to reach.
    """

    def __init__(self, options: StagingOptions, backend: Backend | None) -> None:
        self.options = options
        self.backend = backend
        self.workers = Workers(_COPY_THREADS, "aiostage-copy")
        self.pool = Pool(self.workers, max_bytes=options.max_host_bytes, shared=options.use_shared_memory)
        self.inspection = Inspection(backend.device_of if backend is not None else None)
        self.counts = _Counts()
        self.running: set[Staging] = set()
        self.closed = False
        self._known: tuple[list[Spec | None], list[int], Plan] | None = None

    def plan(self, specs: list[Spec | None], addresses: list[int]) -> Generator[None, None, Plan]:
        """Return the layout for specs and addresses, the last one if they are the same again."""
        known = self._known
        if known is not None and known[0] == specs and known[1] == addresses:
            self.counts.plans_replayed += 1
            return known[2]
        plan = yield from compile_plan(specs, addresses)
        self.counts.plans_compiled += 1
        self._known = (specs, addresses, plan)
        return plan

    def check_open(self) -> None:
        """Raise StagerClosedError if the stager is closed."""
        if self.closed:
            raise StagerClosedError


_COPY_THREADS = 2
"""Measured on two cores: a second thread overlaps faulting memory in with copying, a third adds nothing."""


class Staging:
    """Captures one state dict.

    :meth:`begin` returns once every copy is under way, :meth:`complete` once the source may change again. Memory
    safety rests on references alone: whatever a running copy touches is kept alive by that copy, so a staging that is
    cancelled, or whose event loop is gone, can simply be dropped.

    Args:
        resources: Of the stager.
        source: The state dict.
    """

    def __init__(self, resources: Resources, source: Any) -> None:
        self._resources = resources
        self._options = resources.options
        self._source = source
        self._slices = Slices(resources.options.max_loop_hold)
        self._walk = Walk(passthrough=resources.options.passthrough)
        self._specs: list[Spec | None] = []
        # What holds memory is kept here and not in locals: there the traceback of an error, or of a cancellation,
        # would keep it for as long as somebody keeps the error.
        self._lease: Lease | None = None
        self._results: Results | None = None
        self._tree: Any = None
        self.plan: Plan | None = None
        self.staged: list[Any] = []
        self.job: Job = resources.workers.job()
        self.timings = Timings()
        self.landed: list[int] = []
        """Batches that have been copied, in the order in which they were."""

    # The public life of a staging

    async def begin(self) -> None:
        """Walk, plan, get memory, build the leaves and start the copies.

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
        return tree

    async def abandon(self, error: BaseException | None = None) -> None:
        """Drop the copies not yet begun, wait for those that run, and give everything up."""
        self.job.cancel()
        # A coroutine that is being closed may not wait; what runs keeps its memory.
        if not isinstance(error, GeneratorExit):
            await finish(self.job.settled)
        self._retire()
        self.staged = []

    # Its parts

    async def _begin(self) -> None:
        walk, leaves = self._walk, self._walk.leaves
        with _Phase(self.timings, "walk"):
            await self._slices.run(walk.run(self._source))
        with _Phase(self.timings, "inspect"):
            try:
                await self._slices.run(leaves.inspect(self._resources.inspection))
            except Refusal as refusal:
                raise refusal.at(walk.path(len(leaves.specs))) from None
            self._specs = leaves.specs
            if self._options.dtype is not None:
                self._specs = await self._slices.run(self._cast())
        with _Phase(self.timings, "plan"):
            try:
                plan = self.plan = await self._slices.run(self._resources.plan(self._specs, leaves.addresses))
            except MixedCast as mixed:
                raise UnsupportedLeafError(
                    "it is to be cast, but shares memory with a leaf of another dtype.",
                    path=format_path(walk.path(mixed.index)),
                    remedy="Leave one of the two out, or return None for it from the dtype function.",
                ) from None
        if plan.nbytes:
            with _Phase(self.timings, "memory"):
                self._lease = await self._resources.pool.acquire(plan.nbytes, populate=False)
        self._resources.check_open()
        with _Phase(self.timings, "build"):
            await self._slices.run(self._build(plan))
        self.job.close()

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

    def _build(self, plan: Plan) -> Generator[None, None, None]:
        """Make the staged leaves, handing each batch over as soon as its leaves are there."""
        tensors, specs, addresses = self._walk.leaves.tensors, self._specs, self._walk.leaves.addresses
        staged = self.staged = [None] * len(tensors)
        for run in plan.empty:
            _place(staged, run.indices, build_run(_NOTHING, run))
            yield
        if self._lease is None:
            return
        memory = self._lease.buffer
        for number, batch in enumerate(plan.batches):
            for run in batch.runs:
                _place(staged, run.indices, build_run(memory[run.offset : run.offset + run.nbytes], run))
                yield
            for block in batch.blocks:
                members = [spec for index in block.indices if (spec := specs[index]) is not None]
                part = memory[block.offset : block.offset + block.nbytes]
                _place(staged, block.indices, build_block(part, block, members))
                yield
            copies = HostCopy(batch, tensors, staged, specs, addresses, memory)
            self._start(partial(self._copy, number, copies))
            yield

    def _start(self, step: Callable[[], None]) -> None:
        self.job.put(step)
        if not self._options.use_async_staging:
            self.job.run_next()

    def _copy(self, number: int, copies: HostCopy) -> None:
        """Copy one batch; runs in a worker thread."""
        # A cold arena is faulted in by the copy itself: measured as fast as populating it first at best, twice as fast
        # where huge pages are slow to come, and two threads do it at once.
        if copies.run(self.job):
            self.landed.append(number)

    async def _complete(self) -> Any:
        resources, walk, leaves = self._resources, self._walk, self._walk.leaves
        # Putting staged tensors into containers needs no bytes in them yet; whatever may look at values does.
        early = not (walk.calls_out or leaves.composites)
        if early:
            self._tree = await self._rebuild()
        with _Phase(self.timings, "copy"):
            await self.job.join()
            resources.check_open()
        if self._options.detect_torn:
            with _Phase(self.timings, "check"):
                paths = [walk.path(index) for index in await self._slices.run(changed(leaves))]
                paths += await self._slices.run(walk.witness.changed())
            if paths:
                raise TornSnapshotError([format_path(path) for path in paths])
        if not early:
            self._tree = await self._rebuild()
        counts = resources.counts
        counts.stagings += 1
        counts.leaves += len(self._specs)
        counts.nbytes += self.nbytes
        counts.copies += self.job.done
        return self._tree

    async def _rebuild(self) -> Any:
        """Make the staged tree."""
        walk = self._walk
        with _Phase(self.timings, "rebuild"):
            finish_leaves(walk.leaves, self.staged)
            self._results = walk.results(self.staged)
            await self._slices.run(perform(walk.program, self._results))
            return walk.tree(self._results)

    def _retire(self) -> None:
        """Let go of the source and of the lease; the staged tensors hold what they need."""
        self._resources.running.discard(self)
        counts = self._resources.counts
        counts.longest_loop_hold = max(counts.longest_loop_hold, self._slices.longest_hold)
        self.timings.yields = self._slices.yields
        self._lease = None
        self._source = self._results = self._tree = None
        self._walk.release()

    # What can be seen of it

    @property
    def leaves(self) -> int:
        """How many leaves the tree has; a tensor that is reached by several paths counts once."""
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


class _Phase:
    """Adds the time that a section takes to a field of the timings."""

    __slots__ = ("_begin", "_name", "_timings")

    def __init__(self, timings: Timings, name: str) -> None:
        self._timings = timings
        self._name = name

    def __enter__(self) -> None:
        self._begin = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        spent = getattr(self._timings, self._name) + perf_counter() - self._begin
        setattr(self._timings, self._name, spent)


_NOTHING = np.empty(0, dtype=np.uint8)


def _place(staged: list[Any], indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
    """Put tensors where their leaves' indices say."""
    first, count = indices[0], len(indices)
    if indices[-1] - first == count - 1:
        staged[first : first + count] = tensors
        return
    for index, tensor in zip(indices, tensors, strict=True):
        staged[index] = tensor


def _check_target(target: object, path: Path) -> None:
    if target is not None and not (isinstance(target, torch.dtype) and target.is_floating_point):
        raise TypeError(
            f"{format_path(path)}: the dtype function must return a floating-point torch.dtype or None, not {target!r}"
        )
