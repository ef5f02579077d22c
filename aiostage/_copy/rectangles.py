"""Ranges of a staged leaf's memory whose values lie in another order, or with gaps, in the source."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aiostage._capture.faithful import Spec

__all__ = ["pairs_of_values"]


def pairs_of_values(
    alias: torch.Tensor, spec: Spec, start: int, destination: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield destinations and sources of one shape that together are a part of a leaf.

    Args:
        alias: The leaf, of any strides.
        spec: Its own.
        start: The first element of the staged leaf's memory that belongs to the part.
        destination: One-dimensional, the part, of the staged dtype.
    """
    if spec.staged_stride == spec.stride:
        yield destination, alias.as_strided((len(destination),), (1,), alias.storage_offset() + start)
        return
    # With the dimensions in the order of the staged strides, which have no gaps, the part is a range of indices.
    order = sorted(range(alias.dim()), key=lambda dimension: -spec.staged_stride[dimension])
    position = 0
    for source in _rectangles(alias.permute(order), start, start + len(destination)):
        yield destination[position : position + source.numel()].view(source.shape), source
        position += source.numel()


def _rectangles(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Yield views that together have the elements of a tensor between two indices in row-major order."""
    if (start, stop) == (0, tensor.numel()):
        yield tensor
        return
    # Elements of one index of the first dimension. A range is the end of a row, whole rows, and the beginning of
    # another; the first and the last are cut in the same way, one dimension down.
    row = tensor.numel() // len(tensor)
    first, last = start // row, (stop - 1) // row
    if first == last:
        yield from _rectangles(tensor[first], start - first * row, stop - first * row)
        return
    if start % row:
        yield from _rectangles(tensor[first], start % row, row)
        first += 1
    if first < stop // row:
        yield tensor[first : stop // row]
    if stop % row:
        yield from _rectangles(tensor[stop // row], 0, stop % row)
