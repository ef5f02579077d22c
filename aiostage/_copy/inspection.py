"""What a state dict consists of, found out in steps, and what of it has changed since."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch

from aiostage._capture.faithful import Spec
from aiostage._capture.leaves import Inspection, Leaves, changed
from aiostage._capture.plan import Batch, MixedCast, Plan
from aiostage._capture.walk import Walk
from aiostage._copy.resources import Phase, Resources, Timings
from aiostage.errors import UnsupportedLeafError, shown
from aiostage.leaf import Path, format_path

__all__ = ["SourceInspection", "within"]


class Changes:
    """The changes that make a capture torn.

    Before later work is ordered behind the copies of some leaves, these are compared: what was changed until then is
    torn, and what is changed afterwards is that work, which the copies do not see.

    Args:
        walk: Which met the leaves and containers.
        inspection: Of the leaves.
    """

    def __init__(self, walk: Walk, inspection: Inspection) -> None:
        self._walk = walk
        self._inspection = inspection
        self._torn: dict[Path, None] = {}
        self._settled: set[int] = set()
        self._over = False

    @property
    def paths(self) -> Collection[Path]:
        """Where the changes found so far are."""
        return self._torn.keys()

    def compare(self, leaves: Collection[int] | None = None) -> Generator[None, None, None]:
        """Look for changes, for the last time where it looks, yielding between small steps.

        Args:
            leaves: Where to look, by their numbers; None for all of them and for the containers.
        """
        if self._over:
            return
        for index in (yield from changed(self._walk.leaves, self._inspection)):
            if index not in self._settled and (leaves is None or index in leaves):
                self._torn[self._walk.path(index)] = None
        if leaves is not None:
            self._settled.update(leaves)
            return
        self._torn |= dict.fromkeys((yield from self._walk.changes.changed()))
        self._over = True


class SourceInspection:
    """Inspects one state dict: the walk over it, its leaves, and where they are to go.

    Args:
        resources: Of the stager.
        timings: Where to note what it takes.

    Attributes:
        walk: Over the containers.
        specs: What each leaf is to become; None for one that others are put together to.
        changes: What is noticed to have changed since.
    """

    def __init__(self, resources: Resources, timings: Timings) -> None:
        self._resources = resources
        self._options = resources.options
        self._timings = timings
        self.walk = Walk(passthrough=resources.options.passthrough)
        self.specs: list[Spec | None] = []
        self.changes = Changes(self.walk, resources.inspection)

    @property
    def leaves(self) -> Leaves:
        """What the walk has found."""
        return self.walk.leaves

    @property
    def whole_leaves(self) -> int:
        """How many leaves the tree has; a tensor that is reached by several paths counts once."""
        return len(self.leaves) - len(self.leaves.owners)

    def whole(self, indices: Iterable[int]) -> Iterator[int]:
        """Return those that are leaves of the tree, and not only parts of one."""
        return (index for index in indices if index not in self.leaves.owners)

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
        with Phase(self._timings, "walk"):
            yield from walk.run(source, inspection)
        with Phase(self._timings, "inspect"):
            yield from walk.inspect(inspection)
            # Everything else has been noted: now comes the moment of the copy.
            yield from walk.settle(inspection)
            self.specs = walk.leaves.specs
            if self._options.dtype is not None:
                self.specs = yield from self._cast()

    def plan(self) -> Generator[None, None, Plan]:
        """Return where the leaves are to go.

        Raises:
            UnsupportedLeafError: If a leaf cannot be cast apart from what it shares memory with.
        """
        with Phase(self._timings, "plan"):
            try:
                return (yield from self._resources.plan(self.specs, self.leaves.addresses))
            except MixedCast as mixed:
                raise UnsupportedLeafError(
                    "it is to be cast, but shares memory with a leaf of another dtype.",
                    path=format_path(self.walk.path(mixed.index)),
                    remedy="Leave one of the two out, or return None for it from the dtype function.",
                ) from None

    def _cast(self) -> Generator[None, None, list[Spec | None]]:
        """Return the specs with the dtypes that the options ask for."""
        rule, table = self._options.dtype, self._resources.inspection.table
        specs: list[Spec | None] = []
        for index, spec in enumerate(self.leaves.specs):
            if spec is not None and spec.dtype.is_floating_point:
                target = rule if isinstance(rule, torch.dtype) else None
                if target is None and callable(rule):
                    path = self.walk.path(index)
                    target = rule(path, self.leaves.tensors[index])
                    _check_target(target, path)
                if target is not None and target is not spec.dtype:
                    spec = table.cast(spec, target)
            specs.append(spec)
            if index % 64 == 0:
                yield
        return specs


def within(
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
        for index in batch.lands:
            path = walk.path(index)
            heads = {path[:length] for length in lengths if length <= len(path)}
            if not heads.isdisjoint(parts):
                missing -= heads
                leaves.add(index)
                numbers.add(number)
            yield
    for number in tuple(numbers):
        while batches[number].continues:
            number -= 1
            numbers.add(number)
    if missing:
        raise KeyError(f"{format_path(min(missing, key=str))} leads to no tensor that is copied")
    return leaves, numbers


def _check_target(target: object, path: Path) -> None:
    if target is not None and not (isinstance(target, torch.dtype) and target.is_floating_point):
        raise TypeError(
            f"{format_path(path)}: the dtype function must return a floating-point torch.dtype or None, "
            f"not {target if isinstance(target, torch.dtype) else shown(target)}"
        )
