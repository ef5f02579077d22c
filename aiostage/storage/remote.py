"""Checkpoints in a flat store of objects: which objects there are, and what makes them appear and go as one.

A checkpoint NAME is ``NAME/checkpoint.json``, a pointer of a few bytes, and a folder ``NAME/data-TOKEN/`` that the
pointer names. The folder looks like a checkpoint on a disk. Every pending checkpoint has a folder of its own, so that
writers never touch each other's files, dead or alive. Writing the pointer commits. If there must be no checkpoint
before, the store writes it on that condition, so that one of two writers wins. Replacing a checkpoint replaces the
pointer in one step and removes the old folder afterwards. A writer that finds its files deleted by a clean-up withdraws
its pointer.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterable, Awaitable, Callable, Collection, Iterator, Sequence
from functools import partial

import anyio
import numpy as np

from aiostage._arguments import check_flags, require_seconds
from aiostage._loop.coroutines import finish
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, MultiWriterCheckpoint, MultiWriterStorage, PendingCheckpoint, Reader
from aiostage.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    StorageError,
    shown,
)
from aiostage.format.manifest import MAX_MANIFEST_BYTES
from aiostage.storage.bucket import Bucket, RangeReader
from aiostage.storage.clean_up import clean_up, pending
from aiostage.storage.commit import MANIFEST_NAME
from aiostage.storage.files import check_file, check_names, is_plain_name
from aiostage.storage.pointer import (
    BEATS_PER_LEASE,
    FOLDER,
    HEARTBEAT_NAME,
    LEASE_NAME,
    POINTER_NAME,
    WITHDRAWN,
    Heartbeat,
    exchange_pointer,
    find_folder,
    find_pointer,
    has_lease,
    is_withdrawn,
    remove_folder,
    withdraw,
    write_lease,
    write_pointer,
)

__all__ = ["DEFAULT_LEASE_SECONDS", "RemoteStorage", "read_ranges"]

_RANGE_BYTES = 8 << 20
"""Bytes of one request. A guess: long enough that its latency does not count, short enough that several share the
work."""

_RANGES_AT_ONCE = 8
"""Requests of one read. A guess."""


async def read_ranges(read: Callable[[int, Buffer], Awaitable[int]], offset: int, into: Buffer) -> int:
    """Fill a buffer by several reads at once.

    Args:
        read: Fills a buffer from an offset and returns how many bytes there were.
        offset: The offset of the first byte.
        into: Writable.

    Returns:
        How many bytes there were.

    Raises:
        BaseException: The error of the first read that failed. The others are cancelled.
    """
    if into.nbytes <= _RANGE_BYTES:
        return await read(offset, into) if into.nbytes else 0
    starts = iter(range(0, into.nbytes, _RANGE_BYTES))
    count = 0

    # All tasks share the iterator. Each takes the next range when it is ready, so that a slow one delays no other.
    async def reader(starts: Iterator[int]) -> None:
        nonlocal count
        for start in starts:
            # In two steps: `count += await ...` would read count before the wait, and lose what others add meanwhile.
            found = await read(offset + start, into[start : start + _RANGE_BYTES])
            count += found

    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(_RANGES_AT_ONCE, -(-into.nbytes // _RANGE_BYTES))):
                group.start_soon(reader, starts)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return count


DEFAULT_LEASE_SECONDS = 3600.0
"""A guess: much longer than a store is out of reach, and short enough that stale files do not pile up."""

_TOKEN_BYTES = 8
"""64 random bits: no two writers choose one folder."""

_FILES_AT_ONCE = 2
"""Files of one pending checkpoint that are uploaded at once. A guess: each already has several parts on the way."""

_COPY_THREADS = 2
"""Threads that copy answers of a store into the caller's memory. A guess."""

_ATTEMPTS = 100
"""How often a race with another writer is retried before it is an error. An attempt only fails if that of another
process has succeeded."""

_log = logging.getLogger("aiostage")


