"""Leaves that torch has to copy value by value: casts, gaps and orders of their own, subclasses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat

import torch

from aiostage import _private
from aiostage._capture.plan import RUN_LEAVES
from aiostage._copy.openmp import one_thread
from aiostage._copy.sources import Sources, detached_alias
from aiostage._device.bits import without_bits, writing_to

__all__ = ["Conversions", "copy_tensors"]

_PIECE_BYTES = 4 * 2**20
"""How much is copied in one call, each of which costs a little."""


class Conversions:
    """Tensors to be copied by torch.

    Args:
        sources: Says whether what is to be read is still there.
        staged: Where the staged copies of leaves are, once they are built.
    """

    __slots__ = ("_leaves", "_pairs", "_sources", "_staged")

    def __init__(self, sources: Sources, staged: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> None:
        self._sources = sources
        self._staged = staged
        self._leaves: list[tuple[int, torch.Tensor]] = []
        self._pairs: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    @property
    def ready(self) -> bool:
        """Whether no staged leaf is needed."""
        return not self._leaves

    def add(self, index: int, destination: torch.Tensor, alias: torch.Tensor) -> None:
        """Add a part of a leaf: tensors of one shape."""
        self._pairs.append((index, destination, alias))

    def add_leaves(self, aliases: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Add aliases of leaves, to be copied to the staged ones of the same numbers."""
        self._leaves += aliases

    def pieces(self) -> Iterator[None]:
        """Copy a piece before each yield, all of them in one thread. Blocks; the GIL is released meanwhile."""
        with one_thread():
            for destinations, sources in self._lots():
                copy_tensors(destinations, sources)
                yield

    def _lots(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Return what is to be copied together: large tensors in pieces, small ones as many as make one."""
        destinations: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        nbytes = 0
        for index, destination, source in self._cut():
            if not self._sources.is_there(index):
                continue
            destinations.append(destination)
            sources.append(source)
            nbytes += source.nbytes
            if nbytes >= _PIECE_BYTES or len(sources) >= RUN_LEAVES:
                yield destinations, sources
                destinations, sources, nbytes = [], [], 0
        if sources:
            yield destinations, sources

    def _cut(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        # Nor can torch make views of what is gone.
        for index, destination, source in self._pairs:
            if self._sources.is_there(index):
                yield from _cut(index, destination, source)
        for index, source in self._leaves:
            if not self._sources.is_there(index):
                continue
            # Tensors of two subclasses in one operation would be a matter between the two.
            destination = detached_alias(self._staged[index])
            if source.is_contiguous() and destination.is_contiguous():
                yield from _cut(index, destination.view(-1), source.view(-1))
            else:
                yield index, destination, source


def _cut(
    index: int, destination: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Cut tensors of one shape into pieces."""
    if source.nbytes <= _PIECE_BYTES:
        return iter(((index, destination, source),))
    at_once = max(1, _PIECE_BYTES * len(source) // source.nbytes)
    return zip(repeat(index), torch.split(destination, at_once), torch.split(source, at_once), strict=False)


def copy_tensors(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors in one fused operation; the GIL is released while it runs."""
    if not destinations:
        return
    with writing_to(destinations):
        pairs = list(map(without_bits, destinations, sources))
        plain, values = map(list, zip(*pairs, strict=True))
        _private.foreach_copy(plain, values)
