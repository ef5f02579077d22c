"""The pointer that makes a folder of objects a checkpoint, the folder that it names, and the lease of its writer.

A clean-up may take a suspended writer for dead. Stores change one object at a time, so the two use two objects to
decide who wins. The writer writes the pointer and then looks for its lease. The clean-up removes the lease and then
looks at the pointer. At least one of them sees what the other has done: a writer without a lease withdraws its pointer,
and a clean-up keeps a folder that a pointer names. Therefore a lease is written once, at the beginning, and is the
first object that is removed. Heartbeats are another object. The manifest is the second that is removed: a folder
without both is being removed, or is gone. A clean-up withdraws a pointer to it, because its writer may have died before
it could.

A pointer also names the folders that it has replaced. From these a withdrawal knows which checkpoint to point to again,
and a writer knows whether other processes have replaced or withdrawn its own pointer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from aiostage._loop.coroutines import Finalizer
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, said
from aiostage.storage.bucket import Bucket, Version
from aiostage.storage.commit import MANIFEST_NAME

__all__ = [
    "BEATS_PER_LEASE",
    "FOLDER",
    "HEARTBEAT_NAME",
    "LEASE_NAME",
    "POINTER_NAME",
    "WITHDRAWN",
    "Heartbeat",
    "Pointer",
    "exchange_pointer",
    "find_folder",
    "find_pointer",
    "has_lease",
    "is_going",
    "is_withdrawn",
    "lease_seconds",
    "remove_folder",
    "withdraw",
    "write_lease",
    "write_pointer",
]

LEASE_NAME = "lease.json"
"""An object beside the files of a checkpoint. While it is there, no clean-up has removed any of them."""

HEARTBEAT_NAME = "heartbeat.json"
"""An object beside the files of a checkpoint. Its writer writes it again at each heartbeat."""

BEATS_PER_LEASE = 4
"""How many heartbeats a writer sends while its lease holds. A guess: three may fail in a row."""

_log = logging.getLogger("aiostage")


def write_lease(seconds: float) -> bytes:
    """Compose a lease: for how long it holds, and, for people who read it, which process writes there."""
    return json.dumps({"seconds": seconds, "host": socket.gethostname(), "process": os.getpid()}).encode()


def lease_seconds(data: bytes) -> float:
    """Return for how long a lease holds; 0 for one that cannot be read, which no writer renews."""
    try:
        seconds = json.loads(data)["seconds"]
        return float(seconds)
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0.0


class Heartbeat:
    """Calls a function at intervals, in a thread of its own, until it is stopped or the last reference to it is gone.

    A thread, because heartbeats must go on while the event loop is busy and while no coroutine of the writer runs.

    Args:
        beat: Blocks for a moment. Its errors are logged, and it is called again. FileNotFoundError ends the heartbeat.
        interval: Seconds between two beats.
        name: The name of the thread.
    """

    def __init__(self, beat: Callable[[], None], interval: float, name: str) -> None:
        stopped = threading.Event()
        self._stop = Finalizer(self, stopped.set)
        # A lease may hold for ever. A thread may wait for 292 years at most.
        interval = min(interval, threading.TIMEOUT_MAX)
        self._thread = threading.Thread(target=_beat, args=(beat, interval, stopped), name=name, daemon=True)
        # The thread refers to the event and the beat, not to this object. So dropping this object ends the thread.
        # start() waits for the thread's first turn, once in a save.
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for a beat that is under way. Blocks. May be called more than once."""
        self._stop()
        # A beat that is under way could otherwise write its object after the caller has removed the folder.
        self._thread.join()


def _beat(beat: Callable[[], None], interval: float, stopped: threading.Event) -> None:
    while not stopped.wait(interval):
        try:
            beat()
        except FileNotFoundError as error:
            # Another process took this one for dead, say because it was suspended.
            _log.warning("the lease was removed because its heartbeat expired, and is not renewed: %s", error)
            return
        except Exception as error:
            _log.warning("could not renew a lease, and will try again in %.0f s: %s", interval, error)


POINTER_NAME = "checkpoint.json"
"""The object that makes a checkpoint."""

FOLDER = re.compile(r"data-[0-9a-f]{16}")
"""The name of a folder with the files of one pending checkpoint."""

_FORMAT = "aiostage"
_VERSION = 1
_MAX_BYTES = 4096
_MAX_REPLACED = 16
"""A guess: more writers than replace one checkpoint between two requests of one of them."""

