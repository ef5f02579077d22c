"""A checkpoint back to a tree, or into a live one."""

from __future__ import annotations

from typing import Any

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Workers
from aiostage.abc import Storage
from aiostage.checkpoint.into import Transfer, compare
from aiostage.checkpoint.reader import CheckpointReader
from aiostage.checkpoint.writer import MAX_HOLD
from aiostage.errors import CheckpointError, CheckpointNotFoundError
from aiostage.storage.locate import Target, locate

__all__ = ["load"]

_THREADS = 2

_ATTEMPTS = 10
"""How often reading begins anew when the checkpoint is replaced meanwhile."""


async def load(source: Target, *, into: Any = None, verify: bool = True) -> Any:
    """Read a checkpoint.

    Args:
        source: Where :func:`save` has put it.
        into: A live tree to change in place: its tensors, of any device, take the loaded values, and what is not a
            tensor is put into its dicts and lists. None: return a new tree.
        verify: Compare every byte read with the checksums. Without, only the structure is checked.

    Returns:
        The tree that was saved, in host memory; or ``into``.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointCorruptError: If a file is missing, damaged, incomplete or foreign.
        CheckpointMismatchError: If the checkpoint does not fit ``into``, with every place where it does not.
        OSError: If the storage refuses.

    ``into`` is not changed before everything was read, verified and compared, for which the tensors are in host memory
    a second time. May be cancelled: either nothing of ``into`` has been changed then, or everything.
    """
    storage, name = locate(source)
    workers, slices = Workers(_THREADS, "aiostage-load"), Slices(MAX_HOLD)
    try:
        tree = await _load(storage, name, workers, slices, verify=verify)
        if into is None:
            return tree
        transfer = await slices.run(compare(into, tree))
        await _carry_out(transfer, workers, slices)
        return into
    finally:
        workers.stop()


async def _carry_out(transfer: Transfer, workers: Workers, slices: Slices) -> None:
    """Change the live tree. Half a checkpoint is neither the old state nor the new, so a cancellation has to wait."""
    job = workers.job()
    for batch in transfer.batches():
        job.put(batch)
    job.close()

    async def complete() -> None:
        await job.settled()
        if job.error is not None:
            raise job.error
        await slices.run(transfer.copy_to_devices())
        transfer.assign()

    await finish(complete)


async def _load(storage: Storage, name: str, workers: Workers, slices: Slices, *, verify: bool) -> Any:
    """Load a tree; again if the checkpoint was replaced, and so removed, while it was read."""
    for _ in range(_ATTEMPTS):
        reader = await storage.read(name)
        try:
            return await CheckpointReader(reader, workers, slices, verify=verify).tree()
        except CheckpointNotFoundError:
            # If it was deleted, the next attempt says so.
            continue
        finally:
            await reader.aclose()
    raise CheckpointError("it keeps being replaced while it is read.", path=name)
