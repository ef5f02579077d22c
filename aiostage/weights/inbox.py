"""A version of weights, and the inbox in which a receiver puts it for the subscriber."""

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
"""A guess. A publisher on the same machine reads within milliseconds. A suspended one must not delay the end for
long."""


class WeightVersion:
    """One version of a model's weights. Every tensor of it is of this version.

    Attributes:
        version: Its number, as it was published.
        epoch: The publisher that it is of: different publishers may use the same numbers.
    """

    def __init__(self, version: int, epoch: str, tree: Any, acknowledge: Callable[[], object] | None = None) -> None:
        self.version = version
        self.epoch = epoch
        # In a list, so that acknowledge() can drop the tree in one operation, from any thread.
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
        """Report that this process has used the version, and drop the tree.

        References to its tensors keep their memory, for example those of a model that was loaded with ``assign=True``.
        The next turn of ``async for`` calls this by itself. May be called from any thread, and again.
        """
        if self._tree:
            self._tree.clear()
            if self._acknowledge is not None:
                self._acknowledge()


class Inbox:
    """Takes versions from a receiver, one at a time, when the subscriber asks for one.

    It is used in one event loop, so it needs no lock. Other threads post their calls to that loop.

    Attributes:
        changed: Set when something here has changed.
        wants: Whether the subscriber asks for a version.
        seen: Epoch and number of the last version that was put here.
        connected: Whether the publisher can be reached.
        newest: Epoch and number of the newest known version.
        failure: Why no further version will come.
        unsent: Messages for the publisher.
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
        """Put in a version, or the error of opening it."""
        # At most one: the receiver puts in what was asked for, and take() does not ask while something is here.
        self._content = content
        self.wants = False
        if seen is not None:
            self.seen = seen
            if self.newest is None or self.newest[0] != seen[0] or self.newest[1] < seen[1]:
                self.newest = seen
        self.changed.set()

    def set_connected(self, connected: bool) -> None:
        """Note whether the publisher can be reached."""
        if self.connected is not connected:
            self.connected = connected
            self.changed.set()

    def set_newest(self, epoch: str, number: int) -> None:
        """Note which version is the newest."""
        self.newest = (epoch, number)
        self.changed.set()

    def fail(self, failure: Exception) -> None:
        """Let take() raise an error, now and from now on."""
        self.failure = failure
        self.changed.set()

    def drop(self) -> None:
        """Drop the version that is here, if there is one."""
        content, self._content = self._content, None
        if isinstance(content, WeightVersion):
            # Not acknowledge(): the subscriber has not used it.
            content._tree.clear()

    async def flush(self) -> None:
        """Wait until all messages to the publisher are sent, for one second at most."""
        # One turn of the loop, so that messages that were posted before this call are in the queue.
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
            # A call that was cancelled had asked for it, and there is a newer one.
            self.drop()
        while True:
            # Taken first: a change after the checks below sets this event.
            changed = self.changed.event
            content, self._content = self._content, None
            if isinstance(content, WeightVersion):
                return content
            failure = content if content is not None else self.failure
            if failure is not None:
                # Several calls may raise it. Its traceback must not grow with each.
                raise failure.with_traceback(None)
            if not self.wants:
                # It stays set if this is cancelled: the version then arrives, and the next call finds it.
                self.wants = True
                self.changed.set()
                changed = self.changed.event
            await changed.wait()
