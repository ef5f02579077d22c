"""Checkpoints in object stores: S3 and what speaks its language, Google Cloud Storage, Azure, memory."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from aiostage._arguments import require_text
from aiostage._loop.coroutines import finish
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, CheckpointError, StorageError, said, shown
from aiostage.storage.bucket import PATHS_PER_BATCH, Bucket, ObjectMeta, StoredObject, Version
from aiostage.storage.files import locked_directory
from aiostage.storage.remote import DEFAULT_LEASE_SECONDS, RemoteStorage

__all__ = ["ObjectStorage", "translate", "worded"]

_MIN_REQUEST_BYTES = 5 << 20
"""Bytes that S3 demands of every request of a multipart upload but the last."""

_MAX_REQUESTS = 10_000
"""Requests that S3 accepts for one object."""

_IN_FLIGHT = 8
"""Requests of one upload at once. A guess."""

_READS_AT_ONCE = 16
"""Requests of one load at once, of a part each. One gets 50 to 100 MB/s from S3 by its documents, after tens of
milliseconds in which nothing comes."""

_SCHEME_OF = {"gcs": "gs", "azure": "az"}

_THREADS = 2
"""Threads that set up stores, and do what is done on a disk. A guess."""


# The threads of obstore drop Python objects a little after they have answered. If the interpreter is gone by then, the
# process aborts: 8 of 60 programs that ended right after an upload did, and none with this pause.
atexit.register(time.sleep, 0.02)

_log = logging.getLogger("aiostage")

_memories: dict[str, ObjectStore] = {}
"""The stores of ``memory://`` URLs, by name, so that one process finds again what it has written."""

_process: int | None = None
"""The process that has obstore's threads, once there are any."""


class ObjectStorage(RemoteStorage):
    """Checkpoints in an object store, through obstore. Needs asyncio: obstore cannot be awaited on trio.

    What is sent comes straight from the memory handed in. Files of more than one part are multipart uploads of at most
    eight requests at once, two files at a time. Retries, time limits, credentials and encryption are the store's own
    configuration.

    Args:
        store: A store of obstore; what its own options and the environment say goes.
        prefix: Below which everything is.
        lease_seconds: After so long without a heartbeat, :meth:`clean_up` takes a writer for dead.
            Living ones give four in that while, from a thread of their own.
    """

    def __init__(self, store: ObjectStore, prefix: str = "", *, lease_seconds: float = DEFAULT_LEASE_SECONDS) -> None:
        require_text("prefix", prefix)
        prefix = prefix.strip("/")
        location = _location(store)
        bucket = _ObjectBucket(lambda: store, prefix, f"{location.removesuffix('/')}/{prefix}" if prefix else location)
        super().__init__(bucket, lease_seconds=lease_seconds)

    @classmethod
    def from_url(cls, url: str, *, lease_seconds: float = DEFAULT_LEASE_SECONDS, **options: Any) -> ObjectStorage:
        """Return the storage that a URL names.

        Args:
            url: For example ``"s3://bucket/prefix"``, ``"gs://bucket/prefix"``, ``"az://container/prefix"``, or
                ``"memory://name/prefix"``, which is there for one process and as long as that lives.
            lease_seconds: See the class.
            options: For the store, as ``obstore.store.from_url`` takes them: ``region``, ``endpoint``,
                ``retry_config``, ``client_options``, ... Without any, the environment says.

        Returns:
            The storage. The store itself, which takes some milliseconds to set up, is made when it is first needed.

        Raises:
            TypeError: If it is not text.
            ValueError: If the URL names no bucket.
        """
        require_text("url", url)
        parts = urlsplit(url)
        if not parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"{shown(url)} is not the URL of a bucket; its form is s3://bucket/prefix")
        prefix = parts.path.strip("/")
        if parts.scheme == "memory":
            store = _memories.setdefault(parts.netloc, MemoryStore())
            bucket = _ObjectBucket(lambda: store, prefix, url.rstrip("/"))
        else:
            bucket = _ObjectBucket(partial(from_url, url, **options), "", url.rstrip("/"))
        storage = cls.__new__(cls)
        RemoteStorage.__init__(storage, bucket, lease_seconds=lease_seconds)
        return storage


