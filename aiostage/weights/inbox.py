"""What a subscriber has received and not yet taken, and a version of weights as it takes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
from anyio.lowlevel import checkpoint, current_token

from aiostage.errors import WeightsError
from aiostage.weights.signal import Signal

__all__ = ["Inbox", "WeightVersion"]

_FLUSH_SECONDS = 1.0


class WeightVersion:
    """One version of a model's weights. Every tensor of it is of this version.

    Attributes:
        version: Its number, as it was published.
        epoch: Which publisher it is of: numbers of different ones may be the same.
    """

    def __init__(self, version: int, epoch: str, tree: Any, acknowledge: Callable[[], object] | None = None) -> None:
        self.version = version
        self.epoch = epoch
        self._tree = [tree]
        self._acknowledge = acknowledge

    def __repr__(self) -> str:
        return f"<WeightVersion {self.version}{'' if self._tree else ', acknowledged'}>"

    @property
    def state_dict(self) -> Any:
        """The tree that was published. Over a socket its tensors lie in shared memory, until they are dropped.

        Writing to them changes this process's view only.

        Raises:
            WeightsError: If the version was acknowledged.
        """
        if not self._tree:
            raise WeightsError(
                f"version {self.version} was acknowledged.", remedy="Keep its state_dict if you need it afterwards."
            )
        return self._tree[0]

    def acknowledge(self) -> None:
        """Say that this process has done with the version what it wanted, and drop the tree.

        What still refers to its tensors, such as a model that was loaded with ``assign=True``, keeps their memory. The
        next turn of ``async for`` does this by itself. May be called from any thread, and again.
        """
        if self._tree:
            self._tree.clear()
            if self._acknowledge is not None:
                self._acknowledge()


class Inbox:
    """Where a receiver puts versions, one at a time, when they are asked for.

    Used in one event loop only, so that it needs no lock. What other threads say, they post to that loop.

    Attributes:
        changed: Set whenever something here has changed.
        wants: Whether a version is asked for.
        seen: Epoch and number of the last version that was put here.
        connected: Whether the publisher can be reached.
        newest: Epoch and number of the newest version that is known of.
        failure: Why no version will come any more.
        unsent: What is to be said to the publisher.
    """

    def __init__(self) -> None:
        self.changed = Signal()
        self.native = current_token().native_token
        self.wants = False
        self.seen: tuple[str, int] | None = None
        self.connected = False
        self.newest: tuple[str, int] | None = None
        self.failure: Exception | None = None
        self.unsent: deque[dict[str, Any]] = deque()
        self._content: WeightVersion | Exception | None = None

    def put(self, content: WeightVersion | Exception, *, seen: tuple[str, int] | None) -> None:
        """Put in a version, or why one cannot be opened."""
        # At most one: the receiver puts in what was asked for, and nothing is asked for while something lies here.
        self._content = content
        self.wants = False
        if seen is not None:
            self.seen = seen
            if self.newest is None or self.newest[0] != seen[0] or self.newest[1] < seen[1]:
                self.newest = seen
        self.changed.set()

    def set_connected(self, connected: bool) -> None:
        """Say whether the publisher can be reached."""
        if self.connected is not connected:
            self.connected = connected
            self.changed.set()

    def set_newest(self, epoch: str, number: int) -> None:
        """Say which version is the newest."""
        self.newest = (epoch, number)
        self.changed.set()

    def fail(self, failure: Exception) -> None:
        """Say that no version will come any more."""
        self.failure = failure
        self.changed.set()

    def drop(self) -> None:
        """Drop what is there."""
        content, self._content = self._content, None
        if isinstance(content, WeightVersion):
            # Without an acknowledgement.
            content._tree.clear()

    async def flush(self) -> None:
        """Wait until everything has been said to the publisher, for a moment at most."""
        # What other threads have posted comes first.
        await checkpoint()
        with anyio.move_on_after(_FLUSH_SECONDS):
            while self.connected and self.unsent:
                await self.changed.event.wait()

    async def take(self) -> WeightVersion:
        """Wait for a version that is newer than the last, and take it.

        Raises:
            Exception: Why it cannot be opened, or why none will come.

        When cancelled, nothing was taken.
        """
        if isinstance(self._content, WeightVersion) and self.seen != self.newest:
            # A cancelled call had asked for it, and there are newer ones.
            self.drop()
        while True:
            # Taken before anything is looked at: a change after the look sets this one.
            changed = self.changed.event
            content, self._content = self._content, None
            if isinstance(content, WeightVersion):
                return content
            failure = content if content is not None else self.failure
            if failure is not None:
                # It may be raised by several calls; each begins its own traceback.
                raise failure.with_traceback(None)
            if not self.wants:
                # It stays set if this is cancelled: the version then comes, and the next call finds it.
                self.wants = True
                self.changed.set()
                changed = self.changed.event
            await changed.wait()
