"""An emulator of Azure's blob storage on loopback, where ``azurite-blob`` (npm: azurite) is installed."""

from __future__ import annotations

import base64
import contextlib
import hmac
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.servers.process import free_ports, running_server

CONTAINER = "ckpt"
ACCOUNT = "devstoreaccount1"
# The same everywhere, and public.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def find_azurite() -> str | None:
    return shutil.which("azurite-blob")


@contextlib.contextmanager
def running_azurite(binary: str) -> Iterator[dict[str, Any]]:
    """Run the emulator until the block ends, and give the options of a store of obstore for it."""
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    with tempfile.TemporaryDirectory(prefix="azurite-") as directory:
        command = [binary, "--silent", "--skipApiVersionCheck", "--disableTelemetry", f"--blobPort={port}"]
        command.append(f"--location={directory}")
        with running_server(command, Path(directory, "log"), lambda: _make_container(endpoint)):
            yield {
                "container_name": CONTAINER,
                "account_name": ACCOUNT,
                "account_key": KEY,
                "endpoint": endpoint,
                "client_options": {"allow_http": True},
            }


def _make_container(endpoint: str) -> None:
    headers = {
        "x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"),
        "x-ms-version": "2021-08-06",
    }
    named = "".join(f"{name}:{value}\n" for name, value in headers.items())
    text = "PUT" + 12 * "\n" + f"{named}/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
    headers |= {"authorization": f"SharedKey {ACCOUNT}:{signature}", "content-length": "0"}
    url = f"{endpoint}/{CONTAINER}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), timeout=10).close()