class _ObjectBucket(Bucket):
    """A store of obstore.

    A future of obstore is cancelled only if the outcome of the request does not matter. A cancelled beginning of an
    upload would leave an upload whose id is lost, and a small object of a cancelled request may still appear.
    """

    def __init__(self, make: Callable[[], ObjectStore], prefix: str, location: str) -> None:
        self._make = make
        self._prefix = f"{prefix}/" if prefix else ""
        self._location = location
        self._store: ObjectStore | None = None
        self._workers = Workers(_THREADS, "aiostage-objects")

    @property
    def location(self) -> str:
        return self._location

    @property
    def reads_at_once(self) -> int:
        return _READS_AT_ONCE

    async def get(self, path: str, *, at_most: int) -> StoredObject:
        store = await self._connected()
        with self._translated(path):
            result = await _answered(obstore.get_async(store, self._prefix + path))
            meta = result.meta
            if meta["size"] > at_most:
                raise CheckpointCorruptError(
                    f"it has {meta['size']} bytes; at most {at_most} were expected.", path=f"{self._location}/{path}"
                )
            data = await _answered(result.bytes_async())
        return StoredObject(memoryview(data), Version({key: meta[key] for key in ("e_tag", "version") if meta[key]}))

    async def size(self, path: str) -> int:
        store = await self._connected()
        with self._translated(path):
            return int((await _answered(obstore.head_async(store, self._prefix + path)))["size"])

    async def get_range(self, path: str, offset: int, nbytes: int) -> Buffer:
        store = await self._connected()
        try:
            with self._translated(path):
                data = memoryview(
                    await _answered(obstore.get_range_async(store, self._prefix + path, start=offset, length=nbytes))
                )
        except StorageError:
            # Each store has an error of its own for a range that begins after the end.
            if offset >= await self.size(path):
                return memoryview(b"")
            raise
        if data.nbytes > nbytes:
            raise StorageError(
                f"expected {nbytes} bytes from the store, got {data.nbytes}.", path=f"{self._location}/{path}"
            )
        return data

    async def put(self, path: str, data: Buffer) -> None:
        await self._put(path, data, "overwrite")

    async def create(self, path: str, data: Buffer) -> None:
        await self._put(path, data, "create")

    async def replace(self, path: str, data: Buffer, seen: Version) -> None:
        # Without a tag, obstore would replace any object. An answer of a server need not have one.
        if not seen.tag:
            raise NotImplementedError
        try:
            await self._put(path, data, seen.tag)
        except NotImplementedError:
            full = await self._on_disk(path)
            if full is None or not await self._workers.run(partial(self._replace_on_disk, full, path, data, seen)):
                raise

    async def upload(self, path: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        store = await self._connected()
        writer: obstore.AsyncWritableFile | None = None
        capacity = sent = 0
        closing = False
        try:
            async for part in parts:
                if writer is None:
                    capacity = _request_bytes(nbytes, part.nbytes)
                    writer = self._writer(store, path, capacity)
                # This part fills the first request. obstore then starts the multipart upload.
                begins = sent < capacity <= sent + part.nbytes
                sent += part.nbytes
                if sent > nbytes:
                    break
                with self._translated(path):
                    # Nothing may refer to the part while the next one is awaited, so that its memory is free once it is
                    # sent. Nor may this frame refer to the future: if it fails, its traceback leads back to this frame.
                    written = [writer.write(part)]
                    del part
                    await (_settled(written.pop()) if begins else _answered(written.pop()))
            if sent != nbytes:
                raise CheckpointError(
                    f"expected {nbytes} bytes, but its parts have {sent}.", path=f"{self._location}/{path}"
                )
            writer = writer if writer is not None else self._writer(store, path, 1)
            closing = True
            with self._translated(path):
                await _settled(writer.close())
        except BaseException as error:
            # obstore itself aborts if closing fails. A coroutine that is being closed may not wait.
            if writer is not None and not closing and not isinstance(error, GeneratorExit):
                try:
                    await _settled(writer.__aexit__(type(error), error, None))
                except (BaseError, OSError) as failure:
                    _log.warning(
                        "could not abort the multipart upload of %s/%s: %s. It stays until a lifecycle rule of the "
                        "bucket aborts it (AbortIncompleteMultipartUpload).",
                        self._location,
                        path,
                        said(failure),
                    )
            raise

    async def list(self, prefix: str) -> AsyncIterator[Sequence[ObjectMeta]]:
        store = await self._connected()
        with self._translated(prefix):
            batches = obstore.list(store, (self._prefix + prefix) or None, chunk_size=PATHS_PER_BATCH)
        while True:
            with self._translated(prefix):
                try:
                    metas = await _answered(anext(batches))
                except StopAsyncIteration:
                    return
            yield [
                ObjectMeta(meta["path"].removeprefix(self._prefix), meta["last_modified"], meta["size"])
                for meta in metas
            ]

    async def delete(self, paths: Sequence[str]) -> None:
        store = await self._connected()
        if not paths:
            return
        try:
            with self._translated(paths[0]):
                # Awaited to its end: the store may execute a cancelled deletion later, on what was written meanwhile.
                await _settled(obstore.delete_async(store, [self._prefix + path for path in paths]))
        except FileNotFoundError:
            # Some stores stop at the first path that is not there. One request for each path deletes the others.
            for path in paths:
                with suppress(FileNotFoundError), self._translated(path):
                    await _settled(obstore.delete_async(store, self._prefix + path))

    async def is_link(self, path: str) -> bool:
        full = await self._on_disk(path)
        return full is not None and await self._workers.run(partial(os.path.islink, full))

    async def unlink(self, path: str) -> None:
        full = await self._on_disk(path)
        if full is not None:
            with suppress(FileNotFoundError):
                await self._workers.run(partial(os.unlink, full))

    async def _on_disk(self, path: str) -> str | None:
        """Return where a path is in the file system, if the store is a directory."""
        store = await self._connected()
        return os.path.join(store.prefix or "/", self._prefix + path) if isinstance(store, LocalStore) else None

    def _replace_on_disk(self, full: str, path: str, data: Buffer, seen: Version) -> bool:
        """Compare and write with a lock held, because a disk has locks; return False where it has none. Blocks."""
        store = self._store or self._make()
        is_seen = True
        try:
            with self._translated(path), locked_directory(os.path.dirname(full)) as comparing:
                if comparing:
                    is_seen = obstore.head(store, self._prefix + path)["e_tag"] == seen.tag.get("e_tag")
                if comparing and is_seen:
                    obstore.put(store, self._prefix + path, data, use_multipart=False)
        except FileNotFoundError:
            is_seen = False
        if not is_seen:
            raise FileExistsError(f"{self._location}/{path}")
        return comparing

    def touch(self, path: str, data: bytes, *, beside: str) -> None:
        # In the heartbeat's thread, so without _connected(), which needs an event loop.
        store = self._store or self._make()
        with self._translated(path):
            obstore.head(store, self._prefix + beside)
            obstore.put(store, self._prefix + path, data, use_multipart=False)

    async def _put(self, path: str, data: Buffer, mode: Any) -> None:
        store = await self._connected()
        with self._translated(path, conditional=mode != "overwrite"):
            await _settled(obstore.put_async(store, self._prefix + path, data, mode=mode, use_multipart=False))

    def _writer(self, store: ObjectStore, path: str, capacity: int) -> obstore.AsyncWritableFile:
        return obstore.open_writer_async(store, self._prefix + path, buffer_size=capacity, max_concurrency=_IN_FLIGHT)

    async def _connected(self) -> ObjectStore:
        """Return the store."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise CheckpointError(
                "obstore cannot be awaited on trio.", path=self._location, remedy="Run on asyncio or uvloop."
            ) from None
        _check_process(self._location)
        if self._store is None:
            try:
                self._store = await self._workers.run(self._make)
            except (BaseError, ValueError, TypeError, OSError) as error:
                raise StorageError(f"the store cannot be set up: {worded(error)}", path=self._location) from error
        return self._store

    @contextmanager
    def _translated(self, path: str, *, conditional: bool = False) -> Iterator[None]:
        """Turn the errors of obstore into those of a bucket."""
        try:
            yield
        except Exception as error:
            meaning = translate(error, f"{self._location}/{path}" if path else self._location, conditional=conditional)
            if meaning is error:
                raise
            raise meaning from error


def _check_process(location: str) -> None:
    """Refuse to wait for threads that a fork has left behind. obstore has one set of threads for all stores."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise CheckpointError(
            "obstore was in use when this process was forked, and would never answer here.",
            path=location,
            remedy='Start processes with multiprocessing\'s "spawn" or "forkserver".',
        )


