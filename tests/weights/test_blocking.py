"""The same for programs without an event loop, and on trio."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiostage import StagingOptions, WeightsError, blocking
from aiostage.weights import WeightPublisher, WeightSubscriber
from tests.checkpoint.memory_storage import MemoryStorage
from tests.weights.trees import until, versions_in, weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "weights.sock")


@pytest.fixture
def threads() -> Iterator[None]:
    """Fail if a background thread is left."""
    others = set(threading.enumerate())
    yield
    new = {thread.name for thread in set(threading.enumerate()) - others}
    assert not new & {"aiostage-weights", "aiostage-stager"}


@pytest.mark.usefixtures("threads")
class TestBlocking:
    def test_a_loop_on_each_side(self, path: str) -> None:
        seen = []

        def serve() -> None:
            with blocking.WeightSubscriber(path) as subscriber:
                for version in subscriber:
                    seen.append(versions_in(version.state_dict))
                    if version.version == 5:
                        break

        serving = threading.Thread(target=serve)
        serving.start()
        with blocking.WeightPublisher(path) as publisher:
            for number in range(1, 6):
                assert publisher.publish(weights(number), version=number) == number
            publisher.acknowledged(5)
            assert publisher.versions[-1] == 5
        serving.join()
        assert seen[-1] == {5.0}

    def test_a_stager_and_a_snapshot_of_ones_own(self, path: str) -> None:
        live = {"weight": torch.ones(100)}
        with (
            blocking.Stager(StagingOptions(use_shared_memory=True, dtype=torch.bfloat16)) as stager,
            blocking.WeightPublisher(path, stager) as publisher,
            blocking.WeightSubscriber(path, timeout=30) as subscriber,
        ):
            with stager.snapshot(live) as snapshot:
                snapshot.captured()
                live["weight"].zero_()
                publisher.publish(snapshot)
            version = subscriber.get()
            assert (subscriber.connected, subscriber.newest) == (True, 0)
            assert version.state_dict["weight"].dtype is torch.bfloat16
            assert float(version.state_dict["weight"].sum()) == 100.0
            version.acknowledge()
            publisher.acknowledged(0)

    def test_outside_of_the_block(self, path: str) -> None:
        subscriber = blocking.WeightSubscriber(path)
        with pytest.raises(WeightsError, match="was not entered"):
            subscriber.get()
        with subscriber:
            assert repr(subscriber).startswith("<blocking <WeightSubscriber ")
            with pytest.raises(WeightsError, match="entered before"):
                subscriber.open()
        subscriber.close()
        with pytest.raises(WeightsError, match="was left"):
            next(subscriber)
        with pytest.raises(TypeError, match=r"aiostage\.blocking\.Stager"):
            blocking.WeightPublisher(path, "stager")  # type: ignore[arg-type]

    def test_without_with(self, path: str) -> None:
        publisher, subscriber = blocking.WeightPublisher(path), blocking.WeightSubscriber(path)
        for end in (publisher, subscriber):
            end.open()
        publisher.publish(weights(4))
        assert versions_in(subscriber.get().state_dict) == {4.0}
        for end in (subscriber, publisher, publisher):
            end.close()


@pytest.mark.anyio
async def test_over_a_socket_on_trio(path: str) -> None:
    async with WeightSubscriber(path) as subscriber:
        for first in (10, 1):
            async with WeightPublisher(path) as publisher:
                for number in range(first, first + 5):
                    await publisher.publish(weights(number), version=number)
                version = await anext(subscriber)
                assert versions_in(version.state_dict) == {float(first + 4)}
                version.acknowledge()
                await publisher.acknowledged(first + 4)
                del version
                await until(lambda publisher=publisher: publisher.subscribers[0].holds == ())


@pytest.mark.anyio
async def test_over_a_storage_on_trio() -> None:
    storage = MemoryStorage()
    async with WeightPublisher(storage) as publisher, WeightSubscriber(storage, interval=0.01) as subscriber:
        await publisher.publish(weights(3))
        assert versions_in((await subscriber.get()).state_dict) == {3.0}
