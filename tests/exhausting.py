"""Running work that yields between its steps to its end, where no event loop waits for turns."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def exhaust(work: Generator[None, None, T]) -> T:
    """Return what a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            result: T = stop.value
            return result
