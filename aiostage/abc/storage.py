"""Where checkpoints lie: storages, and what writes to and reads from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Collection, Sequence
from typing import TypeAlias

import xxhash

from aiostage.errors import CheckpointNotFoundError

__all__ = ["Buffer", "MultiWriterCheckpoint", "MultiWriterStorage", "PendingCheckpoint", "Reader", "Storage"]

Buffer: TypeAlias = memoryview
"""Contiguous bytes (format B) over memory of the caller or the storage. A reference to it, or to anything made from it,
keeps the memory from being used again; drop it when you are done."""


class Storage(ABC):
    """Where checkpoints lie, each under a name. Its abstract methods are all that a storage has to have.

    A checkpoint is a few files and a manifest. It exists once its manifest does, and a reader finds all of it or
    nothing. Names are relative paths with ``/`` between their steps. Every coroutine may be cancelled at any await, and
    none blocks the event loop.
    """

    @property
    def location(self) -> str:
        """Where it is, as a person would write it, for errors; its ``repr`` unless the storage knows better."""
        return repr(self)

    @abstractmethod
    async def open(self, name: str, *, overwrite: bool = False) -> PendingCheckpoint:
        """Begin a checkpoint.

        Args:
            name: Under which it is to appear.
            overwrite: Whether it may replace a checkpoint that is there.

        Returns:
            Where its files are to be written. Nothing of it can be seen before it is committed.

        Raises:
            CheckpointExistsError: If there is something and it may not be, or is not a checkpoint.
            OSError: If the storage refuses.

        When cancelled, nothing is left behind.
        """

    @abstractmethod
    async def read(self, name: str) -> Reader:
        """Open a committed checkpoint.

        Args:
            name: As it was opened under.

        Returns:
            What reads it, and is closed by the caller.

        Raises:
            CheckpointNotFoundError: If there is none of that name.
            OSError: If the storage refuses.
        """

    async def revision(self, name: str) -> str | None:
        """Return a text that changes when a checkpoint is replaced by one with another manifest; None if there is none.

        A storage that can tell this without reading the manifest may do so.

        Args:
            name: As it was opened under.

        Raises:
            OSError: If the storage refuses.
        """
        try:
            reader = await self.read(name)
        except CheckpointNotFoundError:
            return None
        try:
            return xxhash.xxh3_128_hexdigest(await reader.manifest())
        except CheckpointNotFoundError:
            return None
        finally:
            await reader.aclose()

    @abstractmethod
    async def list(self) -> Sequence[str]:
        """Return the names of all committed checkpoints, in any order.

        Raises:
            OSError: If the storage refuses.
        """

    async def list_level(self) -> Sequence[str]:
        """Return the names of the committed checkpoints without a ``/`` in them, in any order.

        A storage whose :meth:`list` looks at many levels may do this faster.

        Raises:
            OSError: If the storage refuses.
        """
        return [name for name in await self.list() if "/" not in name]

    @abstractmethod
    async def pending(self) -> Sequence[str]:
        """Return the names of all checkpoints that are being written, in any order.

        Those are all of which a file has been written, and which were neither committed nor removed; also those of
        writers that died, until :meth:`clean_up` has removed them. More of them do no harm, fewer do: by these one
        process tells another what it is at work on.

        Raises:
            OSError: If the storage refuses.
        """

    @abstractmethod
    async def delete(self, name: str) -> None:
        """Remove a checkpoint, its manifest first, so that no reader finds half of it. A missing one is not an error.

        Args:
            name: As it was opened under.

        Raises:
            OSError: If the storage refuses. What is left can no longer be found, and is stale.

        When cancelled, it is there as a whole, or can no longer be found.
        """

    async def prune_files(self, name: str, keep: Collection[str]) -> None:
        """Remove files of a checkpoint that are not needed any more; its manifest and the files that are named stay.

        Asked for when a checkpoint was removed to some of whose files others refer. A storage may do without this
        method: this one removes nothing, so that all files stay until the checkpoint is deleted.

        Args:
            name: The name of the checkpoint. A missing one is not an error.
            keep: Names of the files that stay.

        Raises:
            OSError: If the storage refuses.

        When cancelled, some of the others may be gone.
        """
        return

    async def is_link(self, name: str) -> bool:
        """Return whether a checkpoint lies elsewhere, and only a link to it here, so that it may belong to others.

        A storage without links may do without this method: this one says that it is none.

        Args:
            name: The name of the checkpoint. A missing one is not a link.

        Raises:
            OSError: If the storage refuses.
        """
        return False

    @abstractmethod
    async def clean_up(self) -> None:
        """Remove what writers that died have left behind, and nothing that a living one is at work on.

        Raises:
            OSError: If the storage refuses.

        When cancelled, some of it may be gone.
        """


class MultiWriterStorage(Storage):
    """A storage in which several processes may write one checkpoint. This is all that it has to have besides."""

    @abstractmethod
    async def open(self, name: str, *, overwrite: bool = False) -> MultiWriterCheckpoint:
        """Begin a checkpoint; see :meth:`Storage.open`."""

    @abstractmethod
    async def attach(self, name: str, token: str) -> PendingCheckpoint:
        """Join a checkpoint that another process has begun.

        Args:
            name: Under which that has opened it.
            token: From its :meth:`MultiWriterCheckpoint.token`.

        Returns:
            A pending checkpoint of which only ``write`` may be called. Its files are committed or removed with the
            others by the process that has opened the checkpoint, which has to outlive the writing.

        Raises:
            OSError: If the storage refuses.
        """


class PendingCheckpoint(ABC):
    """A checkpoint that is being written. These methods are all that a pending checkpoint has to have.

    Its files may be written at once from several tasks. It ends with :meth:`commit` or :meth:`abort`.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the checkpoint is going to be, as a person would write it: an absolute path, a URL without secrets."""

    @abstractmethod
    async def write(self, name: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        """Write one file.

        Args:
            name: The name of the file, a plain name without ``/``.
            nbytes: How long it will be.
            parts: Its contents in order. All but the last are of one size, a multiple of 4096 bytes. The next part is
                asked for as soon as there is room for it, so that several may be on their way at once, and each is let
                go of once it has been stored.

        Raises:
            OSError: If the storage refuses.

        When cancelled, or when ``parts`` raises, the file is given up and nothing refers to its parts any more.
        """

    @abstractmethod
    async def commit(self, manifest: Buffer) -> None:
        """Write the manifest and make the checkpoint appear, in one step. Once this returns it outlasts a crash.

        Args:
            manifest: Its contents.

        Raises:
            CheckpointExistsError: If another writer has been faster and must not be replaced.
            OSError: If the storage refuses.

        When cancelled, either it has been committed or :meth:`abort` still removes everything.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Remove everything written, unless it was committed. May be called twice; shielded from cancellation."""


class MultiWriterCheckpoint(PendingCheckpoint):
    """A pending checkpoint that other processes may join. This is all that it has to have besides."""

    @abstractmethod
    async def token(self) -> str:
        """Return what other processes need for :meth:`MultiWriterStorage.attach`.

        Raises:
            OSError: If the storage refuses.
        """


class Reader(ABC):
    """A committed checkpoint that is being read. Its abstract methods are all that a reader has to have.

    It goes on to be the same checkpoint if that is replaced or deleted meanwhile, or raises
    :class:`~aiostage.CheckpointNotFoundError`.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """Where the checkpoint is, as a person would write it. Errors begin with it."""

    @property
    def reads_at_once(self) -> int:
        """How many calls of :meth:`read` should be under way at once; 4 unless the reader knows better.

        More where each of them waits for long. The memory that reading takes grows with it, up to 128 MiB.
        """
        return 4

    @abstractmethod
    async def manifest(self) -> Buffer:
        """Return the contents of the manifest."""

    @abstractmethod
    async def size(self, name: str) -> int:
        """Return how long a file is, in bytes.

        Args:
            name: The name of the file.

        Raises:
            CheckpointCorruptError: If there is no such file.
            OSError: If the storage refuses.
        """

    @abstractmethod
    async def read(self, name: str, offset: int, into: Buffer) -> None:
        """Fill a writable buffer with a range of a file.

        Args:
            name: The name of the file.
            offset: The offset of the first byte.
            into: As long as the range. Its contents are undefined if this raises or is cancelled.

        Raises:
            CheckpointCorruptError: If there is no such file, or it ends before the buffer is full.
            OSError: If the storage refuses.
        """

    async def modified(self) -> float | None:
        """Return when the checkpoint was committed, in seconds since 1970 by the storage's clock.

        A reader that does not know may do without this method: this one returns None.

        Raises:
            OSError: If the storage refuses.
        """
        return None

    @abstractmethod
    async def aclose(self) -> None:
        """Close it. May be called more than once."""
