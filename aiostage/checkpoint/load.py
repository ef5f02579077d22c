"""A checkpoint back to a tree, or into a live one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Any

from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage._loop.workers import Workers
from aiostage.abc import Storage
from aiostage.checkpoint.into import Transfer, compare
from aiostage.checkpoint.progress import LoadProgress, ProgressOption, reporting
from aiostage.checkpoint.reader import CheckpointReader
from aiostage.checkpoint.resolving import ResolvingReader
from aiostage.checkpoint.writer import MAX_HOLD
from aiostage.errors import CheckpointError, CheckpointNotFoundError
from aiostage.observe import span
from aiostage.storage.locate import Target, locate

__all__ = ["load"]

_logger = logging.getLogger("aiostage")

_THREADS = 2

_ATTEMPTS = 10
"""How often reading begins anew when the checkpoint is replaced meanwhile."""


async def load(
    source: Target,
    *,
    into: Any = None,
    verify: bool = True,
    progress: ProgressOption[LoadProgress] = None,
) -> Any:
    """Read a checkpoint.

    Args:
        source: Where :func:`save` has put it.
        into: A live tree to change in place: its tensors, of any device, take the loaded values, and what is not a
            tensor is put into its dicts and lists. None: return a new tree.
        verify: Compare every byte read with the checksums. Without, only the structure is checked.
        progress: True shows a progress bar (with tqdm). A function is called on the event loop as parts are read; what
            it raises ends the load.

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
    with span("load", source=name), reporting(progress, f"loading {name}") as report:
        workers, slices = Workers(_THREADS, "aiostage-load"), Slices(MAX_HOLD)
        try:
            begin = perf_counter()
            tree = await _load(storage, name, workers, slices, verify=verify, report=report)
            _logger.info("read %s from %r in %.3f s", name, storage, perf_counter() - begin)
            if into is None:
                return tree
            with span("into"):
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


async def _load(
    storage: Storage,
    name: str,
    workers: Workers,
    slices: Slices,
    *,
    verify: bool,
    report: Callable[[LoadProgress], object] | None,
) -> Any:
    """Load a tree; again if the checkpoint was replaced, and so removed, while it was read."""
    for _ in range(_ATTEMPTS):
        reader = ResolvingReader(storage, name, await storage.read(name))
        try:
            return await CheckpointReader(reader, name, workers, slices, verify=verify, progress=report).tree()
        except CheckpointNotFoundError:
            # If it was deleted, the next attempt says so.
            continue
        finally:
            await reader.aclose()
    raise CheckpointError("it keeps being replaced while it is read.", path=name)
