"""Errors leave no reference cycles behind, wherever they are caught."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import MemoryStore

import aiostage
from aiostage import AsyncStager, StagingOptions
from aiostage.storage import LocalStorage, ObjectStorage
from aiostage.storage.objects import _answered, _settled
from aiostage.testing.cancelling import CancelledAt
from tests.circles import no_circles

STATE = {"a": torch.ones(100), "b": [torch.zeros(3), {"step": 1}]}
EAGER = StagingOptions(max_loop_hold=1e-9)


@pytest.fixture(params=["directory", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return LocalStorage(tmp_path) if request.param == "directory" else ObjectStorage(MemoryStore())


@pytest.mark.asyncio
class TestErrorsThatAreCaught:
    async def test_a_leaf_that_is_refused(self) -> None:
        async with AsyncStager() as stager:
            with no_circles(), suppress(aiostage.UnsupportedLeafError):
                await stager.stage({"a": torch.ones(2, device="meta")})

    async def test_staging_cancelled(self) -> None:
        async with AsyncStager(EAGER) as stager:
            for number in range(0, 40, 4):
                with no_circles(), suppress(asyncio.CancelledError):
                    await CancelledAt(stager.stage(STATE), number)

    async def test_a_checkpoint_that_is_not_there(self, storage: Any) -> None:
        with no_circles(), suppress(aiostage.CheckpointNotFoundError):
            await aiostage.load((storage, "absent"))

    async def test_a_checkpoint_that_is_there(self, storage: Any) -> None:
        with no_circles():
            await aiostage.save(STATE, (storage, "a"))
        with no_circles(), suppress(aiostage.CheckpointExistsError):
            await aiostage.save(STATE, (storage, "a"))
        with no_circles():
            await aiostage.load((storage, "a"))

    async def test_a_draft_that_is_dropped(self, storage: Any) -> None:
        with no_circles():
            pending = await storage.open("a")
            await pending.abort()

    async def test_saving_cancelled(self, storage: Any) -> None:
        for number in range(0, 30, 5):
            with no_circles(), suppress(asyncio.CancelledError, aiostage.CheckpointExistsError):
                await CancelledAt(aiostage.save(STATE, (storage, "a")), number)

    @pytest.mark.parametrize("wait", [_answered, _settled])
    async def test_a_request_that_fails(self, wait: Any) -> None:
        # What a future has failed with has the frame of who waited for it in its traceback.
        loop = asyncio.get_running_loop()
        requests = [loop.create_future()]
        loop.call_soon(requests[0].set_exception, OSError("unreachable"))
        with no_circles():
            with suppress(OSError):
                await wait(requests.pop())
            # The loop refers to what it has called last.
            await asyncio.sleep(0)
