"""Finding what dead writers have left in a store that knows no locks, beside writers that live."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from aiostage._loop.coroutines import finish
from aiostage.storage.bucket import Bucket
from aiostage.storage.pointer import (
    FOLDER,
    LEASE_NAME,
    POINTER_NAME,
    WITHDRAWN,
    find_folder,
    lease_seconds,
    remove_folder,
)

__all__ = ["clean_up", "pending"]

_MAX_LEASE_BYTES = 4096

_CLOCK = ".aiostage-clock"
"""Below which small objects are written for a moment, to see what time the store says it is."""

_CLEAN_UP_INTERVAL = timedelta(days=1)
"""Longer than reading the clock can take."""

_log = logging.getLogger("aiostage")


async def clean_up(bucket: Bucket, seconds: float) -> None:
    """Remove the folders that have no pointer and no writer.

    Args:
        bucket: Where.
        seconds: How long nothing may have been written to a folder; its lease may say longer.

    Raises:
        StorageError: If the store refuses. What is left is found again.
    """
    candidates = [suspect for suspect in await _suspects(bucket) if not await _is_used(bucket, suspect)]
    if not candidates:
        return
    now = await _now(bucket)
    for suspect in candidates:
        age = await _age(bucket, suspect, now)
        if age is None or age <= seconds or age <= await _lease(bucket, suspect) or await _is_used(bucket, suspect):
            continue
        folder = "/".join(suspect)
        # The lease first: a writer that wakes up now, after it was suspended for longer than its lease, looks for it
        # when it has written its pointer. One that had looked before is seen by this look.
        await bucket.delete([f"{folder}/{LEASE_NAME}"])
        if await _is_used(bucket, suspect):
            continue
        _log.info("removing %s/%s, left behind by a save that did not end", bucket.location, folder)
        await remove_folder(bucket, folder)


async def pending(bucket: Bucket) -> Sequence[str]:
    """Return the names of the checkpoints with files of a writer, alive or dead, that are not committed.

    Raises:
        StorageError: If the store refuses.
    """
    return sorted({name for name, _ in await _suspects(bucket)})


async def _suspects(bucket: Bucket) -> Sequence[tuple[str, str]]:
    """Return the name of the checkpoint and that of the folder, for folders that a listing alone does not clear.

    A pointer and one folder is what a committed checkpoint looks like, and most are.
    """
    pointers: set[str] = set()
    found: dict[str, set[str]] = {}
    async for entries in bucket.list(""):
        for entry in entries:
            above, _, last = entry.path.rpartition("/")
            if last == POINTER_NAME and entry.nbytes != len(WITHDRAWN):
                pointers.add(above)
            name, _, folder = above.rpartition("/")
            if name and FOLDER.fullmatch(folder):
                found.setdefault(name, set()).add(folder)
    return [
        (name, folder)
        for name, folders in found.items()
        for folder in sorted(folders)
        if len(folders) > 1 or name not in pointers
    ]


async def _is_used(bucket: Bucket, suspect: tuple[str, str]) -> bool:
    name, folder = suspect
    return await find_folder(bucket, name) == folder


async def _age(bucket: Bucket, suspect: tuple[str, str], now: datetime) -> float | None:
    """Return for how many seconds nothing was written; None if the store does not say, or nothing is there.

    Lists again, because time has passed since the last listing.
    """
    times = [entry.modified async for batch in bucket.list("/".join(suspect)) for entry in batch]
    known = [time for time in times if time is not None]
    return (now - max(known)).total_seconds() if times and len(known) == len(times) else None


async def _lease(bucket: Bucket, suspect: tuple[str, str]) -> float:
    """Return for how many seconds the lease of a folder holds."""
    try:
        found = await bucket.get("/".join((*suspect, LEASE_NAME)), at_most=_MAX_LEASE_BYTES)
    except FileNotFoundError:
        return 0.0
    return lease_seconds(bytes(found.data))


async def _now(bucket: Bucket) -> datetime:
    """Return the time by the store's clock, which need not be this machine's."""
    path = f"{_CLOCK}/{secrets.token_hex(8)}"
    stale = [path]
    try:
        await bucket.put(path, memoryview(b"."))
        times = {entry.path: entry.modified async for batch in bucket.list(_CLOCK) for entry in batch}
        now = times.get(path) or datetime.min.replace(tzinfo=UTC)
        # Left by a clean-up whose process was killed here.
        stale += [path for path, time in times.items() if time is not None and now - time > _CLEAN_UP_INTERVAL]
    finally:
        await finish(lambda: bucket.delete(stale))
    return now
