"""Parts of a file whose bytes pass through memory smaller than the copy.

The copy is made chunk by chunk into a window, and a chunk is used again when its bytes were taken. So bytes must be
taken in the order of the window, and a writer must hold no chunk while it waits for another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from aiostage._copy.window import Chunk, Window
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer
from aiostage.errors import StagingError
from aiostage.format.parts import Part, PartPiece, Scattered, gather, memory_range
from aiostage.snapshot import Snapshot
from aiostage.storage.files import PartBuffers

__all__ = ["collect"]


async def collect(
    part: Part, snapshot: Snapshot[Any], window: Window, *, buffers: PartBuffers, workers: Workers
) -> Buffer:
    """Return the contents of a part of a file, taking its bytes from a window as they come.

    No chunk is held while the next one is waited for, so that saves which share a budget cannot wait for each other.

    Args:
        part: The parts of a file have to be asked for in order.
        snapshot: Whose bytes they are.
        window: That they pass through.
        buffers: For parts that are not in one chunk.
        workers: Gather.

    Returns:
        The chunk's own memory where all of it lies in one, in order; else a copy.

    Raises:
        The errors of :meth:`Snapshot.copied` and :meth:`Window.take`.

    May be cancelled; nothing is held then.
    """
    # Each step lies in one chunk, or outside of the window.
    steps = [step for piece in part.pieces for step in _split(piece, window)]
    if len(steps) == 1 and isinstance(steps[0], torch.Tensor):
        arrived = await _arrive(steps[0], snapshot, window)
        assert isinstance(arrived, torch.Tensor)  # noqa: S101 - it stays what it was
        return arrived.numpy().data
    lent = buffers.take()
    memory = torch.from_numpy(lent)
    pieces: list[PartPiece] = []
    position = 0
    chunk: Chunk | None = None
    for step in steps:
        # Memory outside of the window, such as headers, needs no chunk and is gathered with the steps before it.
        needed = window.chunk_of(memory_range(step)[0]) or chunk
        if pieces and needed is not chunk:
            # Copied out before the next chunk is waited for: that may need the memory of this one.
            position += await _gather(pieces, memory[position:], workers)
            pieces = []
        chunk = needed
        pieces.append(await _arrive(step, snapshot, window))
    await _gather(pieces, memory[position:], workers)
    return lent.data[: part.nbytes]


async def _gather(pieces: list[PartPiece], memory: torch.Tensor, workers: Workers) -> int:
    """Copy pieces one after the other, and return how many bytes they are."""
    nbytes = sum(piece.nbytes for piece in pieces)
    await workers.run(partial(gather, Part(0, 0, nbytes, pieces), memory))
    return nbytes


async def _arrive(piece: PartPiece, snapshot: Snapshot[Any], window: Window) -> PartPiece:
    """Return a piece at the addresses where its bytes are, once they are there."""
    address, nbytes = memory_range(piece)
    if window.chunk_of(address) is None:
        return piece
    # The chunk has the same layout at another address: flat memory is taken as it is, strided elements get the same
    # strides over it.
    try:
        memory = torch.from_numpy(await window.take(address, nbytes))
    except StagingError:
        if window.closed:
            # The staging has failed. This raises its error, which says more than that the window is closed.
            await snapshot.captured()
        raise
    await snapshot.copied(address, nbytes)
    if not isinstance(piece, Scattered):
        return memory
    tensor = torch.empty(0, dtype=piece.tensor.dtype, device="cpu")
    tensor.set_(memory.untyped_storage(), 0, piece.tensor.shape, piece.tensor.stride())
    return Scattered(tensor, piece.start, piece.stop)


def _split(piece: PartPiece, window: Window) -> list[PartPiece]:
    """Cut flat memory where chunks end; nothing else can be cut."""
    address, nbytes = memory_range(piece)
    if not isinstance(piece, torch.Tensor) or window.chunk_of(address) is None:
        return [piece]
    cuts = window.split(address, nbytes)
    return [piece[start - address : start - address + length] for start, length in cuts]
