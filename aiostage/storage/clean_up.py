"""Finding the files of dead writers in a store without locks, while other writers are at work."""

from __future__ import annotations

import logging
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from aiostage._loop.coroutines import finish
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError
from aiostage.storage.bucket import Bucket, ObjectMeta, Version
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.pointer import (
    FOLDER,
    LEASE_NAME,
    POINTER_NAME,
    WITHDRAWN,
    find_folder,
    find_pointer,
    is_going,
    lease_seconds,
    remove_folder,
    withdraw,
)

__all__ = ["clean_up", "pending"]

_MAX_LEASE_BYTES = 4096

_CLOCK = ".aiostage-clock"
"""A clean-up writes a small object below this path, and learns the store's time from when it was written."""

_CLOCK_OBJECT_LIFETIME = timedelta(days=1)
"""After which an object below the clock's path is stale. Reading the clock takes seconds."""

_log = logging.getLogger("aiostage")


async def clean_up(bucket: Bucket, seconds: float) -> None:
    """Withdraw pointers to folders that are gone, and remove the folders that have no pointer and no writer.

    Args:
        bucket: The store.
        seconds: How long a folder, and a pointer to it, stay after the last write to them. Its lease may say longer.

    Raises:
        StorageError: If the store refuses. What is left is found again.
    """
    listed = await _listed(bucket)
    now: datetime | None = None
    for name, entry in listed.items():
        folder = await _gone(bucket, name) if entry.pointer is not None and entry.is_doubtful(seconds) else None
        if entry.pointer is None or folder is None:
            continue
        # A young one stays: a tool that copies a checkpoint from another store may copy the pointer first.
        now = now or await _now(bucket)
        age = await _age(bucket, (name, folder), now, entry.pointer)
        if age is not None and age > seconds:
            await _withdraw_from_nothing(bucket, name, folder)
    candidates = [suspect for suspect in _suspects(listed) if not await _is_used(bucket, suspect)]
    if not candidates:
        return
    now = now or await _now(bucket)
    for suspect in candidates:
        age = await _age(bucket, suspect, now)
        # Whether it is used is asked again: a writer may have committed since the candidates were chosen.
        if age is None or age <= seconds or age <= await _lease(bucket, suspect) or await _is_used(bucket, suspect):
            continue
        folder = "/".join(suspect)
        # The lease first, then the look at the pointer. A writer that wakes up now, after it was suspended for longer
        # than its lease, writes its pointer and then looks for the lease. If it looked before this deletion, its
        # pointer is there for the look below.
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
    return sorted({name for name, _ in _suspects(await _listed(bucket))})


@dataclass(slots=True)
class _Listed:
    """What a listing shows of one checkpoint.

    Attributes:
        pointer: Its pointer, unless that is withdrawn.
        folders: The names of its folders.
        manifests: The manifests in them.
    """

    pointer: ObjectMeta | None = None
    folders: set[str] = field(default_factory=set)
    manifests: list[ObjectMeta] = field(default_factory=list)

    def is_doubtful(self, seconds: float) -> bool:
        """Return whether the pointer may name a folder that is gone.

        A writer writes its pointer right after its manifest. If its files are gone, it was silent before that for
        longer than a lease. Its pointer is then that much later than all manifests that are left, unless another writer
        has committed meanwhile. Such a pointer is not found. The next save replaces it.
        """
        if self.pointer is None:
            return False
        return not any(_seconds_between(manifest, self.pointer) < seconds for manifest in self.manifests)


def _seconds_between(first: ObjectMeta, second: ObjectMeta) -> float:
    """Return how many seconds later the second was written; 0 if the store does not say."""
    if first.modified is None or second.modified is None:
        return 0.0
    return (second.modified - first.modified).total_seconds()


