"""Trees of tensors to object stores and back, as users write it."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from typing import Any

import obstore
import pytest
import torch
from obstore.store import MemoryStore, S3Store
from torch import nn

import aiostage
from aiostage.storage import ObjectStorage
from tests.checkpoint.comparing import assert_same
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server

pytestmark = pytest.mark.asyncio


def tree() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 3000), nn.BatchNorm1d(3000), nn.Linear(3000, 10))
    weights = model.state_dict()
    return {
        "model": dict(weights),
        "tied": weights["0.weight"],
        "half": torch.randn(5000, 333, dtype=torch.bfloat16),
        "step": 7,
        "names": ["a", ("b", None)],
    }


@pytest.fixture
def store(s3_server: S3Server) -> S3Store:
    return S3Store(BUCKET, prefix=secrets.token_hex(4), **s3_server.options())


async def test_a_tree_to_s3_and_back(store: S3Store, s3_server: S3Server) -> None:
    source = tree()
    info = await aiostage.save(source, (store, "runs/7"), max_shard_bytes=4_000_000)
    assert info.location == f"s3://{BUCKET}/{store.prefix}/runs/7"
    assert len(info.files) > 2
    assert_same(await aiostage.load((store, "runs/7")), source)
    live = tree()
    live["model"]["0.weight"].zero_()
    live["half"].zero_()
    await aiostage.load((store, "runs/7"), into=live)
    assert_same(live, source)
    with pytest.raises(aiostage.CheckpointExistsError):
        await aiostage.save(source, (store, "runs/7"))
    await aiostage.save(source | {"step": 8}, (store, "runs/7"), overwrite=True)
    assert (await aiostage.load((store, "runs/7")))["step"] == 8
    assert open_uploads(s3_server, str(store.prefix)) == []


async def test_more_than_fits_the_budget(store: S3Store) -> None:
    source = {f"layer {number}": torch.full((1 << 20,), float(number)) for number in range(24)}
    async with aiostage.AsyncStager(aiostage.StagingOptions(max_host_bytes=40 << 20)) as stager:
        await aiostage.save(source, (store, "a"), stager=stager)
    assert_same(await aiostage.load((store, "a")), source)


@pytest.mark.parametrize("steps", range(0, 60, 12))
async def test_a_save_that_is_cancelled(store: S3Store, s3_server: S3Server, steps: int) -> None:
    task = asyncio.ensure_future(aiostage.save({"a": torch.ones(10_000_000)}, (store, "a")))
    for _ in range(steps):
        await asyncio.sleep(0.005)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert open_uploads(s3_server, str(store.prefix)) == []
    if await ObjectStorage(store).list():
        assert torch.equal((await aiostage.load((store, "a")))["a"], torch.ones(10_000_000))
    else:
        assert obstore.list(store).collect() == []


async def test_damage_is_found(store: S3Store) -> None:
    await aiostage.save({"a": torch.ones(1000)}, (store, "a"))
    (path,) = [meta["path"] for meta in obstore.list(store).collect() if meta["path"].endswith("model.safetensors")]
    data = bytearray(bytes(obstore.get(store, path).bytes()))
    data[-1] ^= 1
    obstore.put(store, path, bytes(data))
    with pytest.raises(aiostage.CheckpointCorruptError, match=rf"s3://{BUCKET}/.*/model\.safetensors"):
        await aiostage.load((store, "a"))
    obstore.put(store, path, bytes(data[:-10]))
    with pytest.raises(aiostage.CheckpointCorruptError, match=rf"s3://{BUCKET}/.*/model\.safetensors"):
        await aiostage.load((store, "a"))
    obstore.delete(store, path)
    with pytest.raises(aiostage.CheckpointCorruptError, match="the file is missing"):
        await aiostage.load((store, "a"))


async def test_the_checkpoints_of_a_run() -> None:
    store = MemoryStore()
    weights = torch.zeros(1000)
    async with aiostage.Checkpointer(store, keep=2, max_in_flight=2) as checkpoints:
        for step in range(5):
            weights += 1
            await checkpoints.save(step, {"weights": weights})
    assert await checkpoints.steps() == [3, 4]
    assert torch.equal((await checkpoints.restore())["weights"], weights)
    assert len(obstore.list(store).collect()) == 8
