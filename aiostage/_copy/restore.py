"""The way back: staged values into live tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from aiostage._capture.faithful import Inspection
from aiostage._capture.plan import BATCH_BYTES, BATCH_LEAVES
from aiostage._capture.walk import Walk
from aiostage._copy.host import copy_tensors
from aiostage._copy.pending import PendingCopy
from aiostage._copy.resources import Resources
from aiostage._copy.targets import (
    Pair,
    agree,
    copyable,
    is_itself,
    read_and_written,
    shared_unlike,
    unexpanded,
    unwritable,
)
from aiostage._copy.to_device import HostToDeviceCopier, TensorCopy
from aiostage._device.streams import CallerStreams
from aiostage._loop.coroutines import Slices, finish
from aiostage._loop.workers import Job
from aiostage.errors import CheckpointMismatchError, HostMemoryError
from aiostage.leaf import Path, format_path

__all__ = ["restore"]

_LEAVES_PER_STEP = 64
"""Leaves looked at between two yields."""


async def restore(resources: Resources, caller: CallerStreams, staged: Any, into: Any) -> None:
    """Copy every tensor of one tree into its twin in the other, after all were found to match and to be writable."""
    copier: HostToDeviceCopier | None = None
    if resources.backend is not None and resources.streams is not None:
        copier = HostToDeviceCopier(resources.backend, resources.streams, caller, resources.closing)
    slices = Slices(resources.options.max_loop_hold)
    source, target = await _Leaves.of(slices, staged, resources), await _Leaves.of(slices, into, resources)
    try:
        # Every question that can refuse comes before the first write, also those that read values.
        await slices.run(_check(source, target))
        pairs = await slices.run(_pairs(source, target))
        await slices.run(_check_memory(pairs, caller.inference))
        await _check_ties(pairs, resources, await slices.run(shared_unlike([located.pair for located in pairs])))
        if copier is not None:
            caller.renew()
            await _bring_to_host(pairs, resources, copier)
        batches = await slices.run(_batches(pairs, target.device_of))
        if copier is not None:
            for device in {batch.device: None for batch in batches if batch.device is not None}:
                copier.follow_the_caller(device)
        # A restore that stops half-way leaves a mixture of two states. Once started, it runs to its end.
        await finish(partial(_copy, batches, resources.workers.job(), copier))
    finally:
        if copier is not None:
            copier.abandon()
        # The walks refer to both trees; released by hand, because this frame stays in the traceback of an error.
        source.walk.release()
        target.walk.release()


async def _bring_to_host(pairs: list[_Located], resources: Resources, copier: HostToDeviceCopier) -> None:
    """Copy values that are on devices to host memory, before anything is changed.

    PyTorch orders a copy between two devices by the current streams of both, which a thread would have to make current;
    and a value that lies where another is to be written has to be read before.
    """
    pending: list[PendingCopy] = []
    device_of = resources.backend.device_of if resources.backend is not None else _on_host
    for number, located in enumerate(pairs):
        device = device_of(located.pair.value)
        if device is None or is_itself(*located.pair):
            continue
        copier.follow_the_caller(device)
        copy, value = await resources.workers.run(partial(_to_host, located, copier, device))
        pending.append(copy)
        pairs[number] = located._replace(pair=Pair(located.pair.live, value))
    for copy in pending:
        await copier.wait(copy)


def _to_host(located: _Located, copier: HostToDeviceCopier, device: torch.device) -> tuple[PendingCopy, torch.Tensor]:
    """Enqueue a copy to host memory, in a worker thread."""
    value = located.pair.value
    try:
        host = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    except RuntimeError as error:
        raise HostMemoryError(
            f"no memory for {value.nbytes} bytes of a value on {device}: {error}", path=format_path(located.path)
        ) from error
    destination, source = unexpanded(copyable(host), copyable(value))
    return copier.enqueue(TensorCopy([destination], [source], device)), host


async def _copy(batches: list[_RestoreBatch], job: Job, copier: HostToDeviceCopier | None) -> None:
    """Make the copies; may be called again after a cancellation, and then goes on."""
    # Emptied without an await in between: a second call finds no batch, a closed job, and waits for it.
    while batches:
        batch = batches.pop()
        if batch.device is None or copier is None:
            job.put(partial(copy_tensors, batch.destinations, batch.values))
        else:
            job.put(partial(copier.enqueue, TensorCopy(batch.destinations, batch.values, batch.device)))
    job.close()
    await job.settled()
    if job.error is not None:
        raise job.error
    if copier is not None:
        await copier.wait_for_all()


class _Located(NamedTuple):
    """A live tensor with its value, and the path of the leaf that it is, or is a part of."""

    path: Path
    pair: Pair


@dataclass(slots=True)
class _RestoreBatch:
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
            if self.walk.leaves.owners.find(index) is None:
                self.by_path[self.walk.path(index)] = index
            if index % _LEAVES_PER_STEP == 0:
                yield

    @classmethod
    async def of(cls, slices: Slices, tree: Any, resources: Resources) -> _Leaves:
        """Find the leaves of a tree, taking composites apart."""
        device_of = resources.backend.device_of if resources.backend is not None else None
        walk, inspection = Walk(only_leaves=True), Inspection(device_of, needs_versions=False)
        await slices.run(walk.run(tree))
        await slices.run(walk.inspect(inspection))
        await slices.run(walk.settle(inspection))
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
        if number % _LEAVES_PER_STEP == 0:
            yield
    if missing or unexpected or mismatched:
        raise CheckpointMismatchError(
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            source="the staged copy",
            remedy="Pass a live tree with the same leaves; an optimizer has its own only after its first step.",
        )


def _pairs(source: _Leaves, target: _Leaves) -> Generator[None, None, list[_Located]]:
    """Return live tensors with their values, yielding between small steps."""
    pairs: list[_Located] = []
    for path, leaf in target.by_path.items():
        pairs += (
            _Located(path, Pair(live, value))
            for live, value in zip(target.dense(leaf), source.dense(source.by_path[path]), strict=True)
        )
        yield
    return pairs


def _check_memory(pairs: list[_Located], inference: bool) -> Generator[None, None, None]:
    """Raise what keeps live tensors from being written to, before any is, yielding between small steps."""
    mismatched: list[str] = []
    for number, (path, pair) in enumerate(pairs):
        reason = unwritable(*pair, inference=inference)
        if reason is not None:
            mismatched.append(f"{format_path(path)} ({reason})")
        if number % _LEAVES_PER_STEP == 0:
            yield
    if not mismatched:
        for first, second in (yield from read_and_written([located.pair for located in pairs])):
            mismatched.append(
                f"{format_path(pairs[second].path)} (its memory is the staged value of "
                f"{format_path(pairs[first].path)})"
            )
    _refuse(mismatched)


async def _check_ties(pairs: list[_Located], resources: Resources, unlike: list[list[int]]) -> None:
    """Raise if live tensors share memory, and cannot all have their values for that."""
    mismatched: list[str] = []
    for group in unlike:
        if not await resources.workers.run(partial(agree, [pairs[place].pair for place in group])):
            first, *others = (format_path(pairs[place].path) for place in group)
            mismatched += (
                f"{other} (it shares memory with {first}, but not so in the staged copy)" for other in others
            )
    _refuse(mismatched)


def _refuse(mismatched: list[str]) -> None:
    if mismatched:
        raise CheckpointMismatchError(
            missing=[],
            unexpected=[],
            mismatched=mismatched,
            source="the staged copy",
            remedy="Pass live tensors with memory of their own.",
        )


def _batches(
    pairs: list[_Located], device_of: Callable[[torch.Tensor], torch.device | None]
) -> Generator[None, None, list[_RestoreBatch]]:
    """Return live tensors with their values, all of them in host memory, in batches, yielding between small steps."""
    batches: list[_RestoreBatch] = []
    open_batches: dict[torch.device | None, _RestoreBatch] = {}
    for number, (_, (live, value)) in enumerate(pairs):
        if live.numel() and not is_itself(live, value):
            device = device_of(live)
            batch = open_batches.get(device)
            if batch is None or batch.nbytes >= BATCH_BYTES or len(batch.values) >= BATCH_LEAVES:
                batch = open_batches[device] = _RestoreBatch(device)
                batches.append(batch)
            destination, source = unexpanded(copyable(live), copyable(value))
            batch.destinations.append(destination)
            batch.values.append(source)
            batch.nbytes += destination.nbytes
        if number % _LEAVES_PER_STEP == 0:
            yield
    return batches


def _on_host(tensor: torch.Tensor) -> None:
    return None
