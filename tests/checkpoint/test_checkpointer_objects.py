"""The checkpoints of a run in object stores: in memory, and on a real server."""

from __future__ import annotations

import secrets
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore, S3Store

from aiostage import Checkpointer, CheckpointExistsError
from aiostage.storage import ObjectStorage
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.names import name_of
from tests.checkpoint.runs import LoRA, copied
from tests.checkpoint.test_incremental import settled
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return MemoryStore()
    return S3Store(BUCKET, **request.getfixturevalue("s3_server").options())


@pytest.mark.parametrize("incremental", [False, True])
async def test_a_run(store: Any, incremental: bool) -> None:
    prefix = f"run-{secrets.token_hex(4)}"
    model = LoRA(3)
    saved = {}
    for begin in (0, 2):
        # The second is a restart.
        storage = ObjectStorage(store, prefix)
        async with Checkpointer(storage, incremental=incremental, keep=2, max_in_flight=2) as checkpoints:
            for step in range(begin, begin + 2):
                handle = await checkpoints.save(step, model.state_dict(step))
                saved[step] = copied(model.state_dict(step))
                model.train()
                info = await handle.committed()
                await settled(checkpoints)
    assert await checkpoints.steps() == [2, 3]
    for step in (2, 3):
        assert_same(saved[step], await checkpoints.restore(step=step))
    assert (info.written_bytes < 3 << 20) == incremental
    held = sum(meta["size"] for meta in obstore.list(store, prefix).collect())
    whole = sum(tensor.nbytes for branch in (model.tower, model.adapter) for tensor in branch.values())
    assert held < (2 * whole if incremental else 3 * whole)


async def test_two_writers_for_one_step(s3_server: S3Server) -> None:
    prefix = f"run-{secrets.token_hex(4)}"
    store = S3Store(BUCKET, **s3_server.options())
    models = LoRA(1), LoRA(2)
    async with Checkpointer(ObjectStorage(store, prefix)) as ours, Checkpointer(ObjectStorage(store, prefix)) as theirs:
        handles = [await each.save(1, model.state_dict(1)) for each, model in zip((ours, theirs), models, strict=True)]
        outcomes = []
        for handle in handles:
            try:
                await handle.committed()
                outcomes.append(True)
            except CheckpointExistsError:
                outcomes.append(False)
    assert sorted(outcomes) == [False, True]
    assert_same(models[outcomes.index(True)].state_dict(1), await ours.restore(step=1))
    assert not open_uploads(s3_server, f"{prefix}/{name_of(1)}")
