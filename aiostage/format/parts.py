"""Files as parts: which memory makes up which bytes of a file, and the digests that tell whether they are right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

from aiostage import _private
from aiostage._loop.workers import release_gil, releasing_gil
from aiostage.abc import Buffer

__all__ = [
    "DIGEST_NAME",
    "MAX_PART_BYTES",
    "PART_ALIGNMENT",
    "PART_BYTES",
    "Content",
    "Gap",
    "Part",
    "PartPiece",
    "Scattered",
    "cut",
    "digest",
    "digest_of_parts",
    "extent_of",
    "gather",
    "memory_of",
    "memory_range",
    "parts_in",
    "running_digest",
    "scatter",
    "single_piece",
]

DIGEST_NAME = "xxh3_64"
"""The fastest of the digests measured that detects more than one flipped bit: 34 GB/s on one core. It is not
cryptographic: it finds damage, and no changes that were made on purpose."""

PART_BYTES = 8 << 20
"""How much is written, read and checked at once. 8 MiB from two threads was as fast as larger parts, and a part
that fits caches is hashed and written while it is hot."""

PART_ALIGNMENT = 4096
"""Parts begin at multiples of this in memory and in files. It satisfies the direct I/O of every common device."""

MAX_PART_BYTES = 64 << 20
"""Larger parts are not read, so that a hostile manifest costs a bounded amount of memory."""

_GROUP = 256
"""Pieces in one fused copy. PyTorch holds the GIL while it takes the arguments apart. A guess."""


class _Memory:
    """Lends plain memory to NumPy, and keeps its owner alive as long as anything looks at it."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        self.owner = owner


