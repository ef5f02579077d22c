"""Many small pieces of memory to one large one, in a few calls that need neither the GIL nor other threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Gather", "one_thread"]


_MOST_ELEMENTS = 2**62
"""Well below what torch counts elements with."""


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

    def __len__(self) -> int:
        return len(self._indices)

    def run(self, start: int, stop: int) -> None:
        """Write some of the rows. Blocks, without the GIL; the caller keeps what lies at the addresses alive."""
        torch.index_select(self._rows, 0, self._indices[start:stop], out=self._destination[start:stop])


class _Extent:
    """Describes a stretch of memory to NumPy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def _openmp() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Return how the number of threads is read and set that torch divides work among, if it uses OpenMP."""
    libraries = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # PyDLL: a call is far shorter than giving the GIL away and getting it back.
            library = ctypes.PyDLL(str(libraries / name))
            return library.omp_get_max_threads, library.omp_set_num_threads
        except (OSError, AttributeError):
            continue
    return None


_threads = _openmp()


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Keep torch from dividing what the calling thread does among threads of its own.

    There would be as many of them as cores, for each of several workers, and they go on spinning for a while in case
    there is more to do, on cores that the event loop and the training step want. ``torch.set_num_threads`` would
    apply to the whole process; this applies to the calling thread. Without OpenMP it does nothing.
    """
    if _threads is None:
        yield
        return
    read, write = _threads
    # On its first use in a thread torch sets what the process is set to.
    torch.get_num_threads()
    before = read()
    write(1)
    try:
        yield
    finally:
        write(before)
