"""Leaves whose bytes are their values, moved one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from itertools import repeat

__all__ = ["Moves"]

_PIECE_BYTES = 2 * 2**20
"""How much is moved in one call: 0.2 ms into warm memory, and up to 10 ms where a virtual machine has to ask its host
for every page."""


class Moves:
    """Bytes on their way from address to address. Whoever adds them keeps both ends alive."""

    __slots__ = ("_moves",)

    def __init__(self) -> None:
        self._moves: list[tuple[int, int, int]] = []

    def add(self, destinations: Iterable[int], sources: Iterable[int], nbytes: int) -> None:
        """Add stretches of one size, in bytes, by the addresses where they begin."""
        self._moves += zip(destinations, sources, repeat(nbytes), strict=False)

    def pieces(self) -> Iterator[None]:
        """Move a piece before each yield. Blocks, without the GIL."""
        for destination, source, nbytes in self._moves:
            for start in range(0, nbytes, _PIECE_BYTES):
                ctypes.memmove(destination + start, source + start, min(_PIECE_BYTES, nbytes - start))
                yield
