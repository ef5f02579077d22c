"""ObjectStorage through the suite for storages: in memory, and on a real server."""

from __future__ import annotations

import asyncio
import secrets

import obstore
import pytest
from obstore.store import MemoryStore, ObjectStore, S3Store

from aiostage.abc import Storage
from aiostage.storage import ObjectStorage
from aiostage.testing import StorageSuite, at_every_await
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import content, is_pointer, some_bytes, strays, write


async def strays_in(store: ObjectStore, prefix: str) -> list[str]:
    """Return the objects that belong to no committed checkpoint."""
    paths = [meta["path"] for meta in await obstore.list(store, prefix).collect_async()]
    found = filter(is_pointer, paths)
    return strays(paths, {path: bytes(await (await obstore.get_async(store, path)).bytes_async()) for path in found})


@pytest.mark.asyncio
class TestMemoryStore(StorageSuite):
    def make_storage(self) -> Storage:
        self.store = MemoryStore()
        return ObjectStorage(self.store, "run")

    async def count_stale_files(self, storage: Storage) -> int:
        return len(await strays_in(self.store, "run"))


@pytest.mark.asyncio
class TestS3(StorageSuite):
    @pytest.fixture(autouse=True)
    def _server(self, s3_server: S3Server) -> None:
        self.server = s3_server

    def make_storage(self) -> Storage:
        self.store = S3Store(BUCKET, **self.server.options())
        self.prefix = f"run-{secrets.token_hex(4)}"
        return ObjectStorage(self.store, self.prefix)

    async def count_stale_files(self, storage: Storage) -> int:
        uploads = await asyncio.to_thread(open_uploads, self.server, self.prefix)
        return len(uploads) + len(await strays_in(self.store, self.prefix))


@pytest.mark.asyncio
async def test_an_upload_of_many_requests_cancelled_at_every_await(s3_server: S3Server) -> None:
    store, prefix = S3Store(BUCKET, **s3_server.options()), f"run-{secrets.token_hex(4)}"
    storage = ObjectStorage(store, prefix)
    data = some_bytes((10 << 20) + 5)

    async def whole() -> None:
        pending = await storage.open("a", overwrite=True)
        try:
            await write(pending, "data", data, 5 << 20)
            await pending.commit(data[:100])
        except BaseException:
            await pending.abort()
            raise

    async for number in at_every_await(whole):
        assert await asyncio.to_thread(open_uploads, s3_server, prefix) == [], number
        assert await strays_in(store, prefix) == [], number
    assert await content(storage, "a") == (bytes(data[:100]), bytes(data))
