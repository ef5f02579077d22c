"""Publisher and subscribers that have a storage in common, and nothing else."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from obstore.store import MemoryStore

import aiostage
from aiostage import (
    AsyncStager,
    CheckpointCorruptError,
    HostMemoryError,
    StorageError,
    UnsupportedLeafError,
    WeightsError,
)
from aiostage.abc import Storage
from aiostage.storage import ObjectStorage
from aiostage.testing.cancelling import CancelledAt, at_every_await
from aiostage.weights import WeightPublisher, WeightSubscriber
from tests.checkpoint.memory_storage import MemoryStorage
from tests.weights.trees import until, versions_in, weights

INTERVAL = 0.005


def only_version(storage: MemoryStorage) -> str:
    """Return the name of the checkpoint of the one version that there is."""
    (name,) = storage.checkpoints.keys() - {"newest"}
    return name


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["objects", "directory"])
async def test_the_same_lines_over_a_storage(kind: str, tmp_path: Path) -> None:
    target: Any = ObjectStorage(MemoryStore()) if kind == "objects" else f"file://{tmp_path}"
    seen = []

    async def serve() -> None:
        async with WeightSubscriber(target, interval=INTERVAL) as subscriber:
            async for version in subscriber:
                assert versions_in(version.state_dict) == {float(version.version)}
                seen.append((version.epoch, version.version))

    serving = asyncio.create_task(serve())
    # Numbers of the second may begin again.
    for first in (5, 1):
        async with WeightPublisher(target, max_versions=4) as publisher:
            for number in range(first, first + 6):
                await publisher.publish(weights(number), version=number)
            await until(lambda number=number: (seen and seen[-1][1] == number) or serving.done())
            assert publisher.versions == tuple(range(first + 2, first + 6))
    serving.cancel()
    await asyncio.wait([serving])
    assert len({epoch for epoch, _ in seen}) == 2
    assert seen == sorted(seen)
    if kind == "directory":
        assert len([name for name in os.listdir(tmp_path) if name.startswith("weights-")]) == 4


@pytest.mark.asyncio
async def test_a_look_at_the_pointer_is_one_small_request() -> None:
    storage = ObjectStorage(MemoryStore())
    requests: list[str] = []
    get = storage._bucket.get

    async def counted(path: str, *, at_most: int) -> Any:
        requests.append(path)
        return await get(path, at_most=at_most)

    storage._bucket.get = counted  # type: ignore[method-assign]
    async with WeightPublisher(storage) as publisher, WeightSubscriber(storage, interval=INTERVAL) as subscriber:
        await publisher.publish(weights(0))
        await subscriber.get()
        requests.clear()
        waiting = asyncio.create_task(subscriber.get())
        await until(lambda: len(requests) > 5)
        assert set(requests) == {"newest/checkpoint.json"}
        waiting.cancel()
        await asyncio.wait([waiting])


@pytest.mark.asyncio
async def test_a_version_that_could_not_be_saved_takes_no_place() -> None:
    async with WeightPublisher(MemoryStorage(), max_versions=4) as publisher:
        for number in range(4):
            await publisher.publish(weights(number))
        for _ in range(4):
            with pytest.raises(UnsupportedLeafError):
                await publisher.publish({"lock": threading.Lock()})
        assert publisher.versions == (0, 1, 2, 3)
        await publisher.publish(weights(9), version=9)
        assert publisher.versions == (1, 2, 3, 9)


@pytest.mark.anyio
class TestFaults:
    async def test_a_storage_that_cannot_be_reached(self) -> None:
        storage, failures = MemoryStorage(), [0]

        async def fail(operation: str, name: str) -> None:
            if failures[0] > 0:
                failures[0] -= 1
                raise StorageError("out of reach")

        storage.before = fail
        async with WeightPublisher(storage) as publisher, WeightSubscriber(storage, interval=INTERVAL) as subscriber:
            await publisher.publish(weights(1), version=1)
            failures[0] = 3
            assert (await subscriber.get()).version == 1
            assert subscriber.connected
            failures[0] = 1
            with pytest.raises(StorageError, match="out of reach"):
                await publisher.publish(weights(2), version=2)
            await publisher.publish(weights(3), version=3)
            assert (await subscriber.get()).version == 3

    async def test_a_version_that_is_removed_while_it_is_looked_for(self) -> None:
        storage = MemoryStorage()
        async with WeightPublisher(storage) as publisher, WeightSubscriber(storage, interval=INTERVAL) as subscriber:
            await publisher.publish(weights(1), version=1)
            assert storage.checkpoints.pop(only_version(storage))

            async def replace(operation: str, name: str) -> None:
                if operation == "read" and name.startswith("weights-"):
                    storage.before = None
                    await publisher.publish(weights(2), version=2)

            storage.before = replace
            assert (await subscriber.get()).version == 2

    async def test_damage_is_an_error_and_the_next_version_comes(self) -> None:
        storage = MemoryStorage()
        async with WeightPublisher(storage) as publisher, WeightSubscriber(storage, interval=INTERVAL) as subscriber:
            await aiostage.save({"epoch": 1}, (storage, "newest"))
            with pytest.raises(CheckpointCorruptError, match="newest: it does not point to weights"):
                await subscriber.get()
            await self.check_waits(subscriber)
            await storage.delete("newest")
            await publisher.publish(weights(1), version=1)
            files = storage.checkpoints[only_version(storage)]
            files["model.safetensors"] = files["model.safetensors"][:-1] + b"\1"
            with pytest.raises(CheckpointCorruptError):
                await subscriber.get()
            await self.check_waits(subscriber)
            await publisher.publish(weights(2), version=2)
            assert (await subscriber.get()).version == 2

    async def check_waits(self, subscriber: WeightSubscriber) -> None:
        """Check that an error is raised once, and the next call waits for what comes next."""
        with anyio.move_on_after(20 * INTERVAL) as waiting:
            await subscriber.get()
        assert waiting.cancelled_caught

    async def test_a_version_without_memory_for_it_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = MemoryStorage()
        async with WeightPublisher(storage) as publisher, WeightSubscriber(storage, interval=INTERVAL) as subscriber:
            await publisher.publish(weights(1), version=1)

            async def refuse(operation: str, name: str) -> None:
                if operation == "read" and name.startswith("weights-"):
                    storage.before = None
                    raise HostMemoryError("no memory.")

            storage.before = refuse
            with pytest.raises(HostMemoryError):
                await subscriber.get()
            assert (await subscriber.get()).version == 1

    async def test_a_later_publisher_takes_over(self) -> None:
        storage: Storage = MemoryStorage()
        early, late = WeightPublisher(storage), WeightPublisher(storage)
        early._sender.epoch, late._sender.epoch = "1", "2"
        async with early, late:
            await early.publish(weights(1))
            await late.publish(weights(7))
            with pytest.raises(
                WeightsError, match="another publisher has started at this target since, and published version 0"
            ):
                await early.publish(weights(2))
            async with WeightSubscriber(storage, interval=INTERVAL) as subscriber:
                version = await subscriber.get()
                assert (version.epoch, versions_in(version.state_dict)) == ("2", {7.0})

    async def test_subscribers_do_not_answer(self) -> None:
        async with WeightPublisher(MemoryStorage()) as publisher:
            await publisher.publish(weights(1))
            assert publisher.subscribers == ()
            with pytest.raises(WeightsError, match="subscribers of a storage do not answer"):
                await publisher.acknowledged(0)

    async def test_old_versions_that_cannot_be_removed_now_are_removed_later(self) -> None:
        storage, refused = MemoryStorage(), [2]

        async def fail(operation: str, name: str) -> None:
            if operation == "delete" and refused[0] > 0:
                refused[0] -= 1
                raise StorageError("not now")

        storage.before = fail
        async with WeightPublisher(storage, max_versions=4) as publisher:
            for number in range(7):
                await publisher.publish(weights(number))
            assert publisher.versions == (3, 4, 5, 6)
        assert len(storage.checkpoints) == 5


@pytest.mark.asyncio
async def test_a_snapshot_is_saved_while_training_goes_on() -> None:
    live = {"weight": torch.ones(1000)}
    storage = MemoryStorage()
    async with AsyncStager() as stager, WeightPublisher(storage, stager) as publisher:
        async with stager.snapshot(live) as snapshot:
            publishing = asyncio.create_task(publisher.publish(snapshot))
            await snapshot.captured()
            live["weight"].zero_()
            await publishing
        async with WeightSubscriber(storage, interval=INTERVAL) as subscriber:
            assert float((await subscriber.get()).state_dict["weight"].sum()) == 1000.0


@pytest.mark.asyncio
async def test_a_version_that_is_written_late_does_not_replace_one_whose_publication_was_cancelled() -> None:
    # How often a publication suspends depends on its threads, so one pass may miss the suspension after the pointer.
    written = passes = 0
    while not written and passes < 10:
        passes += 1
        for number in count():
            storage = MemoryStorage()
            async with WeightPublisher(storage) as publisher:
                early, late = publisher.publish(weights(4), version=4), publisher.publish(weights(5), version=5)
                cancelled = CancelledAt(late, number)
                with suppress(asyncio.CancelledError):
                    await cancelled
                is_written = "newest" in storage.checkpoints
                await early
                async with WeightSubscriber(storage, interval=INTERVAL) as subscriber:
                    # Cancelled when its pointer was written: then it is the newest.
                    assert (await subscriber.get()).version == (5 if is_written else 4)
            if not cancelled.reached:
                break
            written += is_written
    assert written


@pytest.mark.asyncio
async def test_publishing_and_receiving_cancelled_at_every_await() -> None:
    storage = MemoryStorage()
    async with WeightPublisher(storage, max_versions=4) as publisher:

        async def publish() -> None:
            await publisher.publish(weights(1))

        async def receive() -> None:
            async with WeightSubscriber(storage, interval=INTERVAL) as subscriber:
                await subscriber.get()

        await publish()
        async for _ in at_every_await(publish):
            newest = await aiostage.load((storage, "newest"))
            assert f"weights-{newest['epoch']}-{newest['version']:020}" in storage.checkpoints
            assert storage.under_way == []
        async for _ in at_every_await(receive):
            pass
        for _ in range(4):
            await publish()
        assert len(storage.checkpoints) == 5