async def _listed(bucket: Bucket) -> Mapping[str, _Listed]:
    """Return what a listing shows of each checkpoint, by its name."""
    found: dict[str, _Listed] = defaultdict(_Listed)
    async for entries in bucket.list(""):
        for entry in entries:
            above, _, last = entry.path.rpartition("/")
            if last == POINTER_NAME and above and entry.nbytes != len(WITHDRAWN):
                found[above].pointer = entry
            name, _, folder = above.rpartition("/")
            if name and FOLDER.fullmatch(folder):
                found[name].folders.add(folder)
                if last == MANIFEST_NAME:
                    found[name].manifests.append(entry)
    return found


def _suspects(listed: Mapping[str, _Listed]) -> Sequence[tuple[str, str]]:
    """Return the names of checkpoint and folder, for folders that may have no pointer.

    One pointer and one folder are a committed checkpoint. Most are that, and cost no request beyond the listing.
    """
    return [
        (name, folder)
        for name, entry in listed.items()
        for folder in sorted(entry.folders)
        if len(entry.folders) > 1 or entry.pointer is None
    ]


async def _gone(bucket: Bucket, name: str) -> str | None:
    """Return the folder that a pointer names and that is gone, or None if there is no such pointer."""
    try:
        folder = await find_folder(bucket, name)
    except CheckpointCorruptError:
        # Not a pointer, and not ours. Those who open it say so.
        return None
    if folder is None or not await is_going(bucket, f"{name}/{folder}"):
        return None
    # The owner of what a link leads to sees to it.
    if await bucket.is_link(name) or await bucket.is_link(f"{name}/{folder}"):
        return None
    return folder


async def _withdraw_from_nothing(bucket: Bucket, name: str, folder: str) -> None:
    """Withdraw a pointer to a folder that is gone, whose writer could not.

    Nobody else needs that pointer. Its writer looks for its lease after it has written the pointer, finds none, and
    fails. One that replaces it writes another, and this writes only in place of the one that it has seen.
    """
    try:
        await withdraw(bucket, name, folder, exchange=_exchange_compared)
    except NotImplementedError:
        _log.warning(
            "%s/%s names files that are gone, because its writer could not take it back. This store cannot compare, so "
            "a clean-up leaves it to you: save the checkpoint again with overwrite=True, or delete it.",
            bucket.location,
            f"{name}/{POINTER_NAME}",
        )
    else:
        _log.info("withdrew %s/%s/%s, which named files that are gone", bucket.location, name, POINTER_NAME)


async def _exchange_compared(bucket: Bucket, name: str, data: Buffer, seen: Version) -> None:
    await bucket.replace(f"{name}/{POINTER_NAME}", data, seen)


async def _is_used(bucket: Bucket, suspect: tuple[str, str]) -> bool:
    """Return whether a pointer names a folder, or will when it is withdrawn."""
    name, folder = suspect
    try:
        pointer = await find_pointer(bucket, name)
    except CheckpointCorruptError as error:
        # It may have named this folder. The other checkpoints need not wait until somebody sees to it.
        _log.warning("kept %s/%s/%s: %s", bucket.location, name, folder, error)
        return True
    if pointer is None or pointer.folder is None or pointer.folder == folder:
        return pointer is not None and pointer.folder == folder
    return folder in pointer.replaced and await is_going(bucket, f"{name}/{pointer.folder}")


async def _age(bucket: Bucket, suspect: tuple[str, str], now: datetime, *others: ObjectMeta) -> float | None:
    """Return for how many seconds nothing was written; None if the store does not say, or nothing is there.

    It lists again: the writer may have sent a heartbeat since the last listing.

    Args:
        bucket: The store.
        suspect: The name of a checkpoint, and that of a folder.
        now: The time by the store's clock.
        others: Objects that count beside those in the folder.
    """
    times = [entry.modified for entry in others]
    times += [entry.modified async for batch in bucket.list("/".join(suspect)) for entry in batch]
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
        # A clean-up whose process was killed here has left its object.
        stale += [path for path, time in times.items() if time is not None and now - time > _CLOCK_OBJECT_LIFETIME]
    finally:
        await finish(lambda: bucket.delete(stale))
    return now
