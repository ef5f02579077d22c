"""Writers that are killed in the middle of a save to a real server: nothing of it is seen, and a sweep removes it."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import time
from datetime import datetime, timedelta
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from aiostage.storage import sweep as module
from aiostage.storage.objects import ObjectStorage
from tests.servers.proxy import Fault, running_proxy
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import PART, content, save, some_bytes

SEND = r"^PUT .*partNumber="
MANIFEST = r"^PUT .*/manifest.json$"
POINTER = r"^PUT .*/checkpoint.json$"

WRITER = """
import asyncio, sys
from obstore.store import S3Store
from aiostage.storage.objects import ObjectStorage
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import PART, save, some_bytes
port, prefix = int(sys.argv[1]), sys.argv[2]
storage = ObjectStorage(S3Store(BUCKET, **S3Server(port).options()), prefix)
asyncio.run(save(storage, "a", some_bytes(2 * PART + 777)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("request_", "spared"), [(SEND, 1), (MANIFEST, 0), (POINTER, 0)])
def test_killed_in_the_middle(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request_: str, spared: int) -> None:
    prefix = f"run-{secrets.token_hex(4)}"
    store = S3Store(BUCKET, **s3_server.options())
    storage = ObjectStorage(store, prefix)
    fault = Fault("stall", request_, spared=spared)
    with running_proxy(s3_server.port) as proxy:
        proxy.faults.append(fault)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(proxy.port), prefix])
        try:
            while not fault.struck and writer.poll() is None:
                time.sleep(0.01)
            assert fault.struck, "the writer has ended by itself"
        finally:
            writer.kill()
            writer.wait()
    now = module._now

    async def later(bucket: Any) -> datetime:
        return await now(bucket) + timedelta(hours=2)

    async def check() -> None:
        assert await storage.list() == []
        await storage.sweep()
        left = [meta["path"] for meta in obstore.list(store, prefix).collect()]
        assert any(path.endswith("/lease.json") for path in left), "the sweep was too early"
        assert len(open_uploads(s3_server, prefix)) == (request_ == SEND), "the sweep was too early"
        data = some_bytes(PART)
        await save(storage, "a", data)
        monkeypatch.setattr(module, "_now", later)
        await storage.sweep()
        assert len(obstore.list(store, prefix).collect()) == 4
        assert await content(storage, "a") == (bytes(data[:100]), bytes(data))
        assert open_uploads(s3_server, prefix) == []

    asyncio.run(check())
