"""An HTTP service that sends back what it gets, on the event loop that is measured, and its load from another process.

python benchmarks/echo.py PORT      # the load: keeps eight connections busy until its standard input is closed
"""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType

__all__ = ["Echo"]

CONNECTIONS = 8
BODY = b"x" * 1024
REQUEST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


class Echo:
    """The service and its load, in ``async with``.

    Attributes:
        served: How many requests have been answered.
    """

    def __init__(self) -> None:
        self.served = 0

    async def __aenter__(self) -> Echo:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self._load = await asyncio.create_subprocess_exec(
            sys.executable, __file__, str(port), stdin=asyncio.subprocess.PIPE
        )
        while self.served < 1000:
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._load.stdin is not None
        self._load.stdin.close()
        await self._load.wait()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                body = await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (length, body))
                await writer.drain()
                self.served += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def load(port: int) -> None:
    """Ask over several connections, each as soon as it has its answer, until standard input is closed."""
    asking = [asyncio.create_task(ask(port)) for _ in range(CONNECTIONS)]
    await asyncio.to_thread(sys.stdin.read)
    for task in asking:
        task.cancel()


async def ask(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while True:
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(BODY))


if __name__ == "__main__":
    asyncio.run(load(int(sys.argv[1])))
