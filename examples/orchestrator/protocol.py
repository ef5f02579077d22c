"""What the service and its processes say to each other: one JSON object a line, over a socket that only they know.

Standard output is not used: a library that prints would break the protocol. The service passes one end of a socket pair
to the child and its number in the environment. The end of either process shows at the other as the end of the stream.
A command has a key ``do``, an event has a key ``event``; everything else in it depends on that.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

__all__ = ["DESCRIPTOR", "LONGEST_LINE", "Channel", "Message"]

Message: TypeAlias = dict[str, Any]

DESCRIPTOR = "ORCHESTRATOR_CHANNEL"
"""The environment variable with the number of the child's descriptor."""

LONGEST_LINE = 1 << 20
"""Bytes in a message. A handle on a staged tree is a few kilobytes."""

MOST_UNREAD = 4 << 20
"""Bytes that may wait for a process that does not read before messages to it are dropped."""


class Channel:
    """One end of the connection between the service and a child."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, connected: socket.socket) -> Channel:
        """Return a channel over one end of a socket pair, which it closes."""
        return cls(*await asyncio.open_unix_connection(sock=connected, limit=LONGEST_LINE))

    @classmethod
    async def to_service(cls) -> Channel:
        """Return a child's channel to the service. Processes that the child starts do not inherit it."""
        number = int(os.environ.pop(DESCRIPTOR))
        os.set_inheritable(number, False)
        return await cls.over(socket.socket(fileno=number))

    def send(self, message: Message) -> bool:
        """Send a message without waiting.

        Returns:
            False if it was dropped, because the other side is gone or has not read for long.
        """
        transport = self._writer.transport
        if transport.is_closing() or transport.get_write_buffer_size() > MOST_UNREAD:
            return False
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        return True

    def tell(self, event: str, **values: Any) -> None:
        """Send an event to the service."""
        self.send({"event": event, **values})

    async def lines(self) -> AsyncIterator[bytes]:
        """Iterate over the messages that come in, as they are, until the other side is gone.

        Raises:
            ValueError: If one is longer than allowed.
        """
        try:
            while line := await self._reader.readline():
                yield line
        except ConnectionError:
            return  # The other side died with something unread: an end like any other.

    async def aclose(self) -> None:
        """Send what waits to be sent, and close. The other side may be gone already."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return
