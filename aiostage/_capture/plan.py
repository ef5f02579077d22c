"""Where everything goes: a pure function from the specs and addresses of leaves to the layout of an arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aiostage._capture.faithful import Spec

__all__ = ["BATCH_BYTES", "BATCH_LEAVES", "Batch", "Block", "MixedCast", "Piece", "Plan", "Run", "compile_plan"]

BATCH_BYTES = 32 * 2**20
"""How much one copy moves at most. Measured: at 18 GB/s this is 2 ms, long enough that the hand-over to a thread does
not show and short enough that a cancellation is answered soon."""

BATCH_LEAVES = 512
"""How many leaves one fused copy takes at most: parsing its arguments holds the GIL for about 0.2 us each."""

BLOCK_ALIGNMENT = 64
"""Blocks keep their address modulo this, so that each leaf in them stays aligned for its dtype."""


class MixedCast(Exception):  # noqa: N818 - never leaves the capture; the stager adds the path and raises an error
    """A leaf to be cast shares memory with one of another dtype."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


@dataclass(frozen=True, slots=True)
class Run:
    """Leaves of one spec in consecutive slots.

    Attributes:
        spec: Of each.
        indices: Which leaves.
        offset: Of the first slot in the arena, in bytes.
    """

    spec: Spec
    indices: Sequence[int]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of all slots."""
        return self.spec.staged_nbytes * len(self.indices)


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a leaf's memory, counted in elements from its first one, and where in the arena it goes."""

    index: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class Block:
    """Leaves that share memory, staged as the one range that they cover together.

    Attributes:
        indices: Which leaves.
        offsets: Of each leaf in the block, in bytes.
        offset: Of the block in the arena, in bytes.
        nbytes: Of the block.
    """

    indices: tuple[int, ...]
    offsets: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one fused copy moves.

    Attributes:
        device: Where the sources are; None for host memory.
        start: First byte of the arena that the batch writes.
        stop: One past the last.
        runs: Leaves that are built here.
        blocks: Blocks that are built here.
        whole: Leaves copied as they are, from the source tensor to the staged one.
        pieces: Ranges of elements of leaves, copied as flat memory.
    """

    device: torch.device | None
    start: int
    stop: int
    runs: tuple[Run, ...]
    blocks: tuple[Block, ...]
    whole: Sequence[int]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The layout of one structure, valid for the specs and addresses that it was compiled from.

    Attributes:
        nbytes: Size of the arena that it needs.
        batches: In the order of the arena.
        empty: Runs of leaves without elements.
        leaves: How many leaves have a place.
    """

    nbytes: int
    batches: tuple[Batch, ...]
    empty: tuple[Run, ...]
    leaves: int


def compile_plan(specs: Sequence[Spec | None], addresses: Sequence[int]) -> Plan:
    """Lay out an arena.

    Leaves that share memory with no other get slots of their own, leaves of one spec side by side, larger dtypes first
    so that no slot needs padding. Leaves whose memory overlaps come after them, as blocks.

    Args:
        specs: One for each leaf; None for a leaf without memory of its own.
        addresses: Of the first element of each leaf.

    Returns:
        The plan.

    Raises:
        MixedCast: If a leaf to be cast shares memory with one of another dtype.
    """
    alone, groups = _separate(specs, addresses)
    by_spec: dict[Spec, list[int]] = {}
    for index in alone:
        by_spec.setdefault(specs[index], []).append(index)  # type: ignore[arg-type]
    empty = tuple(Run(spec, indices, 0) for spec, indices in by_spec.items() if spec.extent == 0)
    full = [(spec, indices) for spec, indices in by_spec.items() if spec.extent]
    full.sort(key=lambda entry: (str(entry[0].device or ""), -entry[0].target.itemsize))
    builder = _Builder()
    for spec, indices in full:
        builder.add_leaves(spec, indices)
    for group in groups:
        builder.add_block(group, specs, addresses)
    return builder.finish(empty, sum(spec is not None for spec in specs))


