"""Checkpoints in file systems of fsspec. These block, so their calls run in worker threads."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from anyio.lowlevel import checkpoint

from aiostage._arguments import require_text
from aiostage._extras import needed_for
from aiostage._loop.coroutines import finish
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer
from aiostage.errors import CheckpointCorruptError, CheckpointError, StorageError, shown
from aiostage.storage.bucket import PATHS_PER_BATCH, Bucket, ObjectMeta, StoredObject, Version
from aiostage.storage.files import locked_directory
from aiostage.storage.remote import DEFAULT_LEASE_SECONDS, RemoteStorage

__all__ = ["FsspecStorage"]

_THREADS = 8
"""Requests at once. A guess: each thread of a remote file system only waits."""


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links."""

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
"""Keys under which file systems give the time of the last change."""

T = TypeVar("T")


class FsspecStorage(RemoteStorage):
    """Checkpoints in a file system of fsspec.

    Slower than :class:`~aiostage.storage.ObjectStorage` and :class:`~aiostage.storage.LocalStorage`, because every
    file system copies what it is given. It is only as atomic as the file system. One of two writers wins with fsspec's
    ``LocalFileSystem``, and where ``pipe_file(mode="create")`` writes a file only if there is none, as for S3 and
    Google Cloud Storage. With others, two writers that commit at the same moment may both succeed; the later one's
    checkpoint stays.

    A call that a cancelled task is waiting for goes on to its end before the task is cancelled.

    Args:
        filesystem: One of fsspec's, or what follows its interface.
        root: Path below which everything is.
        lease_seconds: See :class:`~aiostage.storage.ObjectStorage`. Where the file system does not tell when a file was
            changed, :meth:`clean_up` removes nothing.
    """

    def __init__(
        self, filesystem: Any, root: str | os.PathLike[str] = "", *, lease_seconds: float = DEFAULT_LEASE_SECONDS
    ) -> None:
        if isinstance(filesystem, type) or not hasattr(filesystem, "unstrip_protocol"):
            raise TypeError(f"filesystem must be a file system of fsspec, not {shown(filesystem)}")
        if isinstance(root, os.PathLike):
            root = os.fspath(root)
        require_text("root", root)
        location = str(filesystem.unstrip_protocol(root)).rstrip("/")
        bucket = _FsspecBucket(lambda: (filesystem, filesystem._strip_protocol(root)), location)
        super().__init__(bucket, lease_seconds=lease_seconds)

    @classmethod
    def from_url(cls, url: str, *, lease_seconds: float = DEFAULT_LEASE_SECONDS, **options: Any) -> FsspecStorage:
        """Return the storage that a URL names.

        Args:
            url: As fsspec takes them, chains such as ``"simplecache::gs://bucket/prefix"`` included; it may begin with
                ``"fsspec+"``.
            lease_seconds: See the class.
            options: For the file system, as ``fsspec.core.url_to_fs`` takes them.

        Returns:
            The storage. The file system is made when it is first needed.
        """
        require_text("url", url)
        plain = url.removeprefix("fsspec+")
        storage = cls.__new__(cls)
        bucket = _FsspecBucket(partial(_open_url, plain, options), plain.rstrip("/"))
        RemoteStorage.__init__(storage, bucket, lease_seconds=lease_seconds)
        return storage


