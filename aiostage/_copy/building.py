"""Making the staged leaves of a batch over the memory that it is copied into."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from aiostage._capture.faithful import Spec
from aiostage._capture.plan import Batch, Run
from aiostage._capture.rebuild import build_block, build_run

__all__ = ["build_batch", "build_destinations", "build_empty", "keep_freed_memory"]

_NOTHING = np.empty(0, dtype=np.uint8)

_LARGEST_BLOCK = 32 * 2**20 - 2**16
"""Just below the largest block whose release glibc learns from."""


@cache
def keep_freed_memory() -> None:
    """Let malloc keep what the leaves of one staging give back for those of the next.

    Objects for 50,000 leaves take 20 MiB, which glibc returns to the kernel when the last staged copy is dropped, so
    that building the next one takes 5,000 page faults, a tenth of its time. Once a process has freed a block of this
    size it keeps up to twice as much: the dynamic threshold of mallopt(3). Other allocators just free the block.
    """
    np.empty(_LARGEST_BLOCK, dtype=np.uint8)


def build_empty(runs: Sequence[Run], staged: list[Any]) -> Generator[None, None, None]:
    """Make the leaves that have no elements, yielding now and then.

    Args:
        runs: Of such leaves.
        staged: Where to put them, by their indices.
    """
    for run in runs:
        _place(staged, run.indices, build_run(_NOTHING, run))
        yield


def build_batch(
    batch: Batch, memory: np.ndarray[Any, Any], staged: list[Any], specs: Sequence[Spec | None]
) -> Generator[None, None, None]:
    """Make the leaves that begin in a batch, yielding now and then.

    Args:
        batch: Whose leaves to make.
        memory: One-dimensional uint8, the whole arena.
        staged: Where to put them, by their indices.
        specs: Of all leaves.
    """
    for run in batch.runs:
        _place(staged, run.indices, build_run(memory[run.offset : run.offset + run.nbytes], run))
        yield
    for block in batch.blocks:
        part = memory[block.offset : block.offset + block.nbytes]
        for indices, tensors in build_block(part, block, specs):
            _place(staged, indices, tensors)
            yield


def build_destinations(batch: Batch, memory: np.ndarray[Any, Any]) -> dict[int, torch.Tensor]:
    """Return what copying a batch writes to as leaves, by their indices; the rest it finds in the memory."""
    made: dict[int, torch.Tensor] = {}
    for run in batch.runs:
        if run.is_whole:
            leaves = build_run(memory[run.offset : run.offset + run.nbytes], run)
            made.update(zip(run.indices, leaves, strict=True))
    return made


def _place(staged: list[Any], indices: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
    """Put tensors where their leaves' indices say."""
    if isinstance(indices, range):
        staged[indices.start : indices.stop] = tensors
        return
    for index, tensor in zip(indices, tensors, strict=True):
        staged[index] = tensor
