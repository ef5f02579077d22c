"""The way back: staged values into live tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from aiostage._capture.faithful import Refusal
from aiostage._capture.leaves import Inspection
from aiostage._capture.plan import BATCH_BYTES, BATCH_LEAVES
from aiostage._capture.walk import Walk
from aiostage._copy.device import Flight
from aiostage._copy.flights import airborne, land
from aiostage._copy.host import copy_tensors
from aiostage._copy.resources import Resources
from aiostage._device.streams import Moment
from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Job
from aiostage.abc import Backend
from aiostage.errors import CheckpointMismatchError
from aiostage.leaf import Path, format_path

__all__ = ["restore"]

_AT_ONCE = 64
"""Leaves looked at between two yields."""


async def restore(resources: Resources, staged: Any, into: Any) -> None:
    """Copy every tensor of one tree into its twin in the other, after both were found to match."""
    arrivals = _Arrivals(resources)
    slices = Slices(resources.options.max_loop_hold)
    source, target = await _Leaves.of(slices, staged, resources), await _Leaves.of(slices, into, resources)
    try:
        await slices.run(_check(source, target))
        batches = await slices.run(_batches(source, target))
        arrivals.renew()
        # Half a restore is neither the old state nor the new: once begun it is finished.
        await finish(partial(_copy, batches, resources.workers.job(), arrivals))
    finally:
        arrivals.abandon()
        source.walk.release()
        target.walk.release()


async def _copy(batches: list[_Batch], job: Job, arrivals: _Arrivals) -> None:
    """Make the copies; may be called again after a cancellation, and then goes on."""
    while batches:
        batch = batches.pop()
        if batch.device is None:
            job.put(partial(copy_tensors, batch.destinations, batch.values))
        else:
            arrivals.follow_the_caller(batch.device)
            job.put(partial(arrivals.enqueue, batch, batch.device))
    job.close()
    await job.settled()
    if job.error is not None:
        raise job.error
    await arrivals.land()


@dataclass(slots=True)
class _Batch:
    """Live tensors of one device, or of the host, with their values."""

    device: torch.device | None
    destinations: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    nbytes: int = 0


class _Arrivals:
    """Copies to devices: after what the caller had enqueued, and before what it enqueues once they are known of."""

    def __init__(self, resources: Resources) -> None:
        self._backend = resources.backend
        self._streams = resources.streams
        self._traffic = resources.traffic
        self._moment = Moment.record(resources.backend) if resources.backend is not None else None
        self._beside: dict[torch.device, Any] = {}
        self._flights: list[Flight] = []
        self._ordered = 0

    def renew(self) -> None:
        """Make the copies follow what the caller has enqueued by now as well."""
        if self._moment is not None:
            self._moment.renew()

    def follow_the_caller(self, device: torch.device) -> None:
        """Make the copies to a device wait for the caller's moment."""
        if self._moment is not None and self._streams is not None and device not in self._beside:
            # Asked for once: after a failure elsewhere the next answer is another stream, which waits for nothing.
            stream = self._beside[device] = self._streams.of(device)
            self._moment.order_before(stream, device)

    def enqueue(self, batch: _Batch, device: torch.device) -> None:
        """Tell the device to copy; runs in a worker thread."""
        backend, stream = self._backend, self._beside[device]
        assert backend is not None  # noqa: S101 - or there is no device
        launches = 0
        try:
            with torch.no_grad():
                launches = backend.copy(batch.destinations, batch.values, stream)
            for tensor in batch.destinations:
                backend.keep(tensor, stream)
        except Exception:
            # Some of it may be under way. Should that not even be recorded, the device has failed and copies no more.
            with suppress(Exception):
                self._take_off(backend, batch, device, launches)
            raise
        self._take_off(backend, batch, device, launches)

    def _take_off(self, backend: Backend, batch: _Batch, device: torch.device, launches: int) -> None:
        stream = self._beside[device]
        event = backend.record(stream)
        keep: list[object] = [batch.destinations, batch.values]
        transfer = self._traffic.announce((device, "arrivals"), batch.nbytes, stream)
        flight = Flight(event, transfer, device, batch.nbytes, len(self._flights), len(batch.values), launches, keep)
        airborne.add(flight)
        self._flights.append(flight)

    async def land(self) -> None:
        """Make later work of the caller's wait for the copies, and wait for them too. Cancelling changes nothing."""
        if self._streams is None:
            return
        self._order()
        for flight in self._flights:
            await land(flight, self._streams)

    def abandon(self) -> None:
        """Let what is still under way, after a failure, be watched over by a thread. Otherwise nothing is."""
        with suppress(Exception):
            self._order()
        airborne.desert(self._flights)

    def _order(self) -> None:
        for flight in self._flights[self._ordered :]:
            if self._backend is not None:
                self._backend.wait(self._backend.current_stream(flight.device), flight.event)
            self._ordered += 1


