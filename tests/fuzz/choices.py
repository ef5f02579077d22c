"""Random choices that can be replayed and made smaller."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = ["Choices", "shrink"]

T = TypeVar("T")


class Choices:
    """A stream of small numbers: random ones of a seed, or those of an earlier stream.

    Args:
        seed: Of random numbers.
        values: What an earlier stream has ``taken``, perhaps edited. Where it ends, zeros follow.
    """

    def __init__(self, seed: int = 0, values: Sequence[int] | None = None) -> None:
        self.taken: list[int] = []
        self._random = random.Random(seed)
        self._values = values

    def below(self, limit: int) -> int:
        """Return a number from 0 to ``limit - 1``; 0 is what shrinking strives for."""
        if self._values is None:
            value = self._random.randrange(limit)
        else:
            place = len(self.taken)
            value = self._values[place] if place < len(self._values) else 0
            value = value if value < limit else 0
        self.taken.append(value)
        return value

    def chance(self, one_in: int) -> bool:
        """Return True once in so many times."""
        return self.below(one_in) == one_in - 1

    def pick(self, options: Sequence[T]) -> T:
        """Return one of them."""
        return options[self.below(len(options))]


def shrink(values: Sequence[int], fails: Callable[[Sequence[int]], Any], seconds: float = 6.0) -> list[int]:
    """Return a shorter stream of choices that fails still.

    Args:
        values: Those of a stream that fails.
        fails: Says whether a stream does.
        seconds: How long to try.
    """
    best, end = list(values), time.monotonic() + seconds
    improved = True
    while improved and time.monotonic() < end:
        improved = False
        size = max(len(best) // 2, 1)
        while size:
            start = 0
            while start < len(best) and time.monotonic() < end:
                block = best[start : start + size]
                for tried in (
                    best[:start] + best[start + size :],
                    best[:start] + [0] * len(block) + best[start + size :],
                ):
                    if tried != best and fails(tried):
                        best, improved = tried, True
                        break
                else:
                    start += size
            size //= 2
    return best
