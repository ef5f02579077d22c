"""Where tensors lie in memory: how far their elements reach, and which of them overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["extent_of", "overlapping"]


def extent_of(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements lie between the first of a tensor and one past the last.

    Args:
        shape: The shape of the tensor.
        stride: The stride of the tensor, in elements.
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def overlapping(
    starts: Sequence[int] | npt.NDArray[np.int64], stops: Sequence[int] | npt.NDArray[np.int64]
) -> Iterator[list[int]]:
    """Yield which ranges of memory overlap, in groups of two and more.

    A range belongs to a group if it overlaps with one of it. The first group takes milliseconds for many ranges, most
    of them without the GIL.

    Args:
        starts: Addresses; 0 for ranges without bytes, which overlap with none.
        stops: One past the last address of each.

    Yields:
        The numbers of the ranges of one group, in the order of addresses. Each overlaps with one before it.
    """
    first, last = np.asarray(starts, np.int64), np.asarray(stops, np.int64)
    order = np.argsort(first, kind="stable")
    joined = first[order][1:] < np.maximum.accumulate(last[order])[:-1]
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], joined, [False]))))
    for begin, end in bounds.reshape(-1, 2).tolist():
        yield order[begin : end + 1].tolist()
