"""Weights for other machines: versions in a storage, and a pointer to the newest.

A version is a checkpoint of its own. The pointer is a tiny checkpoint, ``newest``. It is replaced in one step when a
version is complete. Subscribers ask for its revision, which takes one small request.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import time
from typing import Any

import anyio

from aiostage._loop.coroutines import without_locals
from aiostage.abc import Storage
from aiostage.checkpoint.load import load
from aiostage.checkpoint.save import save, write_checkpoint
from aiostage.errors import CheckpointCorruptError, CheckpointNotFoundError, WeightsError, said, shown
from aiostage.stager import AsyncStager
from aiostage.weights.inbox import Inbox, WeightVersion

__all__ = ["StorageReceiver", "StorageSender"]

_log = logging.getLogger("aiostage")

_POINTER = "newest"
_PREFIX = "weights-"
_LONGEST_WAIT_SECONDS = 30.0
"""Between two attempts when the storage cannot be reached. A guess."""


@dataclass(frozen=True, slots=True)
class _Pointer:
    """The content of the pointer: the publisher of the newest version, and its number."""

    epoch: str
    number: int

    @property
    def name(self) -> str:
        return f"{_PREFIX}{self.epoch}-{self.number:020}"

    @classmethod
    async def read(cls, storage: Storage) -> _Pointer | None:
        try:
            content = await load((storage, _POINTER))
        except CheckpointNotFoundError:
            return None
        match content:
            case {"epoch": str(epoch), "version": int(number)} if number >= 0:
                return cls(epoch, number)
        raise CheckpointCorruptError(
            f"it does not point to weights: {shown(content)}.", path=f"{storage.location}/{_POINTER}"
        )


class StorageSender:
    """Saves versions of weights, and removes old ones.

    Args:
        storage: The storage that has the versions.
        keep: How many versions stay, including those of earlier publishers. A subscriber has to finish loading a
            version before that many newer ones are published.
    """

    subscribers = ()

    def __init__(self, storage: Storage, *, keep: int) -> None:
        self.storage = storage
        self.location = storage.location
        # The time first, so that names sort by when their publisher began.
        self.epoch = f"{int(time() * 1000):013}-{secrets.token_hex(4)}"
        self._keep = keep
        self._names: set[str] = set()
        self._newest: _Pointer | None = None

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None, None]:
        """Find what there is of earlier publishers."""
        await self.storage.clean_up()
        self._names |= {name for name in await self.storage.list() if name.startswith(_PREFIX)}
        yield

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions of this publisher that are kept, in ascending order."""
        own = f"{_PREFIX}{self.epoch}-"
        return tuple(sorted(int(name.removeprefix(own)) for name in self._names if name.startswith(own)))

    def save(self, number: int, state_dict: Any, stager: AsyncStager) -> Coroutine[Any, Any, object]:
        """Return a coroutine that saves a version, which no subscriber sees yet. The copy is begun at the call."""
        return save(state_dict, (self.storage, _Pointer(self.epoch, number).name), stager=stager)

    async def saved(self, number: int, saving: Coroutine[Any, Any, object]) -> object:
        """Await what :meth:`save` has returned. Raises as that does."""
        name = _Pointer(self.epoch, number).name
        # Before it is written: a cancelled save may have been committed. It is then removed with the old versions.
        self._names.add(name)
        try:
            return await saving
        except Exception:
            # The save has removed its files. If the name still counted, a version that subscribers may be loading would
            # be removed in its place.
            self._names.discard(name)
            raise

    async def send(self, number: int, saved: object) -> None:
        """Make a version that was saved the newest, unless a later one already is; remove old ones.

        Raises:
            WeightsError: If another publisher has begun there since.
            OSError: If the storage refuses.

        When cancelled, it is the newest, or it has not become that.
        """
        if self._newest is not None and number < self._newest.number:
            return
        pointer = await _Pointer.read(self.storage)
        # A later publisher has the larger epoch. The earlier one stops.
        if pointer is not None and pointer.epoch > self.epoch:
            raise WeightsError(
                f"another publisher has started at this target since, and published version {pointer.number}.",
                path=self.location,
                remedy="Give each publisher a target of its own.",
            )
        mine = _Pointer(self.epoch, number)
        if pointer is not None and pointer.epoch == self.epoch and pointer.number > number:
            # A later version whose publication was cancelled after its pointer was written.
            self._newest = pointer
            return
        content = {"epoch": mine.epoch, "version": mine.number}
        # The version itself is committed already, so a subscriber that reads the pointer finds it.
        await write_checkpoint(content, (self.storage, _POINTER), overwrite=True)
        self._newest = mine
        await self._remove_surplus()

    async def _remove_surplus(self) -> None:
        """Remove old versions. If that fails, the new one is valid all the same, and the next save tries again."""
        assert self._newest is not None  # noqa: S101 - called when there is one
        # Names sort by the time at which their publisher began, and then by number.
        for name in sorted(self._names)[: -self._keep]:
            if name != self._newest.name:
                try:
                    await self.storage.delete(name)
                except OSError as error:
                    _log.warning("the weights %s of %s could not be removed: %s", name, self.location, error)
                else:
                    self._names.discard(name)


class StorageReceiver:
    """Loads versions of weights from a storage when they are asked for.

    Args:
        storage: The storage that has the versions.
        inbox: Takes the versions.
        classes: Classes whose objects are made again.
        interval: Seconds between two requests for the pointer's revision.
    """

    def __init__(self, storage: Storage, inbox: Inbox, *, classes: Iterable[type], interval: float) -> None:
        self._storage = storage
        self._inbox = inbox
        self._classes = classes
        self._interval = interval

    async def run(self) -> None:
        """Load what is asked for, until cancelled."""
        inbox, seen, failures = self._inbox, "", 0
        while True:
            changed = inbox.changed.event
            if not inbox.wants:
                await changed.wait()
                continue
            try:
                # The pointer is read only when its revision has changed.
                revision = await self._storage.revision(_POINTER)
                inbox.set_connected(True)
                # `seen` changes only when nothing more is to be done about this pointer. Otherwise it is read again.
                if revision is not None and revision != seen and await self._check_pointer():
                    seen = revision
                failures = 0
            except OSError as error:
                inbox.set_connected(False)
                failures += 1
                _log.warning("no weights can be loaded from %s: %s", self._storage.location, said(error))
            if inbox.wants:
                await anyio.sleep(min(self._interval * 2.0**failures, max(self._interval, _LONGEST_WAIT_SECONDS)))

    async def _check_pointer(self) -> bool:
        """Load the newest version if it is new; return whether there is nothing more to be done about this pointer."""
        inbox = self._inbox
        found: tuple[str, int] | None = None
        try:
            pointer = await _Pointer.read(self._storage)
            if pointer is None:
                return False
            found = (pointer.epoch, pointer.number)
            inbox.set_newest(*found)
            if found == inbox.seen:
                return True
            tree = await load((self._storage, pointer.name), classes=self._classes)
        except CheckpointNotFoundError:
            # It was removed meanwhile, so there is a newer one.
            return False
        except OSError:
            # The storage cannot be reached: run() asks again, at longer intervals.
            raise
        except MemoryError as error:
            # There may be memory when the next call tries again.
            inbox.put(without_locals(error), seen=None)
            return False
        except Exception as error:
            # What was committed does not change, so reading it again fails again. The next call waits for the next
            # version, or for another pointer.
            inbox.put(without_locals(error), seen=found)
            return True
        inbox.put(WeightVersion(pointer.number, pointer.epoch, tree), seen=found)
        return True
