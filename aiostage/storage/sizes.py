"""Shapes that a file describes: how many elements they have, without numbers that grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiostage.errors import shown

__all__ = ["MAX_RANK", "checked_sizes", "elements_in"]

MAX_RANK = 1024
"""Dimensions of a tensor. PyTorch computes with 64 at the most."""

_MAX_SIZE = 1 << 62


def checked_sizes(values: Any) -> tuple[int, ...]:
    """Return sizes, strides or offsets of a tensor as a file spells them.

    Raises:
        ValueError: If they are not a list of whole numbers from 0, or are too many or too large.
    """
    if type(values) not in (list, tuple) or len(values) > MAX_RANK:
        raise ValueError(f"{shown(values)} are no sizes")
    if not all(type(value) is int and 0 <= value < _MAX_SIZE for value in values):
        raise ValueError(f"{shown(values)} are no sizes")
    return tuple(values)


def elements_in(shape: Iterable[int]) -> int:
    """Return how many elements a shape has.

    Raises:
        ValueError: If they are more than any memory holds.
    """
    count = 1
    for size in shape:
        # A size of 0 may come last, after a product that is too large.
        count = min(count * size, _MAX_SIZE)
    if count == _MAX_SIZE:
        raise ValueError("a shape has more elements than any memory holds")
    return count
