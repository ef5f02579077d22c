"""The names of a run's checkpoints, and of what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

__all__ = [
    "lock_of",
    "locked_by",
    "name_of",
    "present",
    "removed_by_tombstone",
    "sort_out",
    "step_of",
    "surplus",
    "tombstone_of",
]

_NAME = re.compile(r"step-(\d{8,})")
_TOMBSTONE = ".removed"
_LOCK = ".pinned"


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint; names sort as their steps do up to 99,999,999."""
    return f"step-{step:08}"


def tombstone_of(name: str) -> str:
    """Return what lies beside a checkpoint that was removed and of which others still need parts."""
    return name + _TOMBSTONE


def removed_by_tombstone(name: str) -> str | None:
    """Return the checkpoint that a tombstone lies beside, or None if it is no tombstone."""
    removed = name.removesuffix(_TOMBSTONE)
    return removed if removed != name and step_of(removed) is not None else None


def lock_of(name: str) -> str:
    """Return what lies beside a checkpoint, as a pending checkpoint, while a save writes another that refers to it."""
    return name + _LOCK


def locked_by(pending: Iterable[str]) -> set[str]:
    """Return the checkpoints that a save is about to refer to.

    Args:
        pending: The names of all pending checkpoints of a storage.
    """
    return {name.removesuffix(_LOCK) for name in pending if name.endswith(_LOCK)}


def present(names: Iterable[str]) -> set[str]:
    """Return those of a run's checkpoints that were not removed.

    Args:
        names: All that a storage lists of the run.
    """
    names = set(names)
    return {name for name in names if step_of(name) is not None and tombstone_of(name) not in names}


def sort_out(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tell the checkpoints that are there from those that were removed and of which others still need parts.

    Args:
        names: What a storage lists, of one run or of several below it.

    Returns:
        The names of both, in order. Tombstones are neither.
    """
    names = set(names)
    tombstones = {name for name in names if removed_by_tombstone(name.rpartition("/")[2]) is not None}
    removed = {name for name in names if tombstone_of(name) in tombstones}
    return sorted(names - removed - tombstones), sorted(removed)


def step_of(name: str) -> int | None:
    """Return the step that a checkpoint is of, or None if it is not one of a run's."""
    match = _NAME.fullmatch(name)
    # Only the name that would be written: with leading zeros too many, two names would be one step.
    return int(match[1]) if match and name == name_of(int(match[1])) else None


def surplus(
    steps: Iterable[int], *, keep: int | None, keep_also: Callable[[int], bool] | None, newest: int | None
) -> list[int]:
    """Return the steps whose checkpoints are to be removed, oldest first.

    Args:
        steps: All that there are, in any order.
        keep: How many of the last to keep; None keeps all.
        keep_also: Says of a step whether to keep it whatever its age.
        newest: The one that was saved last. It stays also if there are later steps, as after going back to an earlier
            one.
    """
    if keep is None:
        return []
    older = sorted(steps)[:-keep]
    return [step for step in older if step != newest and not (keep_also is not None and keep_also(step))]
