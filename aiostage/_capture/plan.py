"""Where everything goes: a pure function from the specs and addresses of leaves to the layout of an arena."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby, repeat
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from aiostage import _private
from aiostage._capture.faithful import Spec

__all__ = [
    "BATCH_BYTES",
    "BATCH_LEAVES",
    "SMALL_BYTES",
    "Batch",
    "LeafRange",
    "LeafRun",
    "MixedCast",
    "OverlapGroup",
    "Plan",
    "PlanCache",
    "compile_plan",
    "overlapping",
]

BATCH_BYTES = 32 * 2**20
"""How much one copy moves at most. Measured: at 18 GB/s this is 2 ms, long enough that the hand-over to a thread does
not show and short enough that a cancellation is answered soon."""

BATCH_LEAVES = 2048
"""How many leaves one batch has at most. Every batch costs a worker thread two turns with the GIL, each of which the
event loop's thread has to give up first, so small leaves go in large batches; making one ready takes the loop some 0.1
microseconds a leaf in one piece."""

SMALL_BYTES = 64 * 1024
"""Up to this size leaves on a device are gathered there first, and copied before all others. A copy of its own costs
about as much as moving this many bytes at 10 GB/s does, and copies of pieces below some 28 KiB were reported to
collapse altogether. What forward changes, statistics and counters, is small too."""

RUN_LEAVES = 256
"""How many leaves are built, and copied by one operation, at most: either takes about a quarter of a millisecond, and
copying holds the GIL for the part of it that parses arguments."""

LOOKED_AT = 1024
"""Leaves handled between two yields."""

BLOCK_ALIGNMENT = 64
"""Blocks keep their address modulo this, so that each leaf in them stays aligned for its dtype."""


_COMPARED_AT_ONCE = 8192
"""Entries of two lists, at some 10 nanoseconds each."""


Steps: TypeAlias = Generator[None, None, None]

Group: TypeAlias = tuple[int, list[int]]
"""Where leaves that overlap begin in the source, and which they are."""


class MixedCast(Exception):
    """A leaf to be cast shares memory with one of another dtype."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


