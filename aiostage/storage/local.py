"""Checkpoints on a local disk: written past the page cache from worker threads, on the disk before they appear."""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Callable, Collection, Sequence
from functools import partial
from threading import Lock

from aiostage._arguments import check_flags
from aiostage._loop.coroutines import finish
from aiostage._loop.workers import Workers
from aiostage.abc import Buffer, MultiWriterCheckpoint, MultiWriterStorage, PendingCheckpoint, Reader
from aiostage.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError, shown
from aiostage.format.manifest import MAX_MANIFEST_BYTES
from aiostage.observe import span
from aiostage.storage.commit import (
    MANIFEST_NAME,
    PendingDirectory,
    attached_path,
    check_target,
    clean_up_below,
    committed_below,
    delete_committed,
    open_committed,
    pending_below,
    prune_committed,
)
from aiostage.storage.files import (
    Descriptor,
    InputFile,
    OutputFile,
    aligned_memory,
    check_file,
    check_names,
    is_current,
    is_plain_name,
)

__all__ = ["LocalReader", "LocalStorage"]

_IO_THREADS = 2
"""Measured on a local disk: a second thread fills the pauses of the first, more threads gain nothing."""

_READ_THREADS = 3
"""The disk has two reads under way while the third thread waits for a core or the GIL: with digests and copies beside
them, 2 GiB came from the disk in 0.95 to 0.99 s, and with two threads in 1.08 to 1.10. A fourth gained nothing."""

_PARTS_AT_ONCE = _IO_THREADS + 1
"""One part waits while the others are written, so that no thread waits for the source."""

_OPEN_FILES = 16
"""Descriptors that one reader keeps open. A process may have 1,024 in all, and a checkpoint more files than that."""

_DIRECT_FROM = 1 << 20
"""Bytes. Smaller files go through the page cache: direct I/O saves nothing there."""


