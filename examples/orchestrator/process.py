"""A child process of the service: the channel to it, the end of what it printed, and what it died of."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protocol import DESCRIPTOR, Channel, Message

__all__ = ["Child"]

T = TypeVar("T")

OUTPUT_KEPT = 4000
"""Bytes of a child's output that are kept to say what it died of."""

SECONDS_TO_EXIT = 10.0
"""How long a child may live on after it has closed its channel."""

SECONDS_TO_DRAIN = 1.0
"""How long what a dead child has sent is read; processes of its own may still hold the other ends."""


class Child:
    """A running script. Made by :meth:`start`; :meth:`follow` has to be awaited, and ends the process in any case."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: Channel,
        output: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._process = process
        self._channel = channel
        self._output, self._output_transport = output
        self._printed = b""
        self._fault: str | None = None

    @classmethod
    async def start(cls, script: Path, *arguments: object) -> Child:
        """Start a Python script with a channel to it.

        Args:
            script: What to run.
            *arguments: Its command line.

        Returns:
            The running child.
        """
        # Not asyncio's own pipes: waiting for the process would also wait for everything that has inherited those.
        ours, theirs = socket.socketpair()
        printed, prints = socket.socketpair()
        with theirs, prints:
            channel = await Channel.over(ours)
            output = await asyncio.open_unix_connection(sock=printed)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    str(script),
                    *map(str, arguments),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=prints.fileno(),
                    stderr=prints.fileno(),
                    pass_fds=(theirs.fileno(),),
                    env=os.environ | {DESCRIPTOR: str(theirs.fileno()), "PYTHONUNBUFFERED": "1"},
                    # A terminal's Ctrl-C interrupts its whole group, and would end them before they have saved.
                    start_new_session=True,
                )
            except BaseException:
                output[1].close()
                await channel.aclose()
                raise
        return cls(process, channel, output)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def send(self, message: Message) -> bool:
        """Send a command without waiting; return False if it was dropped."""
        return self.alive and self._channel.send(message)

    def kill(self) -> None:
        """End the process at once, if it still runs."""
        if self.alive:
            self._process.kill()

    async def follow(self, parse: Callable[[bytes], T], handle: Callable[[T], None]) -> str | None:
        """Handle what the child says until it ends.

        Args:
            parse: Makes an event of a line. A ValueError is the child's fault, and ends it.
            handle: Is called with each event. What it raises is raised here.

        Returns:
            What the process died of; None if it ended as it should.

        When cancelled, the process is killed.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._keep_output())
                listening = tasks.create_task(self._listen(parse, handle))
                exited = tasks.create_task(self._process.wait())
                await asyncio.wait((listening, exited), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait((exited,), timeout=SECONDS_TO_EXIT)
                if not exited.done():
                    self._fault = f"closed its channel, but still ran {SECONDS_TO_EXIT:.0f} s later"
                    self.kill()
                    await exited
                await asyncio.wait((reading, listening), timeout=SECONDS_TO_DRAIN)
                reading.cancel()
                listening.cancel()
        finally:
            self.kill()
            self._output_transport.close()
            await asyncio.shield(self._end())
        return self._died_of()

    async def _end(self) -> None:
        await self._process.wait()
        await self._channel.aclose()

    async def _listen(self, parse: Callable[[bytes], T], handle: Callable[[T], None]) -> None:
        """Handle one event after the other; kill a child that says what is none."""
        lines = self._channel.lines()
        while True:
            try:
                line = await anext(lines, None)
                event = parse(line) if line is not None else None
            except ValueError as error:
                self._fault = f"sent what is no event: {' '.join(str(error).split())[:200]}"
                self.kill()
                return
            if event is None:
                return
            handle(event)

    async def _keep_output(self) -> None:
        """Read what the child prints, hand it on to our standard error, and keep the end of it."""
        while printed := await self._output.read(1 << 16):
            self._printed = (self._printed + printed)[-OUTPUT_KEPT:]
            sys.stderr.write(printed.decode(errors="replace"))

    def _died_of(self) -> str | None:
        code = self._process.returncode
        if self._fault is not None:
            return f"process {self.pid} {self._fault}"
        if not code:
            return None
        if code < 0:
            return f"process {self.pid} was killed by {signal.Signals(-code).name}"
        last = self._printed.decode(errors="replace").rstrip().rpartition("\n")[2].strip()
        return f"process {self.pid} ended with status {code}" + (f": {last[:200]}" if last else "")
