"""What the service and its processes say to each other: one JSON object a line, over the child's standard streams.

Pipes need no port, no token and no clean-up, and the end of either side shows at the other as the end of the file.
A command has a key ``do``, an event has a key ``event``; everything else in it depends on that.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

__all__ = ["LONGEST_LINE", "Message", "decode", "encode", "messages", "send", "standard_input"]

Message: TypeAlias = dict[str, Any]

LONGEST_LINE = 16 << 20
"""A handle on a staged tree is a few kilobytes; this only keeps a mad child from filling our memory."""


def encode(message: Message) -> bytes:
    """Return a message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Return the message of a line.

    Raises:
        ValueError: If it is not a JSON object.
    """
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"a message is an object, not {line[:100]!r}")
    return message


async def messages(stream: asyncio.StreamReader) -> AsyncIterator[Message]:
    """Iterate over what comes in, until the other side is gone."""
    while line := await stream.readline():
        yield decode(line)


def send(event: str, **values: Any) -> None:
    """Tell the service something. Called by the children, whose standard output nobody else writes to."""
    sys.stdout.buffer.write(encode({"event": event, **values}))
    sys.stdout.buffer.flush()


async def standard_input() -> asyncio.StreamReader:
    """Return the standard input of this process as a stream."""
    stream = asyncio.StreamReader(limit=LONGEST_LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), sys.stdin)
    return stream