class LocalStorage(MultiWriterStorage):
    """Checkpoints as directories below one directory.

    A checkpoint is written beside its place. When all of it is on the disk, it is moved there in one step. Two writers
    for one name do not disturb each other. Reads and writes follow links, so that a link to a checkpoint stays one.
    Removals do not follow links.

    Args:
        root: The directory; ``~`` is the home of the user. It is made when a checkpoint is written. A relative one is
            looked up once, at the first operation.

    Raises:
        TypeError: If the root is not a path.
        ValueError: If it has a null byte.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if not isinstance(root, (str, bytes, os.PathLike)):
            raise TypeError(f"the root of a LocalStorage is a path, not {shown(root)}")
        if "\0" in os.fsdecode(root):
            raise ValueError(f"{shown(root)} is not a path: it has a null byte")
        self._root = os.path.expanduser(os.fsdecode(root))
        self._resolved = False
        self._workers = Workers(_IO_THREADS, "aiostage-disk")
        self._readers = Workers(_READ_THREADS, "aiostage-read")

    def __repr__(self) -> str:
        return f"<LocalStorage {self._root}>"

    @property
    def location(self) -> str:
        """The directory; absolute once anything was done there."""
        return self._root

    async def open(self, name: str, *, overwrite: bool = False) -> MultiWriterCheckpoint:
        """Begin a checkpoint. Readers do not see it before it is committed.

        Args:
            name: Path relative to the root. Missing directories are made.
            overwrite: Whether it may replace a checkpoint that is there.

        Returns:
            Where its files are to be written.

        Raises:
            CheckpointExistsError: If there is something and it may not be, or is not a checkpoint.
            ValueError: If the name leads out of the root.
            OSError: If the file system refuses.

        When cancelled, nothing is left behind.
        """
        _check(name)
        check_flags(overwrite=overwrite)

        def make() -> MultiWriterCheckpoint:
            target = os.path.realpath(self._path(name))
            # A save that would be refused at its commit is refused before it copies anything. Publishing checks again.
            check_target(target, overwrite=overwrite)
            return _LocalCheckpoint(target, overwrite, self._workers)

        return await self._workers.run(make)

    async def attach(self, name: str, token: str) -> PendingCheckpoint:
        """Join a checkpoint that another process has begun, on this machine or on another with the same file system.

        Args:
            name: Under which that has opened it.
            token: From its pending checkpoint.

        Returns:
            A pending checkpoint of which only ``write`` may be called.

        Raises:
            ValueError: If the name leads out of the root, or the token is none for it.
            OSError: If the file system refuses.
        """
        _check(name)
        return await self._workers.run(partial(self._attach, name, token))

    async def read(self, name: str) -> Reader:
        """Open a committed checkpoint; it goes on to be the same one if it is replaced meanwhile.

        Args:
            name: Path relative to the root.

        Returns:
            What reads it, and is closed by the caller.

        Raises:
            CheckpointNotFoundError: If there is none of that name.
            ValueError: If the name leads out of the root.
            OSError: If the file system refuses.
        """
        _check(name)
        return await self._readers.run(partial(self._read, name))

    async def list(self) -> Sequence[str]:
        """Return the names of all committed checkpoints below the root, sorted; of a missing root, none.

        Raises:
            OSError: If the file system refuses.
        """
        return await self._workers.run(lambda: committed_below(self._path(".")))

    async def list_level(self) -> Sequence[str]:
        """Return the names of the committed checkpoints that lie right below the root, sorted; of a missing root, none.

        Raises:
            OSError: If the file system refuses.
        """
        return await self._workers.run(lambda: committed_below(self._path("."), deep=False))

    async def is_link(self, name: str) -> bool:
        """Return whether a name is a symbolic link, wherever it leads.

        Raises:
            ValueError: If the name leads out of the root.
        """
        _check(name)
        return await self._workers.run(lambda: os.path.islink(self._path(name)))

    async def pending(self) -> Sequence[str]:
        """Return the names of all checkpoints below the root that are being written, sorted; of a missing root, none.

        Raises:
            OSError: If the file system refuses.
        """
        return await self._workers.run(lambda: pending_below(self._path(".")))

    async def delete(self, name: str) -> None:
        """Remove a checkpoint, out of sight in one step. What is not a checkpoint is left alone.

        Of a link to a checkpoint the link is removed, and what it leads to stays.

        Args:
            name: Path relative to the root.

        Raises:
            ValueError: If the name leads out of the root.
            OSError: If the file system refuses.

        When cancelled, it waits for what is under way.
        """
        _check(name)
        await self._workers.run(lambda: delete_committed(self._own_path(name)))

    async def prune_files(self, name: str, keep: Collection[str]) -> None:
        """Remove files of a checkpoint that are not named. What is not a checkpoint, or a link to one, is left alone.

        Args:
            name: Path of the checkpoint, relative to the root.
            keep: Names of the files that stay.

        Raises:
            TypeError: If ``keep`` is not several names.
            ValueError: If the name leads out of the root.
            OSError: If the file system refuses.
        """
        _check(name)
        check_names(keep)
        await self._workers.run(lambda: prune_committed(self._own_path(name), keep))

    async def clean_up(self) -> None:
        """Remove pending checkpoints below the root without a living writer: one holds a lock, which the kernel knows.

        Raises:
            OSError: If the file system refuses.
        """
        await self._workers.run(lambda: clean_up_below(self._path(".")))

    def _path(self, name: str) -> str:
        """Return the path of a name. Blocks."""
        if not self._resolved:
            # Once: a later change of the working directory must not lead elsewhere. In a thread, because abspath()
            # asks the system.
            self._root, self._resolved = os.path.abspath(self._root), True
        return os.path.normpath(os.path.join(self._root, name))

    def _own_path(self, name: str) -> str:
        """Return the path of a name for a removal: if it is a link, the link itself and not its target. Blocks."""
        above, last = os.path.split(self._path(name))
        return os.path.join(os.path.realpath(above), last)

    def _attach(self, name: str, token: str) -> PendingCheckpoint:
        target = os.path.realpath(self._path(name))
        return _AttachedCheckpoint(attached_path(target, token), target, self._workers)

    def _read(self, name: str) -> Reader:
        path = os.path.realpath(self._path(name))
        return LocalReader(open_committed(path), path, self._readers)


class _AttachedCheckpoint(PendingCheckpoint):
    """A pending directory that another process has made, and commits or removes."""

    def __init__(self, path: str, target: str, workers: Workers) -> None:
        self._path = path
        self._target = target
        self._workers = workers

    @property
    def location(self) -> str:
        return self._target

    def _writing_to(self) -> str:
        """Return the path of the directory. Blocks."""
        return self._path

    def _create(self, name: str, nbytes: int) -> OutputFile:
        path = os.path.join(self._writing_to(), name)
        return OutputFile(path, nbytes, direct=nbytes >= _DIRECT_FROM)

    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        check_file(name, nbytes)
        created: list[OutputFile] = []
        try:
            # Kept in a list: a cancelled call loses what it returns, and the file would stay under its name.
            await self._workers.run(lambda: created.append(self._create(name, nbytes)))
            # Returns or raises once no thread writes any more, so that the descriptor is closed after the writes.
            await self._fill(created[0], parts)
            await self._workers.run(created[0].finish)
        except BaseException as error:
            for file in created:
                await _settle(self._workers, [partial(os.unlink, file.path)], error)
                # A coroutine that is being closed has not waited for the writes: the file closes with its last one.
                if not isinstance(error, GeneratorExit):
                    file.close()
            raise

    async def _fill(self, file: OutputFile, parts: AsyncIterable[Buffer]) -> None:
        """Write parts in worker threads, a few at once."""
        offset = submitted = 0

        def has_room() -> bool:
            return submitted - job.done < _PARTS_AT_ONCE or job.error is not None

        async with self._workers.job() as job:
            async for part in parts:
                job.put(partial(_write_part, file, part, offset))
                offset += len(part)
                submitted += 1
                # Only the step refers to the part now, so that its memory is free as soon as it is written.
                del part
                # The next part is asked for when one has been written. So no more than that many are held.
                await job.until(has_room)
                if job.error:
                    break
        # After the job has ended: an error of writing is the cause, and a short file its consequence.
        if offset != file.nbytes:
            raise CheckpointError(f"expected {file.nbytes} bytes, got {offset}.", path=file.path)

    async def commit(self, manifest: Buffer) -> None:
        raise CheckpointError("only the process that has opened it can commit it.", path=self._target)

    async def abort(self) -> None:
        """Leave it to the process that has opened it."""


class _LocalCheckpoint(_AttachedCheckpoint, MultiWriterCheckpoint):
    """A pending directory of this process."""

    def __init__(self, target: str, overwrite: bool, workers: Workers) -> None:
        super().__init__("", target, workers)
        self._overwrite = overwrite
        self._made: PendingDirectory | None = None
        self._making = Lock()

    def _directory(self) -> PendingDirectory:
        """Return the directory, which is made for the first file. Blocks."""
        # Several threads may begin files at once.
        with self._making:
            if self._made is None:
                self._made = PendingDirectory(self._target)
            return self._made

    def _writing_to(self) -> str:
        return self._directory().path

    async def token(self) -> str:
        return os.path.basename(await self._workers.run(self._writing_to))

    async def commit(self, manifest: Buffer) -> None:
        await self._workers.run(partial(self._commit, manifest))

    def _commit(self, manifest: Buffer) -> None:
        with OutputFile(os.path.join(self._directory().path, MANIFEST_NAME), len(manifest), direct=False) as file:
            file.write(manifest, 0)
            file.finish()
        # The manifest is on the disk by then, as all files are: each is synced when it is finished, and publish() syncs
        # the names.
        self._directory().publish(overwrite=self._overwrite)

    async def abort(self) -> None:
        await _settle(self._workers, [self._discard], None)

    def _discard(self) -> None:
        if self._made is not None:
            self._made.discard()


def _write_part(file: OutputFile, part: Buffer, offset: int) -> None:
    with span("write part", offset=offset, nbytes=len(part)):
        file.write(part, offset)


class LocalReader(Reader):
    """An open directory, and the files in it that were read last."""

    def __init__(self, directory: Descriptor, path: str, workers: Workers) -> None:
        # None once closed.
        self._directory: Descriptor | None = directory
        self._path = path
        self._workers = workers
        # In the order of their last use. Changed with the lock only, because any thread may read; aclose() replaces it.
        self._files: dict[str, InputFile] = {}
        self._opening = Lock()

    @property
    def location(self) -> str:
        """The directory."""
        return self._path

    async def manifest(self) -> Buffer:
        """Return the contents of the manifest. Raises as :meth:`read`, and also if it is too long for one."""
        return await self._workers.run(self._manifest)

    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes. Raises as :meth:`read`."""
        return await self._workers.run(lambda: self._file(name).nbytes)

    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a buffer with a range of a file.

        Raises:
            CheckpointCorruptError: If there is no such file, or it ends early.
            CheckpointNotFoundError: If the checkpoint was replaced or deleted before the file was opened.
            OSError: If the file system refuses.

        When cancelled, waits for what is being read.
        """
        await self._workers.run(partial(self.read_blocking, name, offset, into))

    async def modified(self) -> float | None:
        """Return when the manifest was written. Raises as :meth:`read`."""
        return await self._workers.run(lambda: self._file(MANIFEST_NAME).modified)

    async def aclose(self) -> None:
        """Drop the files. May be called more than once."""
        # Steps that still run are not waited for; they keep the descriptors that they use. No lock: the collector may
        # close a coroutine, which then calls this, in a thread that has the lock. In this order, and with a new dict: a
        # file that a thread is just opening finds the reader closed, or goes into the old dict.
        self._directory = None
        self._files = {}

    def _manifest(self) -> Buffer:
        file = self._file(MANIFEST_NAME)
        if file.nbytes > MAX_MANIFEST_BYTES:
            raise CheckpointCorruptError(f"it is {file.nbytes} bytes long, too long for a manifest.", path=file.path)
        # Not a bytearray: making one fills it with zeros and holds the GIL meanwhile.
        text: Buffer = aligned_memory(file.nbytes).data
        file.read(text, 0)
        return text

    def read_blocking(
        self, name: str, offset: int, into: Buffer, update: Callable[[Buffer], object] | None = None
    ) -> None:
        """Do as :meth:`read` does, in the calling thread, which may be any; ``update`` is as for ``InputFile.read``."""
        with span("read part", offset=offset, nbytes=len(into)):
            self._file(name).read(into, offset, update)

    def cold_parts_blocking(self, name: str, part_bytes: int) -> list[int]:
        """Return which parts of a file to read with :meth:`read_past_cache`, in the calling thread; it may be any."""
        cold = self._file(name).cold_parts(part_bytes)
        with self._opening:
            _close_some(self._files)
        return cold

    async def read_past_cache(self, name: str, offset: int, into: Buffer, used: int) -> None:
        """Fill a buffer from the disk, as far as the file goes; as :meth:`InputFile.read_past_cache`.

        When cancelled, waits for what is being read.
        """
        await self._workers.run(partial(self._read_past_cache, name, offset, into, used))

    def _read_past_cache(self, name: str, offset: int, into: Buffer, used: int) -> None:
        with span("read part", offset=offset, nbytes=len(into)):
            self._file(name).read_past_cache(into, offset, used)

    def _file(self, name: str) -> InputFile:
        """Open a file, unless it is open. Several threads may do so at once; then one of the two is dropped."""
        if not is_plain_name(name):
            raise CheckpointCorruptError(f"{shown(name)} is not a plain name for a file.", path=self._path)
        with self._opening:
            files = self._files
            file = files.pop(name, None)
            if file is not None:
                files[name] = file
                return file
        path = os.path.join(self._path, name)
        # Read once: aclose() may set it to None at any moment. The local variable keeps the descriptor open.
        directory = self._directory
        if directory is None:
            raise CheckpointError("the reader is closed.", path=path, remedy="Read before aclose().")
        try:
            file = InputFile(directory, name, path=path)
        except CheckpointCorruptError:
            # A deletion that has begun looks like damage. The path then names another directory, or nothing.
            if is_current(directory, self._path):
                raise
            raise CheckpointNotFoundError("it was replaced or deleted while it was read.", path=path) from None
        with self._opening:
            # Without the lock until here, because opening may block. If two threads have opened it, the second file
            # closes with its last reference. After aclose(), the file is for this caller alone. The dict is taken
            # before the look at the directory, as aclose() explains.
            files = self._files
            if self._directory is not None:
                file = files.setdefault(name, file)
                _close_some(files)
        return file


def _close_some(files: dict[str, InputFile]) -> None:
    """Close the files that were not used for the longest time, if too many are open. Called with the lock held."""
    while sum(file.descriptors for file in files.values()) > _OPEN_FILES:
        # It closes once the steps that read it have ended.
        del files[next(iter(files))]


def _check(name: str) -> None:
    """Refuse names that lead elsewhere."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a checkpoint is a str, not {shown(name)}")
    if name != "." and not all(map(is_plain_name, name.split("/"))):
        raise ValueError(
            f"{shown(name)} is not a name of a checkpoint: it must be a path below the storage's root, without null "
            "bytes"
        )


async def _settle(workers: Workers, steps: Sequence[Callable[[], object]], error: BaseException | None) -> None:
    """Run steps that clean up. It is shielded from cancellation."""
    # A job and not run(): run() drops its step when the caller is cancelled, and would raise an error of the step in
    # place of the error that is being handled.
    job = workers.job()
    for step in steps:
        job.put(step)
    job.close()
    # A coroutine that is being closed may not wait. The threads do the steps all the same.
    if not isinstance(error, GeneratorExit):
        await finish(job.settled)
