"""The way back: staged values into live tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from aiostage._capture.faithful import Refusal
from aiostage._capture.leaves import Inspection
from aiostage._capture.plan import BATCH_BYTES, BATCH_LEAVES
from aiostage._capture.walk import Walk
from aiostage._copy.arrivals import Arrivals
from aiostage._copy.conversions import copy_tensors
from aiostage._copy.resources import Resources
from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Job
from aiostage.errors import CheckpointMismatchError
from aiostage.leaf import Path, format_path

__all__ = ["restore"]

_AT_ONCE = 64
"""Leaves looked at between two yields."""


async def restore(resources: Resources, staged: Any, into: Any) -> None:
    """Copy every tensor of one tree into its twin in the other, after both were found to match."""
    arrivals: Arrivals | None = None
    if resources.backend is not None and resources.streams is not None:
        arrivals = Arrivals(resources.backend, resources.streams, resources.traffic, resources.closing)
    slices = Slices(resources.options.max_loop_hold)
    source, target = await _Leaves.of(slices, staged, resources), await _Leaves.of(slices, into, resources)
    try:
        await slices.run(_check(source, target))
        batches = await slices.run(_batches(source, target))
        if arrivals is not None:
            arrivals.renew()
        # Half a restore is neither the old state nor the new: once begun it is finished.
        await finish(partial(_copy, batches, resources.workers.job(), arrivals))
    finally:
        if arrivals is not None:
            arrivals.abandon()
        source.walk.release()
        target.walk.release()


async def _copy(batches: list[_Batch], job: Job, arrivals: Arrivals | None) -> None:
    """Make the copies; may be called again after a cancellation, and then goes on."""
    while batches:
        batch = batches.pop()
        if batch.device is None or arrivals is None:
            job.put(partial(copy_tensors, batch.destinations, batch.values))
        else:
            arrivals.follow_the_caller(batch.device)
            job.put(partial(arrivals.enqueue, batch.destinations, batch.values, batch.device))
    job.close()
    await job.settled()
    if job.error is not None:
        raise job.error
    if arrivals is not None:
        await arrivals.land()


@dataclass(slots=True)
class _Batch:
    """Live tensors of one device, or of the host, with their values."""

    device: torch.device | None
    destinations: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    nbytes: int = 0


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
        raise CheckpointMismatchError(
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            source="the staged copy",
            remedy="Pass a live tree with the same leaves; an optimizer has its own only after its first step.",
        )


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