class RemoteStorage(MultiWriterStorage):
    """Checkpoints in a bucket.

    Args:
        bucket: The store.
        lease_seconds: After so long without a heartbeat, :meth:`clean_up` takes a writer for dead.
    """

    def __init__(self, bucket: Bucket, *, lease_seconds: float = DEFAULT_LEASE_SECONDS) -> None:
        self._bucket = bucket
        self._lease_seconds = require_seconds("lease_seconds", lease_seconds, infinite=True)
        self._workers = Workers(_COPY_THREADS, "aiostage-remote")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._bucket.location!r})"

    @property
    def location(self) -> str:
        """The URL of the bucket and its prefix, without secrets."""
        return self._bucket.location

    async def open(self, name: str, *, overwrite: bool = False) -> MultiWriterCheckpoint:
        """Begin a checkpoint; see :meth:`aiostage.Storage.open`."""
        _check_name(name)
        check_flags(overwrite=overwrite)
        location = f"{self._bucket.location}/{name}"
        try:
            folder = await find_folder(self._bucket, name)
        except CheckpointCorruptError as error:
            raise CheckpointExistsError(
                f"{error} It is not replaced.",
                path=location,
                remedy="Choose another target, or remove what is there.",
            ) from error
        if folder is not None and not overwrite:
            raise _exists(location)
        pending = _RemoteCheckpoint(self._bucket, name, overwrite=overwrite, lease_seconds=self._lease_seconds)
        try:
            await pending.start()
        except BaseException as error:
            # A coroutine that is being closed may not wait. Its folder then has a lease without heartbeats, and a
            # clean-up removes it when the lease has run out.
            if not isinstance(error, GeneratorExit):
                await pending.abort()
            raise
        return pending

    async def attach(self, name: str, token: str) -> PendingCheckpoint:
        """Write to a checkpoint that another process has begun; see :meth:`aiostage.abc.MultiWriterStorage.attach`."""
        _check_name(name)
        if not isinstance(token, str) or not re.fullmatch(rf"[0-9a-f]{{{2 * _TOKEN_BYTES}}}", token):
            raise ValueError(f"{shown(token)} is not the token of a pending checkpoint: pass what token() has returned")
        return _RemoteCheckpoint(self._bucket, name, overwrite=False, lease_seconds=self._lease_seconds, attached=token)

    async def read(self, name: str) -> Reader:
        """Open a committed checkpoint; see :meth:`aiostage.Storage.read`."""
        _check_name(name)
        folder = await find_folder(self._bucket, name)
        if folder is None:
            raise CheckpointNotFoundError("there is no checkpoint.", path=f"{self._bucket.location}/{name}")
        return _RemoteReader(self._bucket, self._workers, name, folder)

    async def revision(self, name: str) -> str | None:
        """Tell whether a checkpoint was replaced, by one small request; see :meth:`aiostage.Storage.revision`."""
        _check_name(name)
        return await find_folder(self._bucket, name)

    async def list(self) -> Sequence[str]:
        """Return the names of all committed checkpoints; see :meth:`aiostage.Storage.list`."""
        end = f"/{POINTER_NAME}"
        pointers = [entry async for batch in self._bucket.list("") for entry in batch if entry.path.endswith(end)]
        return [
            name
            for name, nbytes in ((entry.path.removesuffix(end), entry.nbytes) for entry in pointers)
            if nbytes not in (None, len(WITHDRAWN)) or not await is_withdrawn(self._bucket, name)
        ]

    async def pending(self) -> Sequence[str]:
        """Return the names of all checkpoints that are being written; see :meth:`aiostage.Storage.pending`."""
        return await pending(self._bucket)

    async def is_link(self, name: str) -> bool:
        """Return whether a checkpoint is a link, which only stores on a disk have; see :meth:`aiostage.abc.Storage`."""
        _check_name(name)
        return await self._bucket.is_link(name)

    async def delete(self, name: str) -> None:
        """Remove a checkpoint; see :meth:`aiostage.Storage.delete`. Of a link to one, the link is removed."""
        _check_name(name)
        found = await find_folder(self._bucket, name)
        if found is None:
            return
        if await self._bucket.is_link(name):
            await self._bucket.unlink(name)
            return
        # The pointer first: no reader finds half of the files. If this ends here, a clean-up removes the folder.
        await self._bucket.delete([f"{name}/{POINTER_NAME}"])
        await remove_folder(self._bucket, f"{name}/{found}")

    async def prune_files(self, name: str, keep: Collection[str]) -> None:
        """Remove files of a checkpoint that are not named; see :meth:`aiostage.Storage.prune_files`."""
        _check_name(name)
        check_names(keep)
        pointed = await find_folder(self._bucket, name)
        if pointed is None:
            return
        folder = f"{name}/{pointed}"
        if await self._bucket.is_link(name) or await self._bucket.is_link(folder):
            # Its owner may need all of it.
            return
        stay = {f"{folder}/{file}" for file in (MANIFEST_NAME, LEASE_NAME, *keep)}
        found = [entry.path async for batch in self._bucket.list(folder) for entry in batch]
        await self._bucket.delete([path for path in found if path not in stay])

    async def clean_up(self) -> None:
        """Remove what dead writers have left behind; see :meth:`aiostage.Storage.clean_up`.

        A folder that no checkpoint points to is removed once nothing in it has been written for as long as its lease
        holds, and for ``lease_seconds`` of this storage, both by the store's own clock. A living writer renews its
        lease four times in that while.
        """
        await clean_up(self._bucket, self._lease_seconds)


