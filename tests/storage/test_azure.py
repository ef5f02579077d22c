"""ObjectStorage on Azure, as far as Azurite is like it. Skipped where that is not installed."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from obstore.store import AzureStore

import aiostage
from aiostage import CheckpointExistsError
from aiostage.abc import Storage
from aiostage.storage import ObjectStorage, clean_up
from aiostage.testing import StorageSuite
from tests.storage.buckets import PART, race, some_bytes, write
from tests.storage.test_objects_suite import strays_in

pytestmark = pytest.mark.asyncio


@pytest.fixture
def prefix() -> str:
    return f"run-{secrets.token_hex(4)}"


class TestAzurite(StorageSuite):
    @pytest.fixture(autouse=True)
    def _server(self, azure_options: dict[str, Any]) -> None:
        self.store = AzureStore(**azure_options)

    def make_storage(self) -> Storage:
        self.prefix = f"run-{secrets.token_hex(4)}"
        return ObjectStorage(self.store, self.prefix)

    async def count_stale_files(self, storage: Storage) -> int:
        return len(await strays_in(self.store, self.prefix))


async def test_a_save_and_a_load(azure_options: dict[str, Any], prefix: str) -> None:
    options = {name: value for name, value in azure_options.items() if name != "container_name"}
    storage = ObjectStorage.from_url(f"az://{azure_options['container_name']}/{prefix}", **options)
    state = {"step": 3, "weights": torch.from_numpy(np.random.default_rng(0).normal(size=3 << 20)), "none": None}
    info = await aiostage.save(state, (storage, "a/step-3"))
    assert info.location == f"az://ckpt/{prefix}/a/step-3"
    loaded = await aiostage.load((storage, "a/step-3"))
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], state["weights"])
    with pytest.raises(CheckpointExistsError):
        await aiostage.save(state, (storage, "a/step-3"))
    async with aiostage.Checkpointer(storage, keep=1) as checkpoints:
        for step in (1, 2):
            await (await checkpoints.save(step, state)).committed()
    assert sorted(await storage.list()) == ["a/step-3", "step-00000002"]


async def test_of_two_writers_one_wins(azure_options: dict[str, Any], prefix: str) -> None:
    storage = ObjectStorage(AzureStore(**azure_options), prefix)
    for name in map(str, range(10)):
        await race(storage, name)


async def test_a_clean_up(azure_options: dict[str, Any], prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure's own clock and times of writing tell what is old."""
    store = AzureStore(**azure_options)
    storage = ObjectStorage(store, prefix, lease_seconds=3600)
    await write(await storage.open("a"), "data", some_bytes(2 * PART))
    await storage.clean_up()
    assert len(await strays_in(store, prefix)) == 2
    now = clean_up._now

    async def later(bucket: Any) -> datetime:
        return await now(bucket) + timedelta(seconds=3700)

    monkeypatch.setattr(clean_up, "_now", later)
    await storage.clean_up()
    assert obstore.list(store, prefix).collect() == []