class _Leaves:
    """The leaves of one tree by their paths."""

    def __init__(self, walk: Walk, device_of: Callable[[torch.Tensor], torch.device | None] | None) -> None:
        self.walk = walk
        self.device_of = device_of or _on_host
        self.by_path: dict[Path, int] = {}

    def index(self) -> Generator[None, None, None]:
        """Find the path of every leaf, yielding between small steps."""
        for index in range(len(self.walk.leaves)):
            if index not in self.walk.leaves.owners:
                self.by_path[self.walk.path(index)] = index
            if index % _AT_ONCE == 0:
                yield

    @classmethod
    async def of(cls, slices: Slices, tree: Any, resources: Resources) -> _Leaves:
        """Find the leaves of a tree, taking composites apart."""
        walk = Walk()
        device_of = resources.backend.device_of if resources.backend is not None else None
        await slices.run(walk.run(tree))
        # An object that copies itself keeps its tensors; only here they are wanted and not their copies.
        walk.leaves.given.clear()
        try:
            await slices.run(walk.leaves.inspect(Inspection(device_of)))
        except Refusal as refusal:
            raise refusal.at(walk.path(len(walk.leaves.specs))) from None
        leaves = cls(walk, device_of)
        await slices.run(leaves.index())
        return leaves

    def describe(self, index: int) -> str:
        """Say what a leaf is, as far as two must agree for one to be copied into the other."""
        if index in self.walk.leaves.composites:
            composite, parts = self.walk.leaves.composites[index]
            inside = ", ".join(map(self.describe, parts))
            return f"{type(self.walk.leaves.tensors[index]).__name__}({inside})" if composite.parts else "uninitialized"
        tensor = self.walk.leaves.tensors[index]
        return f"{tensor.dtype} {tuple(tensor.shape)}"

    def dense(self, index: int) -> Iterator[torch.Tensor]:
        """Yield the tensors with memory that a leaf consists of."""
        if index in self.walk.leaves.composites:
            for part in self.walk.leaves.composites[index][1]:
                yield from self.dense(part)
        else:
            yield self.walk.leaves.tensors[index]


def _check(source: _Leaves, target: _Leaves) -> Generator[None, None, None]:
    """Raise what keeps two trees from matching, yielding between small steps."""
    missing = [format_path(path) for path in target.by_path if path not in source.by_path]
    unexpected = [format_path(path) for path in source.by_path if path not in target.by_path]
    mismatched = []
    for number, (path, live) in enumerate(target.by_path.items()):
        if path in source.by_path:
            wanted, given = target.describe(live), source.describe(source.by_path[path])
            if wanted != given:
                mismatched.append(f"{format_path(path)} ({given} into {wanted})")
        if number % _AT_ONCE == 0:
            yield
    if missing or unexpected or mismatched:
        raise CheckpointMismatchError(missing=missing, unexpected=unexpected, mismatched=mismatched)


def _batches(source: _Leaves, target: _Leaves) -> Generator[None, None, list[_Batch]]:
    """Return live tensors with their values in batches, yielding between small steps."""
    batches: list[_Batch] = []
    open_batches: dict[torch.device | None, _Batch] = {}
    for path, leaf in target.by_path.items():
        for live, value in zip(target.dense(leaf), source.dense(source.by_path[path]), strict=True):
            device = target.device_of(live) or source.device_of(value)
            batch = open_batches.get(device)
            if batch is None or batch.nbytes >= BATCH_BYTES or len(batch.values) >= BATCH_LEAVES:
                batch = open_batches[device] = _Batch(device)
                batches.append(batch)
            # Without history: the live tensor may be one that autograd guards.
            batch.destinations.append(live.detach())
            batch.values.append(value.detach())
            batch.nbytes += live.nbytes
        yield
    return batches


def _on_host(tensor: torch.Tensor) -> None:
    return None