def memory_of(address: int, nbytes: int, owner: object) -> torch.Tensor:
    """Return host memory as a one-dimensional uint8 tensor that keeps ``owner`` alive."""
    # Through NumPy, whose array interface takes an address. torch.frombuffer() takes only Python objects with a buffer.
    memory: np.ndarray[Any, Any] = np.asarray(_Memory(address, nbytes, owner))
    return torch.from_numpy(memory)


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes of a file that are read and checked, but have no destination.

    Attributes:
        nbytes: How many.
    """

    nbytes: int


@dataclass(frozen=True, slots=True)
class Scattered:
    """Elements of a tensor, in index order, that do not lie in memory like that.

    Attributes:
        tensor: A tensor of any strides.
        start: First element.
        stop: One past the last element.
    """

    tensor: torch.Tensor
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many bytes the elements are."""
        return (self.stop - self.start) * self.tensor.element_size()

    def blocks(self, memory: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over blocks of the tensor, each with where its elements are in one-dimensional uint8 memory.

        Args:
            memory: As large as the elements, aligned to one.
        """
        elements, position = memory.view(self.tensor.dtype), 0
        for run in _runs(self.tensor, self.start, self.stop):
            yield run, elements[position : position + run.numel()].view(run.shape)
            position += run.numel()

    def collect(self, destination: torch.Tensor) -> None:
        """Copy the elements to one-dimensional uint8 memory of their size, aligned to one element."""
        for block, elements in self.blocks(destination):
            elements.copy_(block)


def _runs(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Split elements, given by their places in index order, into as few blocks of whole rows as there can be."""
    if tensor.dim() == 1:
        yield tensor[start:stop]
        return
    # At most a row that begins in the middle, whole rows as one block, and a row that ends in the middle; of the first
    # and the last the same again, one dimension further in.
    inner = tensor.numel() // tensor.size(0)
    if start % inner:
        row = start // inner
        head = min(stop, (row + 1) * inner)
        yield from _runs(tensor[row], start - row * inner, head - row * inner)
        start = head
    first, last = start // inner, stop // inner
    if first < last:
        yield tensor[first:last]
        start = last * inner
    if start < stop:
        yield from _runs(tensor[last], 0, stop - start)


Content: TypeAlias = "torch.Tensor | Gap"
"""Consecutive bytes of a file: a tensor whose elements are written in index order, or a gap."""

PartPiece: TypeAlias = "torch.Tensor | Scattered | Gap"
"""Of a part: one-dimensional uint8 memory, scattered elements, or a gap."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a file.

    Attributes:
        index: Which one, from 0.
        offset: Where it starts in the file, a multiple of :data:`PART_BYTES`.
        nbytes: How long it is.
        pieces: One-dimensional uint8 tensors, scattered elements and gaps, in file order.
    """

    index: int
    offset: int
    nbytes: int
    pieces: list[PartPiece]


def cut(contents: Sequence[Content], part_bytes: int) -> list[Part]:
    """Cut the contents of a file into parts.

    Args:
        contents: The whole file in order. Tensors are of dtypes whose size divides their position in the file.
        part_bytes: How long each part but the last is.

    Returns:
        The parts in order; at least one, if only an empty one.
    """
    parts = [Part(0, 0, 0, [])]
    pieces: list[PartPiece] = parts[0].pieces
    position, space = 0, part_bytes
    for content in releasing_gil(contents):
        taken, nbytes = 0, content.nbytes
        while taken < nbytes:
            if not space:
                _close(parts, position)
                pieces = []
                parts.append(Part(len(parts), position, 0, pieces))
                space = part_bytes
                release_gil()
            step = min(space, nbytes - taken)
            pieces.append(_piece(content, taken, taken + step))
            taken, position, space = taken + step, position + step, space - step
    _close(parts, position)
    return parts


def _close(parts: list[Part], position: int) -> None:
    last = parts[-1]
    parts[-1] = Part(last.index, last.offset, position - last.offset, last.pieces)


def _piece(content: Content, start: int, stop: int) -> PartPiece:
    """Return the bytes of a content from ``start`` to ``stop``."""
    if isinstance(content, Gap):
        return Gap(stop - start)
    if not content.is_contiguous():
        size = content.element_size()
        return Scattered(content, start // size, stop // size)
    if content.dtype is not torch.uint8 or content.dim() != 1:
        content = content.view(-1).view(torch.uint8)
    return content if stop - start == content.numel() else content[start:stop]


def single_piece(part: Part) -> torch.Tensor | None:
    """Return the memory of a part that is one piece, or None."""
    if len(part.pieces) == 1 and isinstance(part.pieces[0], torch.Tensor):
        return part.pieces[0]
    return None


def memory_range(piece: PartPiece) -> tuple[int, int]:
    """Return where in memory a piece comes from: an address, and how many bytes from there on it may read."""
    if isinstance(piece, torch.Tensor):
        return piece.data_ptr(), piece.numel()
    if isinstance(piece, Scattered):
        tensor = piece.tensor
        return tensor.data_ptr(), extent_of(tensor.shape, tensor.stride()) * tensor.element_size()
    return 0, 0


def extent_of(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements lie between the first of a tensor and one past the last.

    Args:
        shape: The shape of the tensor.
        stride: The stride of the tensor, in elements.
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def gather(part: Part, buffer: torch.Tensor) -> None:
    """Copy the pieces of a part to the beginning of a buffer.

    Args:
        part: Without gaps.
        buffer: One-dimensional uint8, at least as long as the part.
    """
    # A tensor that was made in inference mode can be written to only in that mode, and the mode belongs to a thread.
    with torch.inference_mode(buffer.is_inference()):
        for pieces, places in _groups(part, buffer):
            sources, destinations = [], []
            for piece, place in zip(pieces, places, strict=True):
                if isinstance(piece, Scattered):
                    piece.collect(place)
                elif not isinstance(piece, Gap):
                    sources.append(piece)
                    destinations.append(place)
            if sources:
                _private.foreach_copy(destinations, sources)


def scatter(part: Part, buffer: torch.Tensor) -> None:
    """Copy the beginning of a buffer to the pieces of a part, leaving gaps out.

    Args:
        part: Without scattered elements.
        buffer: One-dimensional uint8, at least as long as the part.
    """
    for pieces, places in _groups(part, buffer):
        pairs = [(piece, place) for piece, place in zip(pieces, places, strict=True) if isinstance(piece, torch.Tensor)]
        if pairs:
            # As for the buffer in gather().
            with torch.inference_mode(any(piece.is_inference() for piece, _ in pairs)):
                _private.foreach_copy([piece for piece, _ in pairs], [place for _, place in pairs])


def _groups(part: Part, buffer: torch.Tensor) -> Iterator[tuple[list[PartPiece], Sequence[torch.Tensor]]]:
    """Iterate over small groups of pieces, with their places in a buffer."""
    position = 0
    for start in range(0, len(part.pieces), _GROUP):
        pieces = part.pieces[start : start + _GROUP]
        sizes = [piece.nbytes for piece in pieces]
        total = sum(sizes)
        yield pieces, torch.split(buffer.narrow(0, position, total), sizes)
        position += total


def digest(data: Buffer) -> str:
    """Return the digest of a buffer in hexadecimal. Releases the GIL while it computes."""
    return xxhash.xxh3_64_hexdigest(data)


def running_digest() -> xxhash.xxh3_64:
    """Return the digest of no bytes yet; ``update`` adds some, without the GIL, and ``hexdigest`` tells."""
    return xxhash.xxh3_64()


def digest_of_parts(digests: Sequence[str]) -> str:
    """Return one digest for a file from those of its parts: its only part's, or the digest of all in a row."""
    # A file of one part has the digest that other tools compute of it.
    if len(digests) == 1:
        return digests[0]
    return xxhash.xxh3_64_hexdigest(bytes.fromhex("".join(digests)))


def parts_in(nbytes: int, part_bytes: int) -> int:
    """Return how many parts a file of a size has."""
    return max(1, math.ceil(nbytes / part_bytes))