WITHDRAWN = json.dumps({"format": _FORMAT, "version": _VERSION, "data": None}).encode()
"""The content of a withdrawn pointer, whose writer has found its files deleted. It is overwritten and not deleted: no
store deletes an object on a condition, and a plain deletion could remove the pointer of another writer. No other
pointer has its length, so that a listing tells them apart."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """The content of a checkpoint's pointer.

    Attributes:
        folder: Name of the folder with its files; None if the pointer is withdrawn, and there is no checkpoint.
        version: The state of the pointer that was read.
        replaced: The folders that it named before, the latest first, since there was no pointer or a withdrawn one.
    """

    folder: str | None
    version: Version
    replaced: Sequence[str] = ()


async def find_folder(bucket: Bucket, name: str) -> str | None:
    """Return the name of the folder with the files of a checkpoint, or None if there is no such checkpoint.

    Raises:
        CheckpointCorruptError: If its pointer is something else.
        StorageError: If the store refuses.
    """
    pointer = await find_pointer(bucket, name)
    return pointer.folder if pointer is not None else None


async def is_withdrawn(bucket: Bucket, name: str) -> bool:
    """Return whether a name that a listing shows has no checkpoint: its pointer was withdrawn, or is gone since.

    A damaged pointer counts as one. Opening it says what is wrong.

    Raises:
        StorageError: If the store refuses.
    """
    try:
        return await find_folder(bucket, name) is None
    except CheckpointCorruptError:
        return False


async def find_pointer(bucket: Bucket, name: str) -> Pointer | None:
    """Return the pointer of a checkpoint, also a withdrawn one, or None if there is none.

    Raises:
        CheckpointCorruptError: If it is something else.
        StorageError: If the store refuses.
    """
    path = f"{name}/{POINTER_NAME}"
    try:
        found = await bucket.get(path, at_most=_MAX_BYTES)
    except FileNotFoundError:
        return None
    if bytes(found.data) == WITHDRAWN:
        return Pointer(None, found.version)
    try:
        content = json.loads(bytes(found.data))
        version = content["version"]
        # The type too: in Python, JSON's true and 1.0 equal 1.
        if content["format"] != _FORMAT or type(version) is not int or version != _VERSION:
            raise ValueError("it is of another format or version")
        replaced = content.get("replaced", [])
        # The whole form: a name from a hostile pointer must not lead to objects outside of the checkpoint.
        if type(replaced) is not list or not all(map(FOLDER.fullmatch, (content["data"], *replaced))):
            raise ValueError("it names no folder of a checkpoint")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"it is not the pointer of a checkpoint: {said(error)}.", path=f"{bucket.location}/{path}"
        ) from error
    return Pointer(content["data"], found.version, replaced)


def write_pointer(folder: str, replaced: Sequence[str] = ()) -> Buffer:
    """Compose the pointer to a folder, which has replaced those."""
    content = {"format": _FORMAT, "version": _VERSION, "data": folder, "replaced": list(replaced[:_MAX_REPLACED])}
    return memoryview(json.dumps(content).encode())


async def exchange_pointer(bucket: Bucket, name: str, data: Buffer, seen: Version) -> None:
    """Write a pointer in place of the one seen.

    Raises:
        FileExistsError: If it is in another state, or gone. Where the store cannot compare, it is replaced all the
            same: then the last of several writers wins.
        StorageError: If the store refuses.
    """
    path = f"{name}/{POINTER_NAME}"
    try:
        await bucket.replace(path, data, seen)
    except NotImplementedError:
        await bucket.put(path, data)


async def has_lease(bucket: Bucket, folder: str) -> bool:
    """Return whether the lease of a folder is there. If so, all its files are: it is removed before them."""
    return await _exists(bucket, f"{folder}/{LEASE_NAME}")


async def is_going(bucket: Bucket, folder: str) -> bool:
    """Return whether the removal of a folder has begun that a pointer has named; it never ends otherwise then."""
    return not await has_lease(bucket, folder) and not await _exists(bucket, f"{folder}/{MANIFEST_NAME}")


async def _exists(bucket: Bucket, path: str) -> bool:
    try:
        await bucket.size(path)
    except FileNotFoundError:
        return False
    return True


async def withdraw(
    bucket: Bucket,
    name: str,
    folder: str,
    *,
    exchange: Callable[[Bucket, str, Buffer, Version], Awaitable[None]] = exchange_pointer,
) -> None:
    """Let the pointer to a folder say what it said before, unless those files are gone too.

    The pointer of another writer is left.

    Args:
        bucket: The store.
        name: The checkpoint.
        folder: The folder that its pointer must not name. It has no lease, and never gets one again.
        exchange: Writes a pointer in place of the one seen.
    """
    pointer = await find_pointer(bucket, name)
    if pointer is None or pointer.folder != folder:
        return
    # One step back and no further: what was replaced before that, its successor may be about to remove.
    before = pointer.replaced
    if before:
        # Another writer may be faster, here and below.
        with suppress(FileExistsError):
            await exchange(bucket, name, write_pointer(before[0], before[1:]), pointer.version)
        if await has_lease(bucket, f"{name}/{before[0]}"):
            return
        # A clean-up has removed that one too, maybe before it was named again.
        pointer = await find_pointer(bucket, name)
        if pointer is None or pointer.folder != before[0]:
            return
    with suppress(FileExistsError):
        await exchange(bucket, name, memoryview(WITHDRAWN), pointer.version)


async def remove_folder(bucket: Bucket, folder: str) -> None:
    """Remove all objects below a path, the lease first, then the manifest: a folder with a lease is whole.

    If the path is a link, only the link is removed.
    """
    if await bucket.is_link(folder):
        await bucket.unlink(folder)
        return
    paths = [entry.path async for batch in bucket.list(folder) for entry in batch]
    first = [path for path in (f"{folder}/{LEASE_NAME}", f"{folder}/{MANIFEST_NAME}") if path in paths]
    for path in first:
        await bucket.delete([path])
    await bucket.delete([path for path in paths if path not in first])
