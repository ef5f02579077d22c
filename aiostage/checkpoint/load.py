"""A directory back to a tree, or into a live one."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Workers
from aiostage.checkpoint.into import Transfer, compare
from aiostage.checkpoint.reader import CheckpointReader
from aiostage.checkpoint.writer import MAX_HOLD
from aiostage.errors import CheckpointCorruptError, CheckpointError
from aiostage.storage.commit import is_current, open_committed
from aiostage.storage.local import IO_THREADS

__all__ = ["load"]

_ATTEMPTS = 10
"""How often reading begins anew when the checkpoint is replaced meanwhile."""


async def load(source: str | os.PathLike[str], *, into: Any = None, verify: bool = True) -> Any:
    """Read a checkpoint.

    Args:
        source: The directory that :func:`save` has made.
        into: A live tree to change in place: its tensors, of any device, take the loaded values, and what is not a
            tensor is put into its dicts and lists. None: return a new tree.
        verify: Compare every byte read with the checksums. Without, only the structure is checked.

    Returns:
        The tree that was saved, in host memory; or ``into``.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointCorruptError: If a file is missing, damaged, incomplete or foreign.
        CheckpointMismatchError: If the checkpoint does not fit ``into``, with every place where it does not.
        OSError: If the file system refuses.

    ``into`` is not changed before everything was read, verified and compared, for which the tensors are in host memory
    a second time. May be cancelled: either nothing of ``into`` has been changed then, or everything.
    """
    path = os.fsdecode(source)
    workers, slices = Workers(IO_THREADS, "aiostage-load"), Slices(MAX_HOLD)
    try:
        tree = await _load(path, workers, slices, verify=verify)
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


async def _load(path: str, workers: Workers, slices: Slices, *, verify: bool) -> Any:
    """Load a tree; again if the checkpoint was replaced, and so removed, while it was read."""
    # Once, or a change of the working directory would lead the next attempt elsewhere.
    path = await workers.run(partial(os.path.abspath, path))
    for _ in range(_ATTEMPTS):
        resolved = await workers.run(partial(os.path.realpath, path))
        directory = await workers.run(partial(open_committed, resolved))
        with directory:
            try:
                return await CheckpointReader(directory, resolved, workers, slices, verify=verify).tree()
            except CheckpointCorruptError:
                if await workers.run(partial(is_current, directory, resolved)):
                    raise
    raise CheckpointError("it keeps being replaced while it is read.", path=path)