def _request_bytes(nbytes: int, part_bytes: int) -> int:
    """Return how many bytes each request of an upload carries: one part, or as few as the store's limits allow.

    Few, because a part is held until its request is full, and the source may need its memory for the next part.
    """
    if nbytes <= part_bytes:
        # One byte more than there is, so that obstore sends one plain request and no multipart upload.
        return nbytes + 1
    wanted = max(_MIN_REQUEST_BYTES, math.ceil(nbytes / _MAX_REQUESTS))
    return math.ceil(wanted / part_bytes) * part_bytes


async def _answered(future: Any) -> Any:
    """Wait for the answer to a request, and give the request up if the wait ends without one."""
    try:
        return await future
    finally:
        future.cancel()
        # A failed future holds its exception, and its traceback holds this frame. Without the next line they would keep
        # each other, and the part that was sent, until the garbage collector runs.
        del future


async def _settled(future: Any) -> Any:
    """Wait until a request has an outcome. It is shielded from cancellation, which is delivered afterwards."""
    waiting = [future]
    # As in _answered(): no frame of the traceback may refer to the future.
    del future
    try:
        return await finish(lambda: asyncio.shield(waiting[0]))
    finally:
        waiting.clear()


def _location(store: ObjectStore) -> str:
    """Return where a store is, as a person would write it."""
    kind = type(store).__name__.removesuffix("Store").lower()
    config = getattr(store, "config", {})
    name = config.get("bucket") or config.get("container_name")
    steps = [str(step).strip("/") for step in (name, getattr(store, "prefix", None)) if step]
    return f"{_SCHEME_OF.get(kind, kind)}://{'/'.join(steps)}"