class _FsspecBucket(Bucket):
    """A file system of fsspec."""

    def __init__(self, make: Callable[[], tuple[Any, str]], location: str) -> None:
        self._make = make
        self._location = location
        self._made: tuple[Any, str] | None = None
        self._workers = Workers(_THREADS, "aiostage-fsspec")

    @property
    def location(self) -> str:
        return self._location

    @property
    def reads_at_once(self) -> int:
        return _THREADS

    async def get(self, path: str, *, at_most: int) -> StoredObject:
        data = await self._run(path, partial(_head, nbytes=at_most + 1))
        if len(data) > at_most:
            raise CheckpointCorruptError(f"it is longer than {at_most} bytes.", path=f"{self._location}/{path}")
        return StoredObject(memoryview(data), Version(bytes(data)))

    async def size(self, path: str) -> int:
        return await self._run(path, _size)

    async def get_range(self, path: str, offset: int, nbytes: int) -> Buffer:
        def cat(fs: Any, full: str) -> Buffer:
            if offset >= _size(fs, full):
                return memoryview(b"")
            data = memoryview(fs.cat_file(full, start=offset, end=offset + nbytes)).cast("B")
            if data.nbytes > nbytes:
                raise OSError(f"expected {nbytes} bytes, got {data.nbytes}")
            return data

        return await self._run(path, cat)

    async def put(self, path: str, data: Buffer) -> None:
        def put(fs: Any, full: str) -> None:
            fs.makedirs(fs._parent(full), exist_ok=True)
            _put(fs, full, bytes(data))

        await self._run(path, put)

    async def create(self, path: str, data: Buffer) -> None:
        await self._run(path, partial(_create, data=bytes(data)))

    async def replace(self, path: str, data: Buffer, seen: Version) -> None:
        # Of all file systems of fsspec, only a disk can compare what it replaces: it has locks.
        if not await self._run(path, partial(_replace, data=bytes(data), seen=seen.tag)):
            raise NotImplementedError

    async def upload(self, path: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        # Kept in a list: a cancelled call loses what it returns, and the file would stay open.
        opened: list[Any] = []
        sent = 0
        try:
            await self._run(path, lambda fs, full: opened.append(_open(fs, full)))
            async for part in parts:
                sent += part.nbytes
                if sent > nbytes:
                    break
                await self._run(path, partial(_write, opened[0], part))
                # Nothing may refer to the part while the next one is waited for.
                del part
            if sent != nbytes:
                raise CheckpointError(
                    f"expected {nbytes} bytes, but its parts have {sent}.", path=f"{self._location}/{path}"
                )
            await self._run(path, lambda _, __: opened[0].close())
        except BaseException as error:
            # A coroutine that is being closed may not wait.
            if opened and not isinstance(error, GeneratorExit):
                await finish(lambda: self._workers.run(partial(_give_up, opened[0])))
            raise

    async def list(self, prefix: str) -> AsyncIterator[Sequence[ObjectMeta]]:
        def find(fs: Any, full: str) -> list[Sequence[ObjectMeta]]:
            _, root = self._filesystem()
            start = len(root.rstrip("/")) + 1
            found = fs.find(full, detail=True).items()
            entries = [ObjectMeta(name[start:], _modified(info), info.get("size")) for name, info in found]
            return [entries[first : first + PATHS_PER_BATCH] for first in range(0, len(entries), PATHS_PER_BATCH)]

        try:
            batches = await self._run(prefix, find)
        except FileNotFoundError:
            return
        for batch in batches:
            yield batch
            await checkpoint()

    async def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                await self._run(path, lambda fs, full: fs.rm_file(full))

    async def is_link(self, path: str) -> bool:
        return await self._run(path, lambda fs, full: _is_local(fs) and os.path.islink(full))

    async def unlink(self, path: str) -> None:
        with suppress(FileNotFoundError):
            await self._run(path, lambda _, full: os.unlink(full))

    def touch(self, path: str, data: bytes, *, beside: str) -> None:
        fs, root = self._filesystem()
        root = root.rstrip("/")
        with self._translated(path):
            # File systems keep listings. An old one still has what other processes have removed.
            fs.invalidate_cache()
            fs.info(f"{root}/{beside}")
            _put(fs, f"{root}/{path}", data)

    async def _run(self, path: str, call: Callable[[Any, str], T]) -> T:
        """Run a call with the file system and a full path in a worker thread."""

        def step() -> T:
            with self._translated(path):
                fs, root = self._filesystem()
                # File systems keep listings. An old one has no changes of other processes.
                fs.invalidate_cache()
                return call(fs, f"{root.rstrip('/')}/{path}" if path else root)

        return await self._workers.run(step)

    def _filesystem(self) -> tuple[Any, str]:
        """Return the file system and the path of the root in it. May block."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        """Turn the errors of a file system into those of a bucket."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, CheckpointError, ModuleNotFoundError):
            raise
        except Exception as error:
            raise StorageError(
                f"{type(error).__name__}: {error}", path=f"{self._location}/{path}" if path else self._location
            ) from error


def _open_url(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. Blocks: importing fsspec alone reads files."""
    with needed_for(url):
        from fsspec.core import split_protocol, url_to_fs
        from fsspec.registry import known_implementations, registry
    scheme = split_protocol(url.partition("::")[0])[0]
    if scheme is not None and scheme not in known_implementations and scheme not in registry:
        raise StorageError(
            f"there is no file system for {scheme}:// URLs.",
            path=url,
            remedy="Use a path, s3://, gs://, az://, or a scheme that fsspec.available_protocols() lists.",
        )
    made: tuple[Any, str] = url_to_fs(url, **options)
    return made


def _size(fs: Any, full: str) -> int:
    info = fs.info(full)
    if info["type"] != "file":
        raise FileNotFoundError(full)
    return int(info["size"])


def _head(fs: Any, full: str, nbytes: int) -> bytes:
    """Return the first bytes of a file."""
    try:
        data: bytes = fs.cat_file(full, start=0, end=nbytes)
    except FileNotFoundError:
        raise
    except Exception:
        # HTTP servers answer a request for a range of an empty file with an error, which each client words its own way.
        if _size(fs, full) > 0:
            raise
        return b""
    return data


def _put(fs: Any, full: str, data: bytes) -> None:
    """Write a file whose folder is there."""
    if _is_local(fs):
        with _pending(full, data) as pending:
            os.replace(pending, full)
    else:
        fs.pipe_file(full, data)


def _create(fs: Any, full: str, data: bytes) -> None:
    """Write a file where there is none."""
    # Looked for first, because some file systems ignore the mode below.
    if fs.exists(full):
        raise FileExistsError(full)
    fs.makedirs(fs._parent(full), exist_ok=True)
    if not _is_local(fs):
        fs.pipe_file(full, data, mode="create")
        return
    with _pending(full, data) as pending:
        try:
            # Unlike a rename, a link never replaces a file, and the file appears as a whole.
            os.link(pending, full)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # For a moment the file is there and not whole. But only one of two writers can have made it.
            with open(full, "xb") as file:
                file.write(data)


def _replace(fs: Any, full: str, data: bytes, seen: bytes) -> bool:
    """Write a file in place of one with the contents seen; return False where they cannot be compared."""
    if not _is_local(fs):
        return False
    try:
        with locked_directory(os.path.dirname(full)) as comparing:
            if comparing:
                with open(full, "rb") as file:
                    if file.read() != seen:
                        raise FileExistsError(full)
                _put(fs, full, data)
            return comparing
    except FileNotFoundError as error:
        raise FileExistsError(full) from error


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


@contextmanager
def _pending(full: str, data: bytes) -> Iterator[str]:
    """Write a local file beside a path, to be renamed or linked there.

    fsspec itself truncates a local file and then fills it, so that a reader may find a part of it. The folder is named
    like that of a pending checkpoint: if this process dies here, a clean-up removes it as stale.
    """
    folder = f"{os.path.dirname(full)}/data-{secrets.token_hex(8)}"
    pending = f"{folder}/pending"
    os.mkdir(folder)
    try:
        with open(pending, "xb") as file:
            file.write(data)
        yield pending
    finally:
        with suppress(FileNotFoundError):
            os.remove(pending)
        os.rmdir(folder)


def _open(fs: Any, full: str) -> Any:
    fs.makedirs(fs._parent(full), exist_ok=True)
    return fs.open(full, "wb")


def _write(file: Any, part: Buffer, fs: Any, full: str) -> None:
    while part:
        # Some take all of it and return nothing, others say how much they took.
        part = part[file.write(part) or part.nbytes :]


def _give_up(file: Any) -> None:
    """Close an unfinished file. No reader looks for its bytes; they are removed with the folder."""
    # Not every kind of file has discard(), and errors of closing do not matter: the upload's own error is raised.
    with suppress(Exception):
        file.discard()
    with suppress(Exception):
        file.close()


def _modified(info: Mapping[str, Any]) -> datetime | None:
    """Return when a file was changed, however its file system says so."""
    value = next((info[key] for key in _TIMES if info.get(key) is not None), None)
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, UTC)
    if isinstance(value, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
