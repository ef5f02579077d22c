from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import MemoryStore, S3Store

import aiostage
from aiostage import CheckpointCorruptError
from aiostage.abc import Storage
from aiostage.checkpoint.verify import verify
from aiostage.storage import LocalStorage, ObjectStorage, storage_at
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.counting import CountingStorage
from tests.servers.proxy import running_proxy
from tests.servers.weed import BUCKET, S3Server


def tree(value: float) -> dict[str, Any]:
    return {
        "step": int(value),
        "large": torch.full((3_000_001,), value),
        "turned": torch.full((30, 50), value).t(),
        "layers": [torch.full((7,), value) for _ in range(20)],
    }


@pytest.mark.asyncio
async def test_every_way_of_loading() -> None:
    storage = CountingStorage(storage_at(MemoryStore()))
    await aiostage.save(tree(2), (storage, "checkpoint"), max_shard_bytes=4_000_000)
    source = (storage, "checkpoint")
    assert_same(tree(2), await aiostage.load(source))
    for in_place in (False, True):
        live = tree(1)
        await aiostage.load(source, into=live, in_place=in_place)
        assert_same(tree(2), live)
    assert_same({"layers": tree(2)["layers"]}, await aiostage.load(source, only="layers"))
    assert (await verify(source)).manifest.leaves == 22


@pytest.mark.asyncio
async def test_an_object_that_was_changed() -> None:
    store = MemoryStore()
    storage = storage_at(store)
    await aiostage.save(tree(2), (storage, "checkpoint"))
    (path,) = [entry["path"] for batch in store.list() for entry in batch if entry["path"].endswith(".safetensors")]
    data = bytearray(bytes(store.get(path).bytes()))
    data[-1] ^= 1
    store.put(path, bytes(data))
    live = tree(1)
    with pytest.raises(CheckpointCorruptError, match="do not match their checksum") as caught:
        await aiostage.load((storage, "checkpoint"), into=live)
    assert (caught.value.path or "").endswith("model.safetensors")
    assert_same(tree(1), live)


@pytest.mark.asyncio
async def test_as_many_requests_at_once_as_hide_their_latency(s3_server: S3Server) -> None:
    saved = {str(n): torch.full((10,), float(n)) for n in range(40)}
    prefix = f"run-{secrets.token_hex(4)}"
    await aiostage.save(
        saved, (ObjectStorage(S3Store(BUCKET, **s3_server.options()), prefix), "checkpoint"), max_shard_bytes=40
    )
    with running_proxy(s3_server.port) as proxy:
        proxy.delay = 0.05
        storage = ObjectStorage(S3Store(BUCKET, **s3_server.options(port=proxy.port)), prefix)
        # One at a time until it is known what there is, then first of all the headers.
        assert_same(saved, await aiostage.load((storage, "checkpoint")))
        assert 12 <= proxy.most_at_once["GET"] <= 16
        assert proxy.most_at_once["HEAD"] <= 16


class Slow(CountingStorage):
    """Whose reads, but that of the header, wait until so many are under way."""

    def __init__(self, storage: Storage, reads_at_once: int, expected: int) -> None:
        super().__init__(storage)
        self.reads_at_once = reads_at_once
        self.before = self.wait
        self.expected = expected
        self.reached = asyncio.Event()
        self.under_way = self.most = 0

    async def wait(self, name: str, offset: int) -> None:
        if offset:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            if self.under_way == self.expected:
                self.reached.set()
            await self.reached.wait()
            # One more would begin before this one goes on.
            await asyncio.sleep(0.01)
            self.under_way -= 1


@pytest.mark.asyncio
@pytest.mark.parametrize(("wanted", "most"), [(1, 2), (7, 7), (100, 16)])
async def test_how_many_reads_there_are_is_for_the_storage_to_say(wanted: int, most: int, tmp_path: Path) -> None:
    info = await aiostage.save({"a": torch.zeros(18 << 20, dtype=torch.int64)}, tmp_path / "checkpoint")
    storage = Slow(LocalStorage(tmp_path), wanted, most)
    await verify((storage, info.path.name))
    # However many it likes, no more than 128 MiB are on their way.
    assert storage.most == most
