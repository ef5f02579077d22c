"""A container under way, and the paths of its children."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aiostage._capture.rebuild import Holes, Results, Step
from aiostage.leaf import Path

__all__ = ["HIDDEN", "STATE", "Finish", "Frame", "released"]

Finish = Callable[["Frame"], None]


class _Inside:
    """A step of a path that does not show."""

    __slots__ = ()


STATE = _Inside()
"""Leads to an object's state, whose keys are the object's attributes."""

HIDDEN = _Inside()
"""Leads to what only Python's copy protocol has a name for."""


class Frame:
    """One container under way: its children, their copies so far, and what to do when all are known."""

    __slots__ = (
        "copies",
        "finish",
        "first_leaf",
        "holes",
        "parent",
        "position",
        "program_start",
        "slot",
        "sources",
        "steps",
    )

    def __init__(
        self,
        parent: Frame | None,
        slot: int,
        sources: list[Any],
        steps: Sequence[object],
        finish: Finish,
        program_start: int,
    ) -> None:
        self.parent = parent
        self.slot = slot
        self.sources = sources
        self.steps = steps
        self.finish = finish
        self.program_start = program_start
        self.copies = list(sources)
        self.holes: Holes = []
        self.first_leaf: int | None = None
        self.position = 0

    def depends(self, program: Sequence[Step]) -> bool:
        """Return whether anything below is only made by the program."""
        return bool(self.holes) or self.first_leaf is not None or len(program) > self.program_start

    def spread(self) -> None:
        """Give up that all children are consecutive leaves."""
        if self.first_leaf is not None:
            self.holes += [(slot, self.first_leaf + slot) for slot in range(self.position)]
            self.first_leaf = None

    def filled(self, results: Results) -> list[Any]:
        """Return the copies of all children."""
        if self.first_leaf is not None:
            return results.staged[self.first_leaf : self.first_leaf + len(self.sources)]
        return results.fill(self.copies, self.holes)

    def incomplete(self) -> bool:
        """Return whether some child is only made by the program."""
        return bool(self.holes) or self.first_leaf is not None

    def path(self, slot: int) -> Path:
        """Return the path of a child."""
        steps: list[object] = []
        frame = self
        while True:
            step = frame.steps[slot]
            if not isinstance(step, _Inside):
                steps.append(step)
            if frame.parent is None:
                break
            frame, slot = frame.parent, frame.slot
        return tuple(reversed(steps))


def released(frame: Frame) -> None:
    """Stand where a frame's end was, once it can no longer come."""
