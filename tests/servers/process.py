"""Servers for tests: started, waited for, and stopped by their process id."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.patience import seconds

_READY_SECONDS = seconds(20.0)
_STOP_SECONDS = 3.0

_MOST_WORKERS = 16
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _MOST_WORKERS

_PORTS = range(12_000 + _WORKER, 22_000, _MOST_WORKERS)
"""Below those that the kernel gives to connections, which come by the dozen while a server starts. Each worker of the
test runner has its own, for a port that was found free is taken only when its server has started."""


def free_ports(count: int, beside: int = 0) -> list[int]:
    """Return ports that are free now, and so are those that are so much higher."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            first = held.enter_context(socket.socket())
            second = held.enter_context(socket.socket())
            port = random.SystemRandom().choice(_PORTS)
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + beside if beside else 0))
            except OSError:
                continue
            found.append(port)
    return found


@contextlib.contextmanager
def running_server(
    command: Sequence[str], log: Path, ask: Callable[[], None], environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the block ends.

    Args:
        command: Which.
        log: Where what it says goes.
        ask: Raises OSError as long as the server is not ready.
        environment: What it finds there besides.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for the tests, which then stop the server.
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                ask()
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not come up:\n{log.read_text(errors='replace')}") from error
                time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
