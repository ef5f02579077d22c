"""Server-sent events for pages, scripts and tests. A subscriber that is slow does not delay the others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["Feed"]

_BACKLOG = 500
"""Events that a subscriber may be behind before it is disconnected; it connects again and gets the whole state anew."""

_QUIET_SECONDS = 15.0
"""After so long without an event a comment is sent, so that a connection that has died is noticed."""


class Feed:
    """Publishes events to any number of subscribers, as server-sent events."""

    def __init__(self) -> None:
        self._subscribers: set[asyncio.Queue[str | None]] = set()
        self._closed = False

    def __len__(self) -> int:
        """Return how many subscribe."""
        return len(self._subscribers)

    def publish(self, kind: str, data: Any) -> None:
        """Send an event to every subscriber."""
        if not self._subscribers:
            return
        text = _event(kind, data)
        for queue in tuple(self._subscribers):
            try:
                queue.put_nowait(text)
            except asyncio.QueueFull:
                self._disconnect(queue)

    def close(self) -> None:
        """Disconnect all subscribers, and take no more."""
        self._closed = True
        for queue in tuple(self._subscribers):
            self._disconnect(queue)

    async def subscribe(self, state: Any) -> AsyncIterator[str]:
        """Iterate over events in the text/event-stream format, the first of which is the whole state."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(_BACKLOG)
        self._subscribers.add(queue)
        try:
            yield _event("state", state)
            while not self._closed:
                try:
                    async with asyncio.timeout(_QUIET_SECONDS):
                        text = await queue.get()
                except TimeoutError:
                    text = ": still here\n\n"
                if text is None:
                    return
                yield text
        finally:
            self._subscribers.discard(queue)

    def _disconnect(self, queue: asyncio.Queue[str | None]) -> None:
        self._subscribers.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)


def _event(kind: str, data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
