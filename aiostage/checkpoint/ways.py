"""The ways to places in a tree, while it is walked."""

from __future__ import annotations

from typing import TypeAlias

from aiostage.leaf import Path

__all__ = ["Place", "path_to"]

Place: TypeAlias = "tuple[object, Place] | None"
"""The way to a place, last step first: siblings share what leads to them, and few are ever asked for their path."""


def path_to(place: Place) -> Path:
    """Return the way to a place as a path."""
    steps = []
    while place is not None:
        step, place = place
        steps.append(step)
    return tuple(reversed(steps))
