"""Finding what dead writers have left in a store that knows no locks, beside writers that live."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from aiostage._loop.coroutines import finish
from aiostage.storage.bucket import Bucket, Upload
from aiostage.storage.pointer import FOLDER, LEASE_NAME, POINTER_NAME, find_pointer, lease_seconds, remove_folder

__all__ = ["clean_up", "pending"]

_MAX_LEASE_BYTES = 4096

_CLOCK = ".aiostage-clock"
"""Below which small objects are written for a moment, to see what time the store says it is."""

_SWEPT = timedelta(days=1)
"""Longer than reading the clock can take."""

_log = logging.getLogger("aiostage")


@dataclass(frozen=True, slots=True)
class _Suspect:
    """The folder of a pending checkpoint that a listing alone does not clear.

    Attributes:
        name: Of the checkpoint.
        folder: Name of the folder.
        uploads: Those to it that were open before the check whether it is committed.
    """

    name: str
    folder: str
    uploads: Sequence[Upload]

    @property
    def path(self) -> str:
        return f"{self.name}/{self.folder}"


async def clean_up(bucket: Bucket, seconds: float) -> None:
    """Remove the folders that have no pointer and no writer, and end the uploads that are left of them.

    Args:
        bucket: Where.
        seconds: How long nothing may have been written to a folder; its lease may say longer.

    Raises:
        StorageError: If the store refuses. What is left is found again.
    """
    candidates = []
    # Before the listing, or those of a pending checkpoint that is committed in between would be taken for stale files.
    uploads = [upload async for batch in bucket.uploads("") for upload in batch]
    for suspect in await _suspects(bucket, uploads):
        if await _is_used(bucket, suspect):
            # What is committed is complete: these were begun once more because an answer was lost.
            await _end(bucket, suspect.uploads)
        else:
            candidates.append(suspect)
    if not candidates:
        return
    now = await _now(bucket)
    for suspect in candidates:
        age = await _age(bucket, suspect, now)
        if age is None or age <= seconds or age <= await _lease(bucket, suspect) or await _is_used(bucket, suspect):
            continue
        _log.info("removing %s/%s, left behind by a save that did not end", bucket.location, suspect.path)
        await _end(bucket, suspect.uploads)
        await remove_folder(bucket, suspect.path)


async def pending(bucket: Bucket) -> Sequence[str]:
    """Return the names of the checkpoints with files of a writer, alive or dead, that are not committed.

    Raises:
        StorageError: If the store refuses.
    """
    # The lease comes before everything else, so that none is only an upload.
    return sorted({suspect.name for suspect in await _suspects(bucket, ())})


async def _suspects(bucket: Bucket, uploads: Sequence[Upload]) -> Sequence[_Suspect]:
    """Return the folders that have to be asked about.

    A pointer and one folder to which no upload is open is what a committed checkpoint looks like, and most are.
    """
    pointers: set[str] = set()
    found: dict[str, dict[str, list[Upload]]] = {}

    def uploads_to(path: str) -> list[Upload]:
        name, _, folder = path.rpartition("/")[0].rpartition("/")
        return found.setdefault(name, {}).setdefault(folder, []) if name and FOLDER.fullmatch(folder) else []

    for upload in uploads:
        uploads_to(upload.path).append(upload)
    async for entries in bucket.list(""):
        for entry in entries:
            name, _, last = entry.path.rpartition("/")
            if last == POINTER_NAME:
                pointers.add(name)
            uploads_to(entry.path)
    return [
        _Suspect(name, folder, begun)
        for name, folders in found.items()
        for folder, begun in folders.items()
        if begun or len(folders) > 1 or name not in pointers
    ]


async def _is_used(bucket: Bucket, suspect: _Suspect) -> bool:
    pointer = await find_pointer(bucket, suspect.name)
    return pointer is not None and pointer.folder == suspect.folder


async def _end(bucket: Bucket, uploads: Sequence[Upload]) -> None:
    for upload in uploads:
        _log.info("ending an upload of %s/%s that no writer completes", bucket.location, upload.path)
        await bucket.end(upload)


async def _age(bucket: Bucket, suspect: _Suspect, now: datetime) -> float | None:
    """Return for how many seconds nothing was written; None if the store does not say, or nothing is there.

    Asks anew, because time has gone by since the listing.
    """
    times = [entry.modified async for batch in bucket.list(suspect.path) for entry in batch]
    times += [upload.began for upload in suspect.uploads]
    known = [time for time in times if time is not None]
    return (now - max(known)).total_seconds() if times and len(known) == len(times) else None


async def _lease(bucket: Bucket, suspect: _Suspect) -> float:
    """Return for how many seconds the lease of a folder holds."""
    try:
        found = await bucket.get(f"{suspect.path}/{LEASE_NAME}", at_most=_MAX_LEASE_BYTES)
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
        # Of sweeps that were killed here.
        stale += [path for path, time in times.items() if time is not None and now - time > _SWEPT]
    finally:
        await finish(lambda: bucket.delete(stale))
    return now
