"""A proxy that does to requests what networks and servers do to them on bad days."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["cut", "stall", "slow", "status", "lost"]

_CHUNK = 64 << 10

_CODES = {
    403: "AccessDenied",
    404: "NoSuchBucket",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass
class Fault:
    """What happens to requests.

    Attributes:
        kind: ``cut``: the connection is reset after so many bytes of the body. ``stall``: no byte after those is passed
            on. ``slow``: so many bytes a second. ``status``: the request is answered with an error and not passed on.
            ``lost``: it is passed on, and the answer is not.
        request: Which requests, as a regular expression for method and target.
        times: How many of them.
        spared: How many of them go well before.
        number: Bytes, bytes a second, or the status.
        struck: How many it has happened to.
    """

    kind: Kind
    request: str
    times: float = math.inf
    number: int = 0
    spared: int = 0
    struck: int = field(default=0, init=False)

    def strikes(self, line: str) -> bool:
        if self.struck >= self.times or not re.search(self.request, line):
            return False
        if self.spared:
            self.spared -= 1
            return False
        self.struck += 1
        return True


class FaultProxy:
    """Stands before a server. Every connection carries one request, so that each can be told from the next.

    Attributes:
        faults: What happens to requests.
        lines: Method and target of each.
        delay: How long each is held up, in seconds.
        most_at_once: Of each method, how many requests were under way at any time at most.
        port: Where it listens.
    """

    def __init__(self, target: int) -> None:
        self.faults: list[Fault] = []
        self.lines: list[str] = []
        self.delay = 0.0
        self.most_at_once: Counter[str] = Counter()
        self.port = 0
        self._under_way: Counter[str] = Counter()
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        # It accepts no more, but stays open: asyncio takes some turns of the loop to hand over what it just accepted,
        # and fails in them once the server is closed. So new tasks may come while the others end, and one that is
        # cancelled before its first step closes nothing.
        for listening in server.sockets:
            self._loop.remove_reader(listening)
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task, writer in self._connections.items():
                task.cancel()
                writer.transport.abort()
            await asyncio.wait(tasks)
        server.close()
        await asyncio.sleep(0)  # for the transports, which close in the next turn

    def run(self, ready: threading.Event) -> None:
        self._loop.run_until_complete(self.serve(ready))
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._connection(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(self._connections.pop)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        method = ""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            line = head.split(b" HTTP/", 1)[0].decode()
            self.lines.append(line)
            method = line.split(" ", 1)[0]
            self._under_way[method] += 1
            self.most_at_once[method] = max(self.most_at_once[method], self._under_way[method])
            await asyncio.sleep(self.delay)
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            nbytes = int(length[1]) if length else 0
            fault = next((fault for fault in self.faults if fault.strikes(line)), None)
            if fault is not None and fault.kind == "status":
                await _discard(reader, nbytes)
                writer.write(_answer(fault.number))
                await writer.drain()
                return
            if fault is not None and fault.kind == "cut" and not nbytes:
                _reset(writer)
                return
            if fault is not None and fault.kind == "stall" and not fault.number:
                await _wait_for_the_end(reader)
                return
            answers, upstream = await asyncio.open_connection("127.0.0.1", self._target)
            upstream.write(head[:-2] + b"Connection: close\r\n\r\n")
            if not await _pass_body(reader, upstream, nbytes, fault):
                # Not closed in an orderly way, which this server takes for the end of the body.
                _reset(upstream)
                _reset(writer)
                return
            answer = await answers.read()
            if fault is not None and fault.kind == "lost":
                _reset(writer)
                return
            writer.write(answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            # Closed in an orderly way, it would first send what the server has not taken yet, and the loop ends before.
            if upstream is not None:
                upstream.transport.abort()
            raise
        finally:
            self._under_way[method] -= 1
            for end in (upstream, writer):
                if end is not None:
                    end.close()


async def _pass_body(
    reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, nbytes: int, fault: Fault | None
) -> bool:
    """Pass a body on; return whether all of it was."""
    passed = 0
    while passed < nbytes:
        if fault is not None and fault.kind == "cut" and passed >= fault.number:
            return False
        if fault is not None and fault.kind == "stall" and passed >= fault.number:
            await _wait_for_the_end(reader)
            return False
        room = nbytes - passed
        if fault is not None and fault.kind in ("cut", "stall"):
            room = min(room, fault.number - passed)
        chunk = await reader.read(min(_CHUNK, room))
        if not chunk:
            return False
        upstream.write(chunk)
        await upstream.drain()
        passed += len(chunk)
        if fault is not None and fault.kind == "slow":
            await asyncio.sleep(len(chunk) / fault.number)
    return fault is None or fault.kind != "cut"


async def _wait_for_the_end(reader: asyncio.StreamReader) -> None:
    """Read on until the client that waits for an answer gives up and closes."""
    while await reader.read(_CHUNK):
        pass


async def _discard(reader: asyncio.StreamReader, nbytes: int) -> None:
    while nbytes > 0:
        chunk = await reader.read(min(_CHUNK, nbytes))
        if not chunk:
            return
        nbytes -= len(chunk)


def _answer(status: int) -> bytes:
    code = _CODES[status]
    body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other end sees a reset."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def running_proxy(target: int) -> Iterator[FaultProxy]:
    """Run a proxy in a thread of its own until the block ends."""
    proxy = FaultProxy(target)
    ready = threading.Event()
    thread = threading.Thread(target=proxy.run, args=(ready,), name="fault-proxy")
    thread.start()
    try:
        ready.wait()
        yield proxy
    finally:
        proxy.stop()
        thread.join()
