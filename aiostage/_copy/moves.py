"""Leaves whose bytes are their values, moved one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from itertools import repeat

from aiostage._copy.sources import Sources

__all__ = ["Moves"]

_PIECE_BYTES = 2 * 2**20
"""How much is moved in one call: 0.2 ms into warm memory, and up to 10 ms where a virtual machine has to ask its host
for every page."""


class Moves:
    """Bytes on their way from address to address.

    Args:
        sources: Keeps what is read alive. The caller that adds moves keeps their destinations alive.
    """

    __slots__ = ("_moves", "_sources")

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._moves: list[tuple[int, int, int, int]] = []

    def add(self, indices: Iterable[int], destinations: Iterable[int], begins: Iterable[int], nbytes: int) -> None:
        """Add stretches of one size, in bytes, by the leaves that they are of and the addresses where they begin."""
        self._moves += zip(indices, destinations, begins, repeat(nbytes), strict=False)

    def pieces(self) -> Iterator[None]:
        """Move a piece before each yield. Blocks, without the GIL."""
        for index, destination, source, nbytes in self._moves:
            for start in range(0, nbytes, _PIECE_BYTES):
                if not self._sources.is_there(index):
                    break
                ctypes.memmove(destination + start, source + start, min(_PIECE_BYTES, nbytes - start))
                yield
