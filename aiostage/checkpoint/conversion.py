"""Checkpoints of other programs into those of aiostage."""

from __future__ import annotations

from aiostage.checkpoint.info import CheckpointInfo
from aiostage.checkpoint.load import load
from aiostage.checkpoint.save import DEFAULT_SHARD_BYTES, write_checkpoint
from aiostage.storage.locate import Target

__all__ = ["convert"]


async def convert(
    source: Target,
    target: Target,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: bool = True,
) -> CheckpointInfo:
    """Read a checkpoint, of any format that :func:`load` reads, and write it as one of aiostage.

    Args:
        source: As for :func:`load`.
        target: As for :func:`save`.
        overwrite: As for :func:`save`.
        max_shard_bytes: As for :func:`save`.
        verify: As for :func:`load`.

    Returns:
        What was written.

    Raises:
        The errors of :func:`load` and :func:`save`. All of it is in host memory meanwhile.

    May be cancelled as :func:`save` may.
    """
    tree = await load(source, verify=verify)
    return await write_checkpoint(tree, target, overwrite=overwrite, max_shard_bytes=max_shard_bytes)