@dataclass(frozen=True, slots=True)
class LeafRun:
    """Leaves of one spec in consecutive slots.

    Attributes:
        spec: The spec of each leaf.
        indices: Which leaves.
        offset: The offset of the first slot in the arena, in bytes.
    """

    spec: Spec
    indices: Sequence[int]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of all slots."""
        return self.spec.staged_nbytes * len(self.indices)

    @property
    def is_whole(self) -> bool:
        """Whether the leaves are copied as they are, and not as pieces."""
        return self.spec.dense and self.spec.staged_nbytes <= BATCH_BYTES


@dataclass(frozen=True, slots=True)
class LeafRange:
    """A range of a leaf's memory, counted in elements from its first one, and where in the arena it goes."""

    index: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class OverlapGroup:
    """Leaves that share memory, staged as the one range that they cover together.

    Attributes:
        indices: Which leaves.
        offsets: The offset of each leaf in the group, in bytes.
        offset: The offset of the group in the arena, in bytes.
        nbytes: The size in bytes of the group.
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
        overlap_groups: Groups of leaves with overlapping memory that are built here.
        whole: Leaves copied as they are, from the source tensor to the staged one.
        pieces: Ranges of elements of leaves, copied as flat memory.
        completes: Leaves that are complete once this batch has been copied, and those before it that it continues.
        continues: Whether it goes on with leaves that the batch before it has begun.
    """

    device: torch.device | None
    start: int
    stop: int
    runs: tuple[LeafRun, ...]
    overlap_groups: tuple[OverlapGroup, ...]
    whole: Sequence[int]
    pieces: tuple[LeafRange, ...]
    completes: Sequence[int]
    continues: bool

    def moved(self, distance: int) -> Batch:
        """Return the same batch for memory in which everything lies ``distance`` bytes further on."""
        return replace(
            self,
            start=self.start + distance,
            stop=self.stop + distance,
            runs=tuple(replace(run, offset=run.offset + distance) for run in self.runs),
            overlap_groups=tuple(replace(group, offset=group.offset + distance) for group in self.overlap_groups),
            pieces=tuple(replace(piece, offset=piece.offset + distance) for piece in self.pieces),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The layout of one structure, valid for the specs and addresses that it was compiled from.

    Attributes:
        nbytes: Size of the arena that it needs.
        batches: In the order of the arena.
        order: Their numbers in the order in which they are to be copied: host memory, then what is small on devices,
            which is soon done and what forward changes, then the rest as it stands in the tree.
        empty: Runs of leaves without elements.
    """

    nbytes: int
    batches: tuple[Batch, ...]
    order: tuple[int, ...]
    empty: tuple[LeafRun, ...]


def compile_plan(specs: Sequence[Spec | None], addresses: Sequence[int]) -> Generator[None, None, Plan]:
    """Lay out an arena, yielding between small steps.

    Leaves that share memory with no other get slots of their own, leaves of one spec side by side, larger dtypes first
    so that no slot needs padding, and on devices the small ones of each dtype in batches of their own. Leaves whose
    memory overlaps come after those of their size, as groups. This is also the order of a file without gaps.

    Args:
        specs: One for each leaf; None for a leaf without memory of its own.
        addresses: The address of the first element of each leaf.

    Returns:
        The plan.

    Raises:
        MixedCast: If a leaf to be cast shares memory with one of another dtype.
    """
    by_spec: dict[Spec, list[int]] = {}
    builder = _Builder(specs, addresses)
    alone, groups = yield from _separate(specs, addresses)
    for start in range(0, len(alone), LOOKED_AT):
        # Neighbours are often alike: one step of Python for all of them.
        for _, alike in groupby(alone[start : start + LOOKED_AT], key=specs.__getitem__):
            members = list(alike)
            by_spec.setdefault(builder.spec(members[0]), []).extend(members)
        yield
    empty = tuple(LeafRun(spec, indices, 0) for spec, indices in by_spec.items() if spec.extent == 0)
    full = [(spec, indices) for spec, indices in by_spec.items() if spec.extent]
    # Stable, so that specs of one device and size stay in the order in which the tree has them: the same tree gives the
    # same layout.
    full.sort(key=lambda entry: (str(entry[0].device or ""), not _is_small(entry[0])))
    sizes: list[int] = []
    for number, (_, members) in enumerate(groups):
        size = 0
        for start in range(0, len(members), LOOKED_AT):
            size = max(size, *(builder.spec(index).target.itemsize for index in members[start : start + LOOKED_AT]))
            if start or number % LOOKED_AT == 0:
                yield
        sizes.append(size)
    # Larger elements first: each run then begins at a multiple of its own element size, as every larger size is a
    # multiple of it.
    for itemsize in sorted({*sizes, *(spec.target.itemsize for spec, _ in full)}, reverse=True):
        for spec, indices in full:
            # For each size once through all specs; there are five sizes at most.
            if spec.target.itemsize == itemsize:
                yield from builder.add_leaves(spec, indices)
        for (base, members), size in zip(groups, sizes, strict=True):
            if size == itemsize:
                yield from builder.add_block(base, members)
    builder.cut()
    return Plan(builder.offset, tuple(builder.batches), builder.order(), empty)


class PlanCache:
    """The last plan, for a state dict that is staged again.

    Attributes:
        compiled: How many plans were compiled.
        replayed: How many were recognized as the last one.
    """

    def __init__(self) -> None:
        self.compiled = 0
        self.replayed = 0
        self._known: tuple[list[Spec | None], list[int], Plan] | None = None

    def replay(self, specs: Sequence[Spec | None], addresses: Sequence[int]) -> Generator[None, None, Plan | None]:
        """Return the last plan if it is for the same specs and addresses, or None.

        Args:
            specs: What each leaf is to become.
            addresses: Where the leaves begin.
        """
        known = self._known
        if known is not None and (yield from _same(known[0], specs)) and (yield from _same(known[1], addresses)):
            self.replayed += 1
            return known[2]
        return None

    def keep(self, specs: list[Spec | None], addresses: list[int], plan: Plan) -> None:
        """Keep a plan that was compiled, and the lists that it was compiled for."""
        self.compiled += 1
        # Replaced as a whole, because stagings in other event loops may be comparing with the last one.
        self._known = (specs, addresses, plan)


def _same(before: Sequence[object], now: Sequence[object]) -> Generator[None, None, bool]:
    """Compare two lists, yielding between parts."""
    if len(before) != len(now):
        return False
    for start in range(0, len(now), _COMPARED_AT_ONCE):
        part = slice(start, start + _COMPARED_AT_ONCE)
        if before[part] != now[part]:
            return False
        yield
    return True


def _separate(
    specs: Sequence[Spec | None], addresses: Sequence[int]
) -> Generator[None, None, tuple[list[int], list[Group]]]:
    """Split leaves into those with memory of their own and groups whose memory overlaps."""
    alone: list[int] = []
    sharing: dict[torch.device | None, tuple[list[int], list[int]]] = {}
    for start in range(0, len(specs), LOOKED_AT):
        for spec, alike in groupby(range(start, min(start + LOOKED_AT, len(specs))), key=specs.__getitem__):
            if spec is None:
                continue
            # A value that is not its memory is copied by itself; copy.deepcopy parts such views from their base too.
            if spec.extent == 0 or spec.by_value:
                alone += alike
            else:
                indices, sizes = sharing.setdefault(spec.device, ([], []))
                indices += alike
                sizes += repeat(spec.nbytes, len(indices) - len(sizes))
        yield
    groups: list[Group] = []
    for indices, sizes in sharing.values():
        parts = []
        for first in range(0, len(indices), LOOKED_AT):
            part = slice(first, first + LOOKED_AT)
            parts.append(np.array([list(map(addresses.__getitem__, indices[part])), sizes[part]]))
            yield
        starts, extents = np.concatenate(parts, axis=1)
        yield
        grouped: list[int] = []
        for number, positions in enumerate(overlapping(starts, starts + extents)):
            if number % LOOKED_AT == 0 or len(positions) > LOOKED_AT:
                yield
            members = [indices[position] for position in positions]
            base = yield from _base_of(members, specs, addresses)
            if base is not None:
                groups.append((base, members))
                grouped += positions
        if not grouped:
            alone += indices
            continue
        single = np.ones(len(indices), np.bool_)
        for first in range(0, len(grouped), LOOKED_AT):
            single[grouped[first : first + LOOKED_AT]] = False
            yield
        for first in range(0, len(indices), LOOKED_AT):
            part = slice(first, first + LOOKED_AT)
            alone += compress(indices[part], single[part])
            yield
    return alone, groups


def overlapping(
    starts: Sequence[int] | npt.NDArray[np.int64], stops: Sequence[int] | npt.NDArray[np.int64]
) -> Iterator[list[int]]:
    """Yield which ranges of memory overlap, in groups of two and more.

    A range belongs to a group if it overlaps with one of it. The first group takes milliseconds for many ranges, most
    of them without the GIL.

    Args:
        starts: Addresses; 0 for ranges without bytes, which overlap with none.
        stops: One past the last address of each.

    Yields:
        The numbers of the ranges of one group, in the order of addresses. Each overlaps with one before it.
    """
    first, last = np.asarray(starts, np.int64), np.asarray(stops, np.int64)
    order = np.argsort(first, kind="stable")
    joined = first[order][1:] < np.maximum.accumulate(last[order])[:-1]
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], joined, [False]))))
    for begin, end in bounds.reshape(-1, 2).tolist():
        yield order[begin : end + 1].tolist()


def _base_of(
    members: Sequence[int], specs: Sequence[Spec | None], addresses: Sequence[int]
) -> Generator[None, None, int | None]:
    """Return where the group of overlapping leaves begins in the source, or None if they cannot be one block.

    A view of another dtype may begin before the others, within one of their elements: then the group begins with that
    element, so that all leaves begin at whole elements of it. The bytes before the first leaf belong to no leaf. Views
    of one storage always fit so, wherever the storage begins. Memory that two storages describe differently
    (overlapping NumPy arrays) may not, and is copied once for each.
    """
    # By the size of their elements, where a leaf begins. Elements of a storage begin at multiples of their size from
    # where it begins, which torch.frombuffer() lets be any address.
    places: dict[int, int] = {}
    for start in range(0, len(members), LOOKED_AT):
        for index in members[start : start + LOOKED_AT]:
            if spec := specs[index]:
                places[spec.dtype.itemsize] = addresses[index]
        yield
    first, widest = addresses[members[0]], max(places)
    # Members come sorted by address, so the first begins the group.
    base = first - (first - places[widest]) % widest
    for start in range(0, len(members), LOOKED_AT):
        for index in members[start : start + LOOKED_AT]:
            spec = specs[index]
            if spec is None or (addresses[index] - base) % spec.dtype.itemsize:
                return None
        yield
    return base


class _Builder:
    """Collects runs, overlap groups and pieces into batches."""

    def __init__(self, specs: Sequence[Spec | None], addresses: Sequence[int]) -> None:
        self.specs = specs
        self.addresses = addresses
        self.batches: list[Batch] = []
        self.offset = 0
        self.aligned = True
        """Whether the next leaf may follow at once; not so behind a group, which may end anywhere."""
        self.inside = False
        """Whether a batch that ends now leaves something to the next that has to be copied after it."""
        self._continues = False
        self._ranks: list[tuple[bool, bool, int]] = []
        self._reset()

    def _reset(self) -> None:
        self.device: torch.device | None = None
        self.small = False
        self.start = self.offset
        self.first: int | None = None
        self.runs: list[LeafRun] = []
        self.overlap_groups: list[OverlapGroup] = []
        self.whole: list[int] = []
        self.pieces: list[LeafRange] = []
        self.completes: list[int] = []

    def spec(self, index: int) -> Spec:
        """Return the spec of a leaf that has memory."""
        spec = self.specs[index]
        assert spec is not None  # noqa: S101 - leaves without a spec are sorted out before
        return spec

    def cut(self) -> None:
        """End the batch under way."""
        if self.runs or self.overlap_groups or self.pieces:
            runs, groups, pieces = tuple(self.runs), tuple(self.overlap_groups), tuple(self.pieces)
            batch = Batch(
                self.device, self.start, self.offset, runs, groups, self.whole, pieces, self.completes, self._continues
            )
            self.batches.append(batch)
            # False sorts before True: host memory first, then what is small on devices.
            rank = (self.device is not None, not self.small, self.first or 0)
            # A batch that continues a leaf has the rank of the one before it, and the sort is stable: it is copied
            # right behind that.
            self._ranks.append(self._ranks[-1] if batch.continues else rank)
            self._continues = self.inside
        self._reset()

    def order(self) -> tuple[int, ...]:
        """Return the order in which the batches are to be copied; those that continue another stay behind it."""
        return tuple(sorted(range(len(self.batches)), key=self._ranks.__getitem__))

    def end_batch_if_full(
        self, device: torch.device | None, nbytes: int, leaves: int, first: int, *, small: bool
    ) -> None:
        """End the batch under way if what comes next, of which ``first`` is the first leaf, does not belong in it."""
        # Also by number: a batch of very many tiny leaves would be one long step of a thread.
        full = self.offset + nbytes - self.start > BATCH_BYTES or len(self.whole) + leaves > BATCH_LEAVES
        if full or device != self.device or small != self.small:
            self.cut()
        self.device = device
        self.small = small
        if self.first is None:
            self.first = first

    def add_leaves(self, spec: Spec, indices: list[int]) -> Steps:
        """Give leaves of one spec consecutive slots."""
        if not self.aligned:
            self.offset = self.start = _congruent(self.offset, 0)
            self.aligned = True
        size = spec.staged_nbytes
        # Within a device sizes only fall, so a run ends where the next may begin.
        padding = -self.offset % spec.target.itemsize
        if padding:
            # Another device begins, and with it the largest elements.
            self.cut()
            self.start = self.offset = self.offset + padding
        # A run never exceeds a batch; a leaf that does is cut by add_range().
        at_once = max(1, min(RUN_LEAVES, BATCH_BYTES // size))
        for first in range(0, len(indices), at_once):
            members = indices[first : first + at_once]
            _private.untrack_all((members,))
            self.end_batch_if_full(spec.device, size * len(members), len(members), members[0], small=_is_small(spec))
            run = LeafRun(spec, as_range(members), self.offset)
            self.runs.append(run)
            if run.is_whole:
                self.whole += members
                self.offset += size * len(members)
            else:
                for index in members:
                    self.add_range(spec, index, 0, spec.extent, small=_is_small(spec))
            self.completes += members
            yield

    def add_range(self, spec: Spec, index: int, start: int, length: int, *, small: bool) -> None:
        """Add elements of a leaf as pieces, cut where a batch is full."""
        # In elements, by the larger of the two sizes: neither what is read nor what is written by one piece exceeds a
        # batch.
        step = max(1, BATCH_BYTES // max(spec.dtype.itemsize, spec.target.itemsize))
        inside = self.inside
        for first in range(start, start + length, step):
            count = min(step, start + length - first)
            self.end_batch_if_full(spec.device, count * spec.target.itemsize, 1, index, small=small)
            self.pieces.append(LeafRange(index, first, count, self.offset))
            self.offset += count * spec.target.itemsize
            self.inside = True
        self.inside = inside

    def add_block(self, base: int, members: list[int]) -> Steps:
        """Place leaves that overlap.

        Args:
            base: Where their group begins in the source.
            members: In the order of their addresses.
        """
        first = self.spec(members[0])
        casts: list[int] = []
        mixed = False
        reach = 0
        for start in range(0, len(members), LOOKED_AT):
            for index in members[start : start + LOOKED_AT]:
                spec = self.spec(index)
                if spec.target is not spec.dtype:
                    casts.append(index)
                mixed = mixed or (spec.dtype, spec.target) != (first.dtype, first.target)
                reach = max(reach, self.addresses[index] + spec.nbytes)
            yield
        # Elements of two sizes over the same bytes: cast, they would lie at places that no view of one block can have.
        if casts and mixed:
            raise MixedCast(casts[0])
        # In bytes of the staged copy for each byte of the source: other than 1 only when the whole block is cast.
        numerator, denominator = first.target.itemsize, first.dtype.itemsize
        if not casts:
            numerator = denominator = 1
        self.cut()
        # As far from a boundary as in the source, so that views of wider elements stay aligned. Cast, the distances are
        # others, and it begins on one.
        origin = self.start = self.offset = _congruent(self.offset, 0 if casts else base)
        small = first.device is not None and reach - base <= SMALL_BYTES
        # Bytes of the source that are in a piece already. Members come by address, so each adds only what lies beyond.
        covered = base
        for index in members:
            spec, begin = self.spec(index), self.addresses[index]
            if begin + spec.nbytes > covered:
                # In whole elements: one that is half covered is copied again, to the same place with the same value.
                skip = max(0, covered - begin) // spec.dtype.itemsize
                self.offset = origin + (begin - base + skip * spec.dtype.itemsize) * numerator // denominator
                self.add_range(spec, index, skip, spec.extent - skip, small=small)
                self.inside = True
                # A batch that is cut from here on goes on in the next: the group is complete with its last piece only.
                covered = begin + spec.nbytes
            yield
        offsets: list[int] = []
        for start in range(0, len(members), LOOKED_AT):
            part = members[start : start + LOOKED_AT]
            offsets += [(self.addresses[index] - base) * numerator // denominator for index in part]
            yield
        self.overlap_groups.append(OverlapGroup(tuple(members), tuple(offsets), origin, self.offset - origin))
        self.completes += members
        self.inside = False
        self.cut()
        # A group may end anywhere; the next leaf begins at a boundary.
        self.aligned = False


def as_range(indices: list[int]) -> Sequence[int]:
    """Return the indices as a range if each of them follows the one before it, else as they are.

    Looks at every index: their ends say nothing about what lies between, as leaves of a group come in the order of
    their addresses and leaves of one spec may have others between them.
    """
    span = range(indices[0], indices[0] + len(indices))
    return span if indices == list(span) else indices


def _is_small(spec: Spec) -> bool:
    """Return whether a leaf is copied from its device together with others, and before larger ones."""
    return spec.device is not None and max(spec.nbytes, spec.staged_nbytes) <= SMALL_BYTES


def _congruent(offset: int, address: int) -> int:
    """Return the first offset from ``offset`` on that equals an address modulo the alignment of groups."""
    return offset + (address - offset) % BLOCK_ALIGNMENT