_ANSWER = re.compile(r"(?:<\?xml[^>]*>\s*)?<Error>.*<Code>(.*?)</Code>\s*<Message>(.*?)</Message>.*</Error>", re.DOTALL)
"""The XML that S3 and Azure send beside a status."""

_CAUSE = re.compile(r'(?:message|error): "([^"]+)"')
"""Why there is no connection. Only the debug output of Rust's structures has it."""

_NO_BUCKET = re.compile(r"\b(?:NoSuchBucket|ContainerNotFound)\b")

_HINTS = (
    (_NO_BUCKET, "Make the bucket, or check its name and the endpoint."),
    (
        re.compile(r"/latest/(?:api/token|meta-data)"),
        "No credentials were found, neither in the environment (AWS_ACCESS_KEY_ID, ...) nor a role of this machine. "
        "Profiles in ~/.aws are not looked at: for these pass an S3Store with "
        "credential_provider=obstore.auth.boto3.Boto3CredentialProvider().",
    ),
    (
        re.compile(r"/metadata/identity|/computeMetadata/"),
        "No credentials were found, neither in the environment nor a role of this machine.",
    ),
    (
        re.compile(r"source: BadScheme"),
        'Use https://, or allow plain HTTP with client_options={"allow_http": True} or AWS_ALLOW_HTTP=true.',
    ),
    (
        re.compile(r"kind: Timeout"),
        "A request took longer than it may. Where the network is slow, allow more: "
        'client_options={"timeout": "5 minutes"}.',
    ),
)


def worded(error: BaseException) -> str:
    """Return the message of an error as a sentence, without the debug output but with the cause from it."""
    said, _, inner = str(error).partition("\n\nDebug source:")
    text = " ".join(_ANSWER.sub(r"\1: \2", said).split()).rstrip(".")
    cause = _CAUSE.search(inner) if text.endswith("error sending request") else None
    return f"{text}: {cause[1]}." if cause is not None else f"{text}."


def translate(error: Exception, location: str, *, conditional: bool = True) -> Exception:
    """Translate an error of a store into one of a bucket.

    Args:
        error: Any error.
        location: The object that it is about.
        conditional: Whether the request had a condition. Without one, 409 and 412 are failures of the store.

    Returns:
        The error itself, or another one to be raised from it.
    """
    if isinstance(error, CheckpointError) or not isinstance(error, BaseError | OSError):
        return error
    if isinstance(error, FileNotFoundError) and not _NO_BUCKET.search(str(error)):
        return error
    if isinstance(error, AlreadyExistsError | PreconditionError) and conditional:
        return FileExistsError(f"{location}: {worded(error)}")
    remedy = next((remedy for sign, remedy in _HINTS if sign.search(str(error))), None)
    if remedy is None and isinstance(error, PermissionDeniedError | UnauthenticatedError):
        remedy = "Check the credentials, what they allow, and the endpoint."
    return StorageError(worded(error), path=location, remedy=remedy)
