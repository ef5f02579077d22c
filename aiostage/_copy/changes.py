"""What was changed on the way to capture, and what no longer counts because it is ordered behind the copies."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence

from aiostage._capture.leaves import Inspection, changed
from aiostage._capture.plan import Batch
from aiostage._capture.walk import Walk
from aiostage.leaf import Path, format_path

__all__ = ["Changes", "within"]


class Changes:
    """The changes that make a capture torn.

    Whoever orders later work behind the copies of some leaves has them compared first: what was changed until then is
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
