"""Many small pieces of memory to one large one, in a few calls that need neither the GIL nor other threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from aiostage._copy.openmp import one_thread
from aiostage._copy.sources import Sources

__all__ = ["Gather", "Gathers"]

_PIECE_BYTES = 2 * 2**20
"""How much is gathered in one call."""

_MOST_ELEMENTS = 2**62
"""Well below what torch counts elements with."""


class Gathers:
    """Leaves that are small, many of one size together.

    Args:
        sources: Keeps them alive.
    """

    __slots__ = ("_gathers", "_sources")

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._gathers: list[tuple[Sequence[int], Gather]] = []

    def add(
        self, indices: Sequence[int], addresses: Sequence[int], nbytes: int, destination: np.ndarray[Any, Any]
    ) -> bool:
        """Add leaves, unless torch could not count what lies between them.

        Args:
            indices: Their numbers.
            addresses: Where they begin.
            nbytes: Size of each, in bytes, more than 0.
            destination: One-dimensional uint8 of ``len(addresses) * nbytes`` elements.

        Returns:
            Whether they were added.
        """
        gather = Gather.over(addresses, nbytes, destination)
        if gather is not None:
            self._gathers.append((indices, gather))
        return gather is not None

    def pieces(self) -> Iterator[None]:
        """Copy a piece before each yield, all of them in one thread. Blocks, without the GIL."""
        with one_thread():
            for indices, gather in self._gathers:
                at_once = max(1, _PIECE_BYTES // gather.nbytes)
                for start in range(0, len(gather), at_once):
                    there = self._sources.are_there(indices[start : start + at_once])
                    if there is None:
                        gather.run(start, start + at_once)
                    else:
                        for row in (number for number, is_there in enumerate(there, start) if is_there):
                            gather.run(row, row + 1)
                    yield


class Gather:
    """Rows of equal size, each anywhere in host memory, to be written one after another.

    To torch the memory from the first row to the last is one tensor whose rows overlap, one beginning wherever a row
    could; ``index_select`` then takes those that are wanted, and touches nothing else. What it needs is a list of
    numbers. Concatenation takes as many tensor objects apart, under the GIL, at three to four times the cost for rows
    of 1 KiB.

    Args:
        rows: All that a row could be, as one two-dimensional uint8 tensor.
        indices: Which of them.
        destination: Two-dimensional uint8, kept alive.
    """

    __slots__ = ("_destination", "_indices", "_rows")

    def __init__(self, rows: torch.Tensor, indices: torch.Tensor, destination: torch.Tensor) -> None:
        self._rows = rows
        self._indices = indices
        self._destination = destination

    @classmethod
    def over(cls, addresses: Sequence[int], nbytes: int, destination: np.ndarray[Any, Any]) -> Gather | None:
        """Return how to gather rows, or None if they are too large for how far apart they are.

        Args:
            addresses: Where the rows begin.
            nbytes: Size of each row, in bytes, more than 0.
            destination: One-dimensional uint8 of ``len(addresses) * nbytes`` elements.
        """
        indices = np.array(addresses, dtype=np.int64)
        first, last = int(indices.min()), int(indices.max())
        indices -= first
        # The largest power of two that divides all: the allocator's alignment, as a rule.
        bits = int(np.bitwise_or.reduce(indices))
        step = bits & -bits or 1
        indices //= step
        count = (last - first) // step + 1
        if count * nbytes > _MOST_ELEMENTS:
            return None
        extent = torch.from_numpy(np.asarray(_Extent(first, last - first + nbytes)))
        rows = extent.as_strided((count, nbytes), (step, 1))
        return cls(rows, torch.from_numpy(indices), torch.from_numpy(destination).view(-1, nbytes))

    @property
    def nbytes(self) -> int:
        """Size of a row, in bytes."""
        return self._destination.shape[1]

    def __len__(self) -> int:
        return len(self._indices)

    def run(self, start: int, stop: int) -> None:
        """Write some of the rows. Blocks, without the GIL; the caller keeps what lies at the addresses alive."""
        torch.index_select(self._rows, 0, self._indices[start:stop], out=self._destination[start:stop])


class _Extent:
    """Describes a stretch of memory to NumPy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