def _separate(specs: Sequence[Spec | None], addresses: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Split leaves into those with memory of their own and groups whose memory overlaps."""
    alone: list[int] = []
    sharing: dict[torch.device | None, list[int]] = {}
    for index, spec in enumerate(specs):
        if spec is None:
            continue
        # A value that is not its memory is copied on its own; copy.deepcopy parts such views from their base too.
        if spec.extent == 0 or spec.by_value:
            alone.append(index)
        else:
            sharing.setdefault(spec.device, []).append(index)
    groups: list[list[int]] = []
    for indices in sharing.values():
        starts = np.array([addresses[index] for index in indices], dtype=np.int64)
        stops = starts + np.array([specs[index].nbytes for index in indices], dtype=np.int64)  # type: ignore[union-attr]
        order = np.argsort(starts, kind="stable")
        reach = np.maximum.accumulate(stops[order])
        begins = np.concatenate(([True], starts[order][1:] >= reach[:-1]))
        if begins.all():
            alone += indices
            continue
        bounds = [*np.flatnonzero(begins).tolist(), len(indices)]
        ordered = order.tolist()
        single: list[int] = []
        for first, last in zip(bounds, bounds[1:], strict=False):
            members = [indices[position] for position in ordered[first:last]]
            if len(members) == 1:
                single += members
            else:
                groups.append(members)
        alone += sorted(single)
    return alone, groups


class _Builder:
    """Collects runs and pieces into batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.offset = 0
        self._reset()

    def _reset(self) -> None:
        self.device: torch.device | None = None
        self.start = self.offset
        self.runs: list[Run] = []
        self.blocks: list[Block] = []
        self.whole: list[int] = []
        self.pieces: list[Piece] = []

    def cut(self) -> None:
        if self.runs or self.blocks or self.pieces:
            self.batches.append(
                Batch(
                    self.device,
                    self.start,
                    self.offset,
                    tuple(self.runs),
                    tuple(self.blocks),
                    self.whole,
                    tuple(self.pieces),
                )
            )
        self._reset()

    def room_for(self, device: torch.device | None, nbytes: int, leaves: int) -> None:
        """Cut the batch if what comes next does not belong in it."""
        full = self.offset + nbytes - self.start > BATCH_BYTES or len(self.whole) + leaves > BATCH_LEAVES
        if (self.runs or self.pieces or self.blocks) and (full or device != self.device):
            self.cut()
        self.device = device

    def add_leaves(self, spec: Spec, indices: list[int]) -> None:
        size = spec.staged_nbytes
        at_once = max(1, min(BATCH_LEAVES // 2, BATCH_BYTES // size))
        for first in range(0, len(indices), at_once):
            members = indices[first : first + at_once]
            self.room_for(spec.device, size * len(members), len(members))
            self.runs.append(Run(spec, members, self.offset))
            if spec.dense and size <= BATCH_BYTES:
                self.whole += members
                self.offset += size * len(members)
            else:
                for index in members:
                    self.add_range(spec, index, 0, spec.extent)

    def add_range(self, spec: Spec, index: int, start: int, length: int) -> None:
        """Add elements of a leaf as pieces, cut where a batch is full."""
        step = max(1, BATCH_BYTES // max(spec.dtype.itemsize, spec.target.itemsize))
        for first in range(start, start + length, step):
            count = min(step, start + length - first)
            self.room_for(spec.device, count * spec.target.itemsize, 1)
            self.pieces.append(Piece(index, first, count, self.offset))
            self.offset += count * spec.target.itemsize

    def add_block(self, members: list[int], specs: Sequence[Spec | None], addresses: Sequence[int]) -> None:
        first: Spec = specs[members[0]]  # type: ignore[assignment]
        shape = {(spec.dtype, spec.target) for spec in (specs[index] for index in members) if spec is not None}
        cast = [index for index in members if specs[index].target != specs[index].dtype]  # type: ignore[union-attr]
        if cast and len(shape) > 1:
            raise MixedCast(cast[0])
        base = min(addresses[index] for index in members)
        scale = first.target.itemsize, first.dtype.itemsize
        self.cut()
        self.device = first.device
        self.start = self.offset = _congruent(self.offset, 0 if cast else base)
        origin = self.offset
        offsets = [(addresses[index] - base) * scale[0] // scale[1] if cast else addresses[index] - base for index in members]
        covered = base
        # Members come in the order of their addresses, so each adds what reaches beyond those before it.
        for index in members:
            spec: Spec = specs[index]  # type: ignore[assignment]
            begin, end = addresses[index], addresses[index] + spec.nbytes
            if end > covered:
                skip = max(0, covered - begin) // spec.dtype.itemsize
                self.offset = origin + (begin - base + skip * spec.dtype.itemsize) * (scale[0] if cast else 1) // (
                    scale[1] if cast else 1
                )
                self.add_range(spec, index, skip, spec.extent - skip)
                covered = end
        block = Block(tuple(members), tuple(offsets), origin, self.offset - origin)
        self.blocks.append(block)
        self.cut()

    def finish(self, empty: tuple[Run, ...], leaves: int) -> Plan:
        self.cut()
        return Plan(self.offset, tuple(self.batches), empty, leaves)


def _congruent(offset: int, address: int) -> int:
    """Return the first offset from ``offset`` on that equals an address modulo the alignment of blocks."""
    return offset + (address - offset) % BLOCK_ALIGNMENT
