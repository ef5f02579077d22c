"""Saving and loading one checkpoint, for programs without an event loop."""

from __future__ import annotations

from typing import Any

from aiostage.abc import CheckpointStager
from aiostage.blocking.background import Background
from aiostage.blocking.stager import Snapshot, Stager
from aiostage.checkpoint.load import load as async_load
from aiostage.checkpoint.save import save as async_save
from aiostage.checkpoint.writer import CheckpointInfo
from aiostage.storage.locate import Target

__all__ = ["load", "save"]


def save(
    state_dict: Any, target: Target, *, stager: Stager | CheckpointStager | None = None, **options: Any
) -> CheckpointInfo:
    """Stage a tree and write it to a storage, where it appears whole or not at all. Blocks until it is committed.

    Args:
        state_dict: As for :func:`aiostage.save`; or an entered :class:`Snapshot`, which is not copied again.
        target: As for :func:`aiostage.save`.
        stager: Takes the copy: an entered :class:`Stager`, or an asynchronous one. None: one is made for this call.
        **options: More that :func:`aiostage.save` takes: ``overwrite``, ``max_shard_bytes``, ``duplicate_tied``,
            ``progress``. Functions are called in the background thread.

    Returns:
        What was saved.

    Raises:
        Exception: As :func:`aiostage.save` does.
    """
    if isinstance(state_dict, Snapshot):
        info: CheckpointInfo = state_dict.wait(async_save(state_dict.on(None), target, **options))
        return info
    if isinstance(stager, Stager):
        background = stager.background()
        return background.wait(async_save(state_dict, target, stager=stager.stager, **options))
    # Called in this thread: the copies follow what was enqueued on its current streams.
    coroutine = async_save(state_dict, target, stager=stager, **options)
    with Background.started("aiostage-save") as background:
        return background.wait(coroutine)


def load(source: Target, **options: Any) -> Any:
    """Read a checkpoint. Blocks until it was read.

    Args:
        source: As for :func:`aiostage.load`.
        **options: More that :func:`aiostage.load` takes, such as ``into`` and ``device``. Functions are called in a
            background thread.

    Returns:
        The tree that was saved; or ``into``.

    Raises:
        Exception: As :func:`aiostage.load` does.
    """
    loading = async_load(source, **options)
    with Background.started("aiostage-load") as background:
        return background.wait(loading)
