"""ObjectStorage through the suite for storages: in memory, and on a real server."""

from __future__ import annotations

import secrets

import pytest
from obstore.store import MemoryStore, S3Store

from aiostage.abc import Storage
from aiostage.storage.objects import ObjectStorage
from aiostage.testing import StorageSuite
from tests.servers.weed import BUCKET, S3Server


@pytest.mark.asyncio
class TestMemoryStore(StorageSuite):
    def make_storage(self) -> Storage:
        return ObjectStorage(MemoryStore(), "run")


@pytest.mark.asyncio
class TestS3(StorageSuite):
    @pytest.fixture(autouse=True)
    def _server(self, s3_server: S3Server) -> None:
        self.server = s3_server

    def make_storage(self) -> Storage:
        return ObjectStorage(S3Store(BUCKET, **self.server.options()), f"run-{secrets.token_hex(4)}")
