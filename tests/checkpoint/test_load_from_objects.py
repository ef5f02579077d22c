from __future__ import annotations

from typing import Any

import pytest
import torch
from obstore.store import MemoryStore

import aiostage
from aiostage import CheckpointCorruptError
from aiostage.checkpoint.verify import verify
from aiostage.storage import storage_at
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.counting import CountingStorage


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
