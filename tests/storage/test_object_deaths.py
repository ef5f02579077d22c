"""Writers that are killed during a save to a real server: no reader sees their files, and a clean-up removes them."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import time
from datetime import datetime, timedelta
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from aiostage import Checkpointer
from aiostage.storage import ObjectStorage
from aiostage.storage import clean_up as module
from tests.patience import seconds
from tests.servers.proxy import Fault, FaultProxy, running_proxy
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import PART, content, save, some_bytes
from tests.warm import PYTHON

SEND = r"^PUT .*partNumber="
MANIFEST = r"^PUT .*/manifest.json$"
POINTER = r"^PUT .*/checkpoint.json$"

WRITER = """
import asyncio, sys
from obstore.store import S3Store
from aiostage.storage import ObjectStorage
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import PART, save, some_bytes
port, prefix, name, lease_seconds = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
storage = ObjectStorage(S3Store(BUCKET, **S3Server(port).options()), prefix, lease_seconds=lease_seconds)
asyncio.run(save(storage, name, some_bytes(2 * PART + 777)))
"""


def start(proxy: FaultProxy, prefix: str, name: str, lease_seconds: float = 3600) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PYTHON, "-c", WRITER, str(proxy.port), prefix, name, str(lease_seconds)])


def wait_for(fault: Fault, writer: subprocess.Popen[bytes]) -> None:
    while not fault.struck and writer.poll() is None:
        time.sleep(0.01)
    assert fault.struck, "the writer has ended by itself"


@pytest.mark.slow
@pytest.mark.parametrize(("request_", "spared"), [(SEND, 1), (MANIFEST, 0), (POINTER, 0)])
def test_killed_in_the_middle(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request_: str, spared: int) -> None:
    prefix = f"run-{secrets.token_hex(4)}"
    store = S3Store(BUCKET, **s3_server.options())
    storage = ObjectStorage(store, prefix)
    fault = Fault("stall", request_, spared=spared)
    with running_proxy(s3_server.port) as proxy:
        proxy.faults.append(fault)
        writer = start(proxy, prefix, "a")
        try:
            wait_for(fault, writer)
        finally:
            writer.kill()
            writer.wait()
    now = module._now

    async def later(bucket: Any) -> datetime:
        return await now(bucket) + timedelta(hours=2)

    async def check() -> None:
        assert await storage.list() == []
        await storage.clean_up()
        left = [meta["path"] for meta in obstore.list(store, prefix).collect()]
        assert any(path.endswith("/lease.json") for path in left), "the clean-up was too early"
        data = some_bytes(PART)
        await save(storage, "a", data)
        monkeypatch.setattr(module, "_now", later)
        await storage.clean_up()
        assert len(obstore.list(store, prefix).collect()) == 4
        assert await content(storage, "a") == (bytes(data[:100]), bytes(data))
        # The upload that was killed itself is for a rule of the bucket: no client of ours can list it.
        assert len(open_uploads(s3_server, prefix)) == (request_ == SEND)

    asyncio.run(check())


@pytest.mark.slow
def test_a_new_writer_removes_files_of_killed_writers_and_not_of_running_ones(s3_server: S3Server) -> None:
    """With clocks as they are, and leases as short as these clocks allow."""
    # Three seconds where nothing else runs. A busy machine may not give a living writer a turn for as long as that.
    prefix, lease_seconds = f"run-{secrets.token_hex(4)}", seconds(0.75)
    store = S3Store(BUCKET, **s3_server.options())
    storage = ObjectStorage(store, prefix, lease_seconds=lease_seconds)
    stalled, slow = (
        Fault("stall", "/dead/.*partNumber="),
        Fault("slow", "/alive/.*partNumber=1&", 1, number=int(PART / (3 * lease_seconds))),
    )

    def being_written() -> list[str]:
        paths = [meta["path"] for meta in obstore.list(store, prefix).collect()]
        return sorted(path.split("/")[1] for path in paths if path.endswith("/lease.json"))

    async def begin() -> None:
        async with Checkpointer(storage):
            pass

    with running_proxy(s3_server.port) as proxy:
        proxy.faults += [stalled, slow]
        dead, alive = (start(proxy, prefix, name, lease_seconds) for name in ("dead", "alive"))
        try:
            wait_for(stalled, dead)
            wait_for(slow, alive)
            dead.kill()
            asyncio.run(begin())
            assert being_written() == ["alive", "dead"]
            while "dead" in being_written():
                time.sleep(0.2)
                asyncio.run(begin())
            assert being_written() == ["alive"]
            assert alive.wait(seconds(30)) == 0
        finally:
            for writer in (dead, alive):
                writer.kill()
                writer.wait()
    data = some_bytes(2 * PART + 777)
    assert asyncio.run(content(storage, "alive")) == (bytes(data[:100]), bytes(data))
    assert asyncio.run(storage.list()) == ["alive"]