class _RemoteCheckpoint(MultiWriterCheckpoint):
    """A folder that no pointer names yet."""

    def __init__(
        self, bucket: Bucket, name: str, *, overwrite: bool, lease_seconds: float, attached: str | None = None
    ) -> None:
        self._bucket = bucket
        self._name = name
        self._overwrite = overwrite
        # Attached: another process has opened this checkpoint, sends the heartbeats, and commits or removes it.
        self._attached = self._ended = attached is not None
        self._token = attached or secrets.token_hex(_TOKEN_BYTES)
        self._folder = f"data-{self._token}"
        self._path = f"{name}/{self._folder}"
        self._lease = write_lease(lease_seconds)
        self._interval = lease_seconds / BEATS_PER_LEASE
        # For stopping the heartbeat, which blocks until a beat that is under way has ended.
        self._workers = Workers(1, "aiostage-lease")
        self._heartbeat: Heartbeat | None = None
        self._files = anyio.Semaphore(_FILES_AT_ONCE)
        self._replaced: str | None = None
        self._committed = False

    @property
    def location(self) -> str:
        """Where the checkpoint is going to be."""
        return f"{self._bucket.location}/{self._name}"

    async def token(self) -> str:
        """Return what names the folder; see :meth:`aiostage.abc.MultiWriterCheckpoint.token`."""
        return self._token

    async def start(self) -> None:
        """Write the lease, and start the heartbeat."""
        await self._bucket.put(f"{self._path}/{LEASE_NAME}", memoryview(self._lease))
        # Each beat looks for the lease first. It ends when a clean-up has removed that, so it writes no folder anew.
        beat = partial(
            self._bucket.touch, f"{self._path}/{HEARTBEAT_NAME}", self._lease, beside=f"{self._path}/{LEASE_NAME}"
        )
        self._heartbeat = Heartbeat(beat, self._interval, "aiostage-heartbeat")

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        """Write one file; see :meth:`aiostage.PendingCheckpoint.write`."""
        check_file(name, nbytes)
        if name in (LEASE_NAME, HEARTBEAT_NAME):
            raise ValueError(f"{shown(name)} is a file of the storage itself; choose another name")
        async with self._files:
            await self._bucket.upload(f"{self._path}/{name}", nbytes, parts)

    async def commit(self, manifest: Buffer) -> None:
        """Write the manifest and then the pointer; see :meth:`aiostage.PendingCheckpoint.commit`."""
        if self._attached:
            raise CheckpointError("only the process that has opened it can commit it.", path=self.location)
        await self._bucket.put(f"{self._path}/{MANIFEST_NAME}", manifest)
        # Before the pointer: if a clean-up has removed the files, no reader shall find a pointer to them.
        if not await self._has_lease():
            raise self._expired()
        await self._point()
        # After it: a clean-up between the two looks has either seen the pointer, or removed the lease (see pointer.py).
        if not await self._has_lease() and not await self._is_succeeded():
            await finish(self._withdraw)
            raise self._expired()
        self._committed = True
        await finish(self._clean_up)

    async def abort(self) -> None:
        """Remove everything written, unless it was committed; see :meth:`aiostage.PendingCheckpoint.abort`."""
        # A second call repeats a clean-up that has failed half-way. Removing twice does no harm.
        if not self._ended:
            await finish(self._clean_up)

    async def _clean_up(self) -> None:
        """Remove the folder that no pointer names: the replaced one after a commit, else this writer's own."""
        # First: a beat that is under way would write its object after the removal.
        await self._stop_heartbeat()
        try:
            # A request that was cancelled, or whose answer was lost, may have written the pointer. The store knows.
            committed = self._committed or await self._is_committed()
            if committed and not self._committed and not await self._has_lease():
                # commit() did not come to its second look for the lease.
                await self._withdraw()
                committed = False
            stale = self._replaced if committed else self._folder
            if stale is not None:
                await remove_folder(self._bucket, f"{self._name}/{stale}")
        except CheckpointError as error:
            # Not raised: the checkpoint is committed, or given up, all the same. A clean-up finds what is left.
            _log.warning("could not remove what is left of %s: %s", self.location, error)
        self._ended = True

    async def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            await self._workers.run(self._heartbeat.stop)

    async def _point(self) -> None:
        """Write the pointer."""
        path = f"{self._name}/{POINTER_NAME}"
        for _ in range(_ATTEMPTS):
            old = await find_pointer(self._bucket, self._name)
            if old is not None and old.folder == self._folder:
                return
            if old is not None and old.folder is not None and not self._overwrite:
                raise _exists(self.location)
            self._replaced = old.folder if old is not None else None
            try:
                if old is None:
                    await self._create(path, write_pointer(self._folder))
                else:
                    replaced = (old.folder, *old.replaced) if old.folder is not None else ()
                    data = write_pointer(self._folder, replaced)
                    await exchange_pointer(self._bucket, self._name, data, old.version)
                return
            except (FileExistsError, StorageError) as error:
                # If an answer was lost, the client has sent the request again, and found its own pointer there.
                if await self._is_committed():
                    return
                if isinstance(error, StorageError):
                    raise
                # Stores also report a conflict with a write that failed afterwards. Look again.
        raise CheckpointError("other writers replaced it during each attempt.", path=self.location)

    async def _create(self, path: str, data: Buffer) -> None:
        """Write the pointer where there is none."""
        try:
            await self._bucket.create(path, data)
        except NotImplementedError as error:
            if not self._overwrite:
                raise StorageError(
                    "the store cannot write an object only where there is none, so it cannot tell writers apart.",
                    path=self.location,
                    remedy="Allow it conditional writes (conditional_put), or pass overwrite=True.",
                ) from error
            await self._bucket.put(path, data)

    async def _is_committed(self) -> bool:
        """Return whether the pointer is this pending checkpoint's."""
        return await find_folder(self._bucket, self._name) == self._folder

    async def _is_succeeded(self) -> bool:
        """Return whether another process has replaced or deleted this checkpoint since its pointer was written.

        That removes the lease too. The checkpoint was committed: its successors name it. A pointer that a clean-up has
        withdrawn, and what has replaced that, do not.
        """
        pointer = await find_pointer(self._bucket, self._name)
        return pointer is None or self._folder in pointer.replaced

    async def _has_lease(self) -> bool:
        return await has_lease(self._bucket, self._path)

    async def _withdraw(self) -> None:
        await withdraw(self._bucket, self._name, self._folder)

    def _expired(self) -> CheckpointError:
        return CheckpointError(
            "its files were deleted by another process because its heartbeat expired.",
            path=self.location,
            remedy="Give all who write here the same, longer lease_seconds.",
        )


