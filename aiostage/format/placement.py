"""Where the bytes of a checkpoint's files lie, when they lie in pieces and not all of them in the checkpoint itself."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from aiostage.abc import Buffer

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_DIGEST_NAME",
    "Extent",
    "PlacedFile",
    "Placement",
    "SourceFile",
    "append",
    "block_digests",
]

BLOCK_BYTES = 1 << 20
"""What is compared and referred to as a whole. Smaller ones find more that has not changed and make manifests longer:
a terabyte has a million of these."""

BLOCK_DIGEST_NAME = "xxh3_128"
"""Equal digests, and equal lengths, are taken for equal bytes. By chance that fails once in 2 to the power of 128
comparisons; XXH3 does not protect against two blocks that were made to have one digest."""

SourceFile: TypeAlias = "tuple[str | None, str]"
"""A file that bytes lie in: the name of its checkpoint, or None for the one that refers to it; and its own name."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of a file, and where it lies.

    Attributes:
        source: Name of the checkpoint that has it, or None for the one that the piece belongs to.
        file: Name of a file in there.
        offset: The offset of the first byte in it.
        nbytes: How many.
    """

    source: str | None
    file: str
    offset: int
    nbytes: int

    @property
    def place(self) -> SourceFile:
        """The file that has it."""
        return self.source, self.file


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """Where one file lies.

    Attributes:
        nbytes: How long it is.
        blocks: Digests of its blocks of :data:`BLOCK_BYTES`, in hexadecimal.
        pieces: In order, without gaps; where one ends and the next begins need not be the end of a block.
        starts: Where each piece starts in the file.
    """

    nbytes: int
    blocks: Sequence[str]
    pieces: Sequence[Extent]
    starts: Sequence[int]

    @classmethod
    def of(cls, blocks: Sequence[str], pieces: Sequence[Extent]) -> PlacedFile:
        """Return the file that is made of pieces."""
        starts, position = [], 0
        for piece in pieces:
            starts.append(position)
            position += piece.nbytes
        return cls(position, blocks, pieces, starts)

    def located(self, start: int, stop: int) -> Iterator[Extent]:
        """Iterate over where a range of the file lies."""
        # The last piece that starts at or before the range. Of pieces without bytes, several start at one place.
        index = bisect_right(self.starts, start) - 1
        while start < stop:
            piece = self.pieces[index]
            skipped = start - self.starts[index]
            nbytes = min(piece.nbytes - skipped, stop - start)
            if nbytes:
                yield Extent(piece.source, piece.file, piece.offset + skipped, nbytes)
            start += nbytes
            index += 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where all files of a checkpoint lie.

    Attributes:
        sizes: How long the files are that pieces lie in, referred to as a whole or not.
        files: By name.
    """

    sizes: Mapping[SourceFile, int]
    files: Mapping[str, PlacedFile]

    def needs(self) -> dict[str, frozenset[str]]:
        """Return the files of other checkpoints that have to stay, by the names of the checkpoints."""
        found: dict[str, set[str]] = {}
        # Of sizes, not of pieces: there are few files and up to a million pieces.
        for source, file in self.sizes:
            if source is not None:
                found.setdefault(source, set()).add(file)
        return {source: frozenset(files) for source, files in found.items()}

    def used(self) -> Counter[SourceFile]:
        """Return how many bytes of each file are referred to."""
        found: Counter[SourceFile] = Counter()
        for file in self.files.values():
            for piece in file.pieces:
                found[piece.place] += piece.nbytes
        return found


def block_digests(data: Buffer) -> list[str]:
    """Return the digests of the blocks of a buffer. Releases the GIL while it computes."""
    starts = range(0, len(data), BLOCK_BYTES)
    return [xxhash.xxh3_128_hexdigest(data[start : start + BLOCK_BYTES]) for start in starts]


def append(pieces: list[Extent], piece: Extent) -> None:
    """Add a piece behind others. It is joined with the last one if it also follows it in the file that has both."""
    last = pieces[-1] if pieces else None
    if (
        last is not None
        and (last.source, last.file) == (piece.source, piece.file)
        and last.offset + last.nbytes == piece.offset
    ):
        pieces[-1] = Extent(last.source, last.file, last.offset, last.nbytes + piece.nbytes)
    else:
        pieces.append(piece)
