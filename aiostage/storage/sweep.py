"""Finding what dead writers have left in a store that knows no locks, beside writers that live."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from datetime import datetime

from aiostage._loop.cleanup import finish
from aiostage.storage.bucket import Bucket, Entry
from aiostage.storage.lease import LEASE_NAME, lease_seconds
from aiostage.storage.pointer import FOLDER, POINTER_NAME, find_pointer, remove_folder

__all__ = ["sweep"]

_MAX_LEASE_BYTES = 4096

_log = logging.getLogger("aiostage")


async def sweep(bucket: Bucket, seconds: float) -> None:
    """Remove the folders that no checkpoint points to and nobody writes to.

    Args:
        bucket: Where.
        seconds: How long nothing may have been written to a folder; its lease may say longer.

    Raises:
        StorageError: If the store refuses. What is left is found again.
    """
    candidates = [
        (name, folder)
        for name, folders in (await _suspects(bucket)).items()
        for folder in folders
        if not await _is_used(bucket, name, folder)
    ]
    if not candidates:
        return
    now = await _now(bucket)
    for name, folder in candidates:
        path = f"{name}/{folder}"
        # Looked at once more, because time has gone by since the listing.
        age = _age([entry async for batch in bucket.list(path) for entry in batch], now)
        if age is None or age <= seconds or age <= await _lease(bucket, path) or await _is_used(bucket, name, folder):
            continue
        _log.info("removing %s/%s, left behind by a save that did not end", bucket.location, path)
        await remove_folder(bucket, path)


async def _suspects(bucket: Bucket) -> dict[str, set[str]]:
    """Return the folders of drafts, by the names of checkpoints, that a listing alone does not clear.

    A pointer and one folder is what a committed checkpoint looks like, and most are: nobody has to ask about them.
    """
    pointers: set[str] = set()
    found: dict[str, set[str]] = {}
    async for batch in bucket.list(""):
        for entry in batch:
            name, _, last = entry.path.rpartition("/")
            if last == POINTER_NAME:
                pointers.add(name)
            above, _, folder = name.rpartition("/")
            if above and FOLDER.fullmatch(folder):
                found.setdefault(above, set()).add(folder)
    return {name: folders for name, folders in found.items() if name not in pointers or len(folders) > 1}


async def _is_used(bucket: Bucket, name: str, folder: str) -> bool:
    pointer = await find_pointer(bucket, name)
    return pointer is not None and pointer.folder == folder


def _age(entries: Sequence[Entry], now: datetime) -> float | None:
    """Return for how many seconds nothing has been written; None if the store does not say, or nothing is there."""
    times = [entry.modified for entry in entries if entry.modified is not None]
    if not times or len(times) < len(entries):
        return None
    return (now - max(times)).total_seconds()


async def _lease(bucket: Bucket, path: str) -> float:
    """Return for how many seconds the lease of a folder holds."""
    try:
        found = await bucket.get(f"{path}/{LEASE_NAME}", at_most=_MAX_LEASE_BYTES)
    except FileNotFoundError:
        return 0.0
    return lease_seconds(found.data)


async def _now(bucket: Bucket) -> datetime:
    """Return the time by the store's clock, which need not be this machine's."""
    folder = f".aiostage-clock-{secrets.token_hex(8)}"
    path = f"{folder}/now"
    try:
        await bucket.put(path, memoryview(b"."))
        times = [entry.modified async for batch in bucket.list(folder) for entry in batch]
    finally:
        await finish(lambda: bucket.delete([path]))
    return next((time for time in times if time is not None), datetime.min)
