"""The interface to a flat store of named objects, such as a bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aiostage.abc import Buffer, Reader

__all__ = ["PATHS_PER_BATCH", "Bucket", "ObjectMeta", "RangeReader", "StoredObject", "Version"]

PATHS_PER_BATCH = 200
"""Objects in one batch of a listing. A guess: a caller looks through them in a fraction of a millisecond."""


@dataclass(frozen=True, slots=True)
class Version:
    """One state of an object, which changes whenever it is written.

    Attributes:
        tag: The store's name for it, or its content; None where the store does not tell states apart.
    """

    tag: Any


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A small object.

    Attributes:
        data: Its contents.
        version: The state of the object that was read.
    """

    data: Buffer
    version: Version


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    """An object in a listing.

    Attributes:
        path: Its whole name.
        modified: When it was last written, by the store's clock; None if the store does not say.
        nbytes: How long it is; None if the store does not say.
    """

    path: str
    modified: datetime | None
    nbytes: int | None


class RangeReader(Reader):
    """A reader that can return bytes where the client of its store has put them, which saves a copy."""

    @abstractmethod
    async def get_range(self, name: str, offset: int, nbytes: int) -> Buffer | None:
        """Return a range of a file; None if only :meth:`read` can, because the range is long.

        Returns:
            The bytes, which do not change, at any address.

        Raises:
            CheckpointCorruptError: If there is no such file, or it ends before the range does.
            CheckpointNotFoundError: If the checkpoint was deleted meanwhile.
            OSError: If the storage refuses.

        When cancelled, the request is given up.
        """


class Bucket(ABC):
    """A store of named objects, each of which appears whole. The abstract methods are all that one has to have.

    Paths are relative, with ``/`` between their steps. Where it does not say otherwise, every method raises
    :class:`~aiostage.StorageError` if the store refuses or cannot be reached.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """The location of the store as text, without a ``/`` at the end and without secrets."""

    @property
    def reads_at_once(self) -> int:
        """How many reads of some MiB each should run at once."""
        return 8

    @abstractmethod
    async def get(self, path: str, *, at_most: int) -> StoredObject:
        """Return an object as a whole.

        Args:
            path: The path of the object.
            at_most: Bytes that it may have.

        Raises:
            FileNotFoundError: If there is none.
            CheckpointCorruptError: If it is longer.
        """

    @abstractmethod
    async def size(self, path: str) -> int:
        """Return how long an object is, in bytes.

        Raises:
            FileNotFoundError: If there is none.
        """

    @abstractmethod
    async def get_range(self, path: str, offset: int, nbytes: int) -> Buffer:
        """Return a range of an object, in memory of the store's client.

        Args:
            path: The path of the object.
            offset: The offset of the first byte.
            nbytes: How many bytes; at least one.

        Returns:
            The bytes, which do not change; fewer than asked for if the object ends before, and never more.

        Raises:
            FileNotFoundError: If there is none.
        """

    @abstractmethod
    async def put(self, path: str, data: Buffer) -> None:
        """Write a small object, whether or not there is one. When cancelled, it has been written or never will be."""

    @abstractmethod
    async def create(self, path: str, data: Buffer) -> None:
        """Write a small object where there is none. When cancelled, it has been written or never will be.

        Raises:
            FileExistsError: If there is one.
            NotImplementedError: If the store cannot write on a condition.
        """

    @abstractmethod
    async def replace(self, path: str, data: Buffer, seen: Version) -> None:
        """Write a small object in place of one. When cancelled, it has been written or never will be.

        Raises:
            FileExistsError: If it is in another state than the one seen, or gone.
            NotImplementedError: If the store cannot compare. Nothing was written.
        """

    @abstractmethod
    async def upload(self, path: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        """Write an object of any size, without copying its parts.

        When cancelled, or when ``parts`` raises, what has been sent is given up before this returns.
        """

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[Sequence[ObjectMeta]]:
        """Iterate over all objects below a path, at any depth; all that there are for the empty path.

        They come in batches of ``PATHS_PER_BATCH``, between which the event loop gets its turn.
        """

    @abstractmethod
    async def delete(self, paths: Sequence[str]) -> None:
        """Remove objects. A missing one is not an error."""

    async def is_link(self, path: str) -> bool:
        """Return whether a path is a link to what lies elsewhere. Only stores on a disk have links."""
        return False

    async def unlink(self, path: str) -> None:
        """Remove a link, and nothing of what it leads to. A missing one is not an error."""
        raise NotImplementedError

    @abstractmethod
    def touch(self, path: str, data: bytes, *, beside: str) -> None:
        """Write a small object beside another one. Blocks, in any thread, also while nothing of this is awaited.

        Raises:
            FileNotFoundError: If the other one was gone before. It may go before the object is written.
        """