class _RemoteReader(RangeReader):
    """A folder that a pointer named when it was opened."""

    def __init__(self, bucket: Bucket, workers: Workers, name: str, folder: str) -> None:
        self._bucket = bucket
        self._workers = workers
        self._name = name
        self._folder = folder

    @property
    def location(self) -> str:
        """Where the checkpoint is."""
        return f"{self._bucket.location}/{self._name}"

    @property
    def reads_at_once(self) -> int:
        """As many as the bucket likes."""
        return self._bucket.reads_at_once

    async def manifest(self) -> Buffer:
        """Return the contents of the manifest; see :meth:`aiostage.Reader.manifest`."""
        try:
            found = await self._bucket.get(self._path(MANIFEST_NAME), at_most=MAX_MANIFEST_BYTES)
        except FileNotFoundError as error:
            raise await self._missing(MANIFEST_NAME) from error
        return found.data

    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes; see :meth:`aiostage.Reader.size`."""
        try:
            return await self._bucket.size(self._path(name))
        except FileNotFoundError as error:
            raise await self._missing(name) from error

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a writable buffer with a range of a file; see :meth:`aiostage.Reader.read`."""
        path = self._path(name)
        try:
            count = await read_ranges(partial(self._fill, path), offset, into)
        except FileNotFoundError as error:
            raise await self._missing(name) from error
        self._check_end(path, offset, into.nbytes, count)

    async def _fill(self, path: str, offset: int, into: Buffer) -> int:
        """Copy a range of an object into a buffer; return how many bytes there were."""
        data = await self._bucket.get_range(path, offset, into.nbytes)
        if data.nbytes:
            target = np.frombuffer(into[: data.nbytes], np.uint8)
            await self._workers.run(partial(np.copyto, target, np.frombuffer(data, np.uint8)))
        return data.nbytes

    async def get_range(self, name: str, offset: int, nbytes: int) -> Buffer | None:
        """Return a range of a file, without copying it; see :meth:`RangeReader.get_range`."""
        # Several requests fill one buffer only by copying.
        if not 0 < nbytes <= _RANGE_BYTES:
            return None
        path = self._path(name)
        try:
            data = await self._bucket.get_range(path, offset, nbytes)
        except FileNotFoundError as error:
            raise await self._missing(name) from error
        self._check_end(path, offset, nbytes, data.nbytes)
        return data

    def _check_end(self, path: str, offset: int, nbytes: int, count: int) -> None:
        if count < nbytes:
            raise CheckpointCorruptError(
                f"it ends before byte {offset + nbytes}.", path=f"{self._bucket.location}/{path}"
            )

    async def modified(self) -> float | None:
        """Return when the manifest was written; see :meth:`aiostage.Reader.modified`."""
        path = self._path(MANIFEST_NAME)
        # Through the folder: stores list what is below a prefix, so a listing of the object's own name is empty.
        async for entries in self._bucket.list(f"{self._name}/{self._folder}"):
            for entry in entries:
                if entry.path == path:
                    return entry.modified.timestamp() if entry.modified is not None else None
        return None

    async def aclose(self) -> None:
        """Do nothing: nothing is held."""

    def _path(self, name: str) -> str:
        if not is_plain_name(name):
            raise CheckpointCorruptError(f"{shown(name)} is not a plain name for a file.", path=self.location)
        return f"{self._name}/{self._folder}/{name}"

    async def _missing(self, name: str) -> CheckpointError:
        """Return the error that says why a file is not there."""
        folder = await find_folder(self._bucket, self._name)
        if folder is None:
            return CheckpointNotFoundError("it was deleted while it was being read.", path=self.location)
        if folder != self._folder:
            return CheckpointNotFoundError("it was replaced while it was being read.", path=self.location)
        return CheckpointCorruptError("the file is missing.", path=f"{self._bucket.location}/{self._path(name)}")


def _check_name(name: str) -> None:
    """Refuse names that would lead elsewhere.

    Raises:
        TypeError: If it is not a str.
        ValueError: If it is not a relative path of plain steps.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a checkpoint is a str, not {shown(name)}")
    for step in name.split("/"):
        if step in ("", ".", "..") or not step.isprintable() or FOLDER.fullmatch(step) or step == POINTER_NAME:
            raise ValueError(f"{shown(name)} is not a name for a checkpoint: {shown(step)} cannot be a step of it")


def _exists(location: str) -> CheckpointExistsError:
    return CheckpointExistsError(
        "there is already a checkpoint.", path=location, remedy="Choose another target or pass overwrite=True."
    )
