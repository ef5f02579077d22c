"""Publisher and subscribers over a socket, in one process."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import socket
import sys
from pathlib import Path
from typing import Any, cast

import anyio
import numpy
import pytest
import torch
from torch import nn

from aiostage import AsyncStager, StagingError, StagingOptions, UnsupportedLeafError, WeightsError
from aiostage.testing import LeakProbe, SimulatedAccelerator
from aiostage.testing.cancelling import at_every_await
from aiostage.weights import WeightPublisher, WeightSubscriber, WeightVersion
from tests.descriptors import SHARED_MEMORY, opened
from tests.patience import seconds
from tests.weights.trees import until, versions_in, weights

pytestmark = [pytest.mark.asyncio, pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc")]

SHARED = StagingOptions(use_shared_memory=True)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "weights.sock")


class TestVersions:
    async def test_five_lines_on_each_side(self, path: str) -> None:
        model, copy = nn.Linear(7, 5), nn.Linear(7, 5)

        async def train() -> None:
            async with WeightPublisher(path) as publisher:
                for step in range(3):
                    nn.init.constant_(model.weight, step)
                    await publisher.publish(model.state_dict(), version=step)
                await publisher.acknowledged(2)

        async def serve() -> None:
            async with WeightSubscriber(path) as subscriber:
                async for version in subscriber:
                    copy.load_state_dict(version.state_dict)
                    if version.version == 2:
                        return

        await asyncio.gather(train(), serve())
        assert torch.equal(copy.weight, model.weight)
        assert torch.equal(copy.bias, model.bias)
        assert os.listdir(os.path.dirname(path)) == []

    async def test_tree_comes_as_it_was_staged(self, path: str) -> None:
        base = torch.arange(12.0)
        tree = {
            "tied": [base, base],
            "view": base[2:8].view(2, 3).t(),
            "parameter": nn.Parameter(torch.ones(3)),
            "frozen": nn.Parameter(torch.ones(3), requires_grad=False),
            "half": torch.ones(2, 2, dtype=torch.bfloat16),
            "empty": torch.ones(0, 3),
            "scalar": torch.tensor(7),
            "array": numpy.arange(5),
            "sparse": torch.eye(3).to_sparse(),
            "step": 5,
            "nested": {"names": ("a", "ü"), "none": None},
        }
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            await publisher.publish(tree)
            got = (await subscriber.get()).state_dict
        assert got["tied"][0] is got["tied"][1]
        assert got["view"].stride() == (1, 3)
        assert got["view"].untyped_storage().data_ptr() == got["tied"][0].untyped_storage().data_ptr()
        assert isinstance(got["parameter"], nn.Parameter)
        assert (got["parameter"].requires_grad, got["frozen"].requires_grad) == (True, False)
        assert (got["step"], got["nested"]) == (5, {"names": ("a", "ü"), "none": None})
        for key in ("view", "parameter", "half", "empty", "scalar", "sparse"):
            assert torch.equal(got[key].detach().to_dense(), tree[key].detach().to_dense()), key
            assert got[key].dtype is tree[key].dtype
        assert got["array"].tolist() == list(range(5))
        got["array"][0] = 9  # of this process alone

    async def test_a_tree_without_tensors_comes_too(self, path: str) -> None:
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            await publisher.publish({"temperature": 0.7})
            assert (await subscriber.get()).state_dict == {"temperature": 0.7}
            await until(lambda: publisher.subscribers[0].holds == ())

    async def test_memory_is_mapped_and_not_copied(self, path: str) -> None:
        async with (
            AsyncStager(SHARED) as stager,
            WeightPublisher(path, stager) as publisher,
            WeightSubscriber(path) as subscriber,
        ):
            await publisher.publish(weights(1))
            before = opened(SHARED_MEMORY)
            version = await subscriber.get()
            assert len(opened(SHARED_MEMORY) - before) <= 1
            version.state_dict["layer0"].add_(1)
            del version
            again = publisher._sender._newest.staged["layer0"]
            assert float(again[0]) == 1.0, "a write of a subscriber is its own"

    async def test_the_newest_wins_and_the_others_are_dropped(self, path: str) -> None:
        async with (
            AsyncStager(SHARED) as stager,
            WeightPublisher(path, stager) as publisher,
            WeightSubscriber(path) as subscriber,
        ):
            await publisher.publish(weights(0))
            first = await subscriber.get()
            for number in range(1, 30):
                await publisher.publish(weights(number))
            assert publisher.versions == (0, 29)
            assert stager.statistics().leases == 2
            await until(lambda: subscriber.newest == 29)
            second = await subscriber.get()
            assert (first.version, second.version) == (0, 29)
            assert versions_in(first.state_dict) == {0.0}
            assert versions_in(second.state_dict) == {29.0}
            first.acknowledge()
            await until(lambda: publisher.versions == (29,))

    async def test_a_mixture_would_be_seen(self, path: str) -> None:
        """The negative control of the test above: memory that is read without the lock is written again."""
        async with AsyncStager(SHARED) as stager, WeightPublisher(path, stager) as publisher:
            await publisher.publish(weights(0))
            memory = publisher._sender._newest.described.memory
            unlocked = os.open(f"/proc/self/fd/{memory.descriptor}", os.O_RDONLY)
            mapped = mmap.mmap(unlocked, memory.nbytes, flags=mmap.MAP_PRIVATE)
            os.close(unlocked)
            tensor = torch.frombuffer(mapped, dtype=torch.float32, count=4000)
            del memory
            assert versions_in({"": tensor}) == {0.0}
            for number in range(1, 6):
                await publisher.publish(weights(number))
            assert versions_in({"": tensor}) != {0.0}

    async def test_an_older_version_that_comes_late_does_not_become_the_newest(self, path: str) -> None:
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            early, late = publisher.publish(weights(1), version=1), publisher.publish(weights(2), version=2)
            assert [await late, await early] == [2, 1]
            assert publisher.versions == (2,)
            assert (await subscriber.get()).version == 2

    async def test_of_many_publications_at_once_one_is_staged_at_a_time(self, path: str) -> None:
        leases = []
        async with AsyncStager(SHARED) as stager, WeightPublisher(path, stager) as publisher:

            async def publish(number: int) -> None:
                await publisher.publish(weights(number), version=number)
                leases.append(stager.statistics().leases)

            await asyncio.gather(*(publish(number) for number in range(8)))
            assert publisher.versions == (7,)
            assert max(leases) <= 2
            assert stager.statistics().arenas <= 2

    async def test_the_moment_of_the_copy_is_the_call(self, path: str) -> None:
        with SimulatedAccelerator(seed=0, spontaneous=True) as accelerator:
            live = accelerator.to_device(torch.zeros(100))
            async with (
                AsyncStager(SHARED, backend=accelerator) as stager,
                WeightPublisher(path, stager) as publisher,
                WeightSubscriber(path) as subscriber,
            ):
                async with stager.snapshot({"live": live}) as snapshot:
                    publishing = publisher.publish(snapshot)
                    snapshot.order_before()
                    accelerator.launch(lambda tensor: tensor.add_(1), live)
                    await publishing
                version = await subscriber.get()
                assert float(version.state_dict["live"].sum()) == 0.0

    async def test_what_cannot_be_carried_is_refused_and_the_last_version_stays(self, path: str) -> None:
        async with WeightPublisher(path) as publisher:
            await publisher.publish(weights(1))
            with pytest.raises(UnsupportedLeafError, match="hook"):
                await publisher.publish({"weight": torch.ones(1), "hook": print})
            async with AsyncStager() as private, private.snapshot({"w": torch.ones(17 << 20)}) as snapshot:
                with pytest.raises(StagingError, match="64 MiB of the staged tree are not in shared memory"):
                    await publisher.publish(snapshot)
            assert publisher.versions == (0,)


class TestSubscribers:
    async def test_each_turn_acknowledges_the_last(self, path: str) -> None:
        async with WeightPublisher(path) as publisher:
            async with WeightSubscriber(path) as subscriber:
                await publisher.publish(weights(1), version=1)
                version = await anext(subscriber)
                assert publisher.subscribers[0].acknowledged is None
                waiting = asyncio.create_task(anext(subscriber))
                await publisher.acknowledged(1)
                with pytest.raises(WeightsError, match="version 1 was acknowledged"):
                    _ = version.state_dict
                await until(lambda: publisher.subscribers[0].holds == ())
                await publisher.publish(weights(2), version=2)
                assert (await waiting).version == 2
                assert publisher.subscribers[0].pid == os.getpid()
            await until(lambda: publisher.subscribers == ())

    async def test_leaving_the_block_acknowledges_and_failing_does_not(self, path: str) -> None:
        async with WeightPublisher(path) as publisher:
            await publisher.publish(weights(1), version=1)
            seen: list[Any] = []
            connection = publisher._sender
            waiting = asyncio.create_task(publisher.acknowledged(1))

            async def fail() -> None:
                async with WeightSubscriber(path) as subscriber:
                    await subscriber.get()
                    seen.extend(connection._connections)
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await fail()
            await until(lambda: publisher.subscribers == ())
            assert seen[0].acknowledged is None
            async with WeightSubscriber(path) as subscriber:
                await subscriber.get()
                seen += connection._connections
            await until(lambda: publisher.subscribers == ())
            assert seen[1].acknowledged == 1
            waiting.cancel()

    async def test_acknowledged_waits_for_a_version_that_is_still_staged(self, path: str) -> None:
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            publishing = publisher.publish(weights(1), version=1)
            waiting = asyncio.create_task(publisher.acknowledged(1))
            # It asks for a version, which wakes all that wait for news of subscribers.
            getting = asyncio.create_task(subscriber.get())
            await until(lambda: any(each.wants for each in publisher._sender._connections))
            assert not waiting.done()
            await publishing
            (await getting).acknowledge()
            await waiting

    async def test_acknowledged_waits_for_as_many_as_it_says(self, path: str) -> None:
        async with WeightPublisher(path) as publisher:
            await publisher.publish(weights(1), version=1)
            async with WeightSubscriber(path) as one, WeightSubscriber(path) as two:
                waiting = asyncio.create_task(publisher.acknowledged(1, count=2))
                (await one.get()).acknowledge()
                await publisher.acknowledged(1)
                assert not waiting.done()
                (await two.get()).acknowledge()
                await waiting
            await until(lambda: publisher.subscribers == ())
            waiting = asyncio.create_task(publisher.acknowledged(1))
            await asyncio.sleep(0)
        with pytest.raises(WeightsError, match="closed"):
            await waiting

    async def test_memory_of_a_model_that_took_the_tensors_is_kept(self, path: str) -> None:
        model = nn.Linear(50, 50, bias=False)
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            for number in range(1, 5):
                await publisher.publish({"weight": torch.full((50, 50), float(number))}, version=number)
                version = await subscriber.get()
                model.load_state_dict(version.state_dict, assign=True)
                version.acknowledge()
                await until(lambda number=number: publisher.subscribers[0].holds == (number,))
            for number in range(5, 15):
                await publisher.publish({"weight": torch.full((50, 50), float(number))}, version=number)
            assert publisher.versions == (4, 14)
            assert model.weight.unique().tolist() == [4.0]
            del model
            gc.collect()
            await until(lambda: publisher.versions == (14,))

    async def test_at_most_so_many_versions_are_alive(self, path: str, caplog: pytest.LogCaptureFixture) -> None:
        held: list[WeightVersion] = []
        async with (
            AsyncStager(SHARED) as stager,
            WeightPublisher(path, stager, max_versions=4) as publisher,
            WeightSubscriber(path) as one,
            WeightSubscriber(path) as two,
            WeightSubscriber(path) as three,
        ):
            for number, subscriber in enumerate((one, two)):
                await publisher.publish(weights(number), version=number)
                held.append(await subscriber.get())
            await publisher.publish(weights(2), version=2)
            assert publisher.versions == (0, 1, 2)
            # Two are in use. A third subscriber gets the newer of these, and nothing new is held.
            held.append(await three.get())
            assert [version.version for version in held] == [0, 1, 1]
            # There is nothing newer in use, so this one waits, and the publisher does not.
            waiting = asyncio.create_task(two.get())
            for number in range(3, 10):
                await publisher.publish(weights(number), version=number)
                assert len(publisher.versions) <= 3
                assert stager.statistics().leases <= 3
            await until(lambda: "as many versions as max_versions allows are in use" in caplog.text)
            assert not waiting.done()
            held.pop(0).acknowledge()
            assert (await waiting).version == 9

    async def test_a_cancelled_get_loses_nothing(self, path: str) -> None:
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            waiting = asyncio.create_task(subscriber.get())
            await until(lambda: [each.wants for each in publisher._sender._connections] == [True])
            waiting.cancel()
            await asyncio.wait([waiting])
            await publisher.publish(weights(1), version=1)
            await until(lambda: publisher.subscribers[0].holds == (1,))
            for number in range(2, 9):
                await publisher.publish(weights(number), version=number)
            await until(lambda: subscriber.newest == 8)
            assert (await subscriber.get()).version == 8
            await until(lambda: publisher.versions == (8,))

    async def test_two_tasks_do_not_wait_at_once(self, path: str) -> None:
        async with WeightSubscriber(path) as subscriber:
            waiting = asyncio.create_task(subscriber.get())
            await asyncio.sleep(0)
            with pytest.raises(anyio.BusyResourceError, match="already waiting for weights"):
                await subscriber.get()
            waiting.cancel()

    async def test_closing_ends_a_wait(self, path: str) -> None:
        subscriber = WeightSubscriber(path)
        await subscriber.open()
        waiting = asyncio.create_task(subscriber.get())
        await asyncio.sleep(0)
        await subscriber.aclose()
        with pytest.raises(WeightsError, match="the subscriber was closed"):
            await waiting


class TestReconnection:
    async def test_a_subscriber_waits_for_a_publisher_and_for_the_next(self, path: str) -> None:
        epochs = set()
        async with WeightSubscriber(path) as subscriber:
            kept = []
            # Version numbers may begin again.
            for number in (7, 3):
                waiting = asyncio.create_task(subscriber.get())
                await asyncio.sleep(0.01)
                assert not subscriber.connected
                async with WeightPublisher(path) as publisher:
                    await publisher.publish(weights(number), version=number)
                    version = await waiting
                    assert (version.version, subscriber.newest) == (number, number)
                    epochs.add(version.epoch)
                    kept.append(version)
                await until(lambda: not subscriber.connected)
            assert [versions_in(version.state_dict) for version in kept] == [{7.0}, {3.0}]
        assert len(epochs) == 2

    async def test_the_same_version_does_not_come_twice(self, path: str) -> None:
        async with WeightPublisher(path) as publisher, WeightSubscriber(path) as subscriber:
            await publisher.publish(weights(1), version=1)
            (await subscriber.get()).acknowledge()
            waiting = asyncio.create_task(subscriber.get())
            await asyncio.sleep(0.01)
            for connection in list(publisher._sender._connections):
                connection.peer._socket.shutdown(2)
            await until(lambda: not subscriber.connected)
            await until(lambda: subscriber.connected)
            await until(lambda: [each.wants for each in publisher._sender._connections] == [True])
            assert not waiting.done()
            await publisher.publish(weights(2), version=2)
            assert (await waiting).version == 2


class TestCancellation:
    async def test_publishing(self, path: str) -> None:
        async with AsyncStager(SHARED) as stager, WeightPublisher(path, stager) as publisher:
            await publisher.publish(weights(0))
            await publisher.publish(weights(1))
            probe = LeakProbe(stager, ignore_threads=("aiostage",))
            async for _ in at_every_await(lambda: publisher.publish(weights(9))):
                assert len(publisher.versions) == 1
            await probe.settled(seconds(10))

    async def test_receiving_opening_and_closing(self, path: str) -> None:
        async with AsyncStager(SHARED) as stager, WeightPublisher(path, stager) as publisher:
            await publisher.publish(weights(1))
            probe = LeakProbe(stager, ignore_threads=("aiostage",))

            async def receive() -> None:
                async with WeightSubscriber(path) as subscriber:
                    await subscriber.get()

            async for _ in at_every_await(receive):
                await until(lambda: publisher.subscribers == ())
            await probe.settled(seconds(10))
            assert publisher.versions == (0,)

    async def test_beginning_and_ending_to_publish(self, path: str) -> None:
        async with AsyncStager(SHARED) as stager:
            await stager.stage(weights(1))
            probe = LeakProbe(stager, ignore_threads=("aiostage",))

            async def serve() -> None:
                async with WeightPublisher(path, stager):
                    pass

            async for _ in at_every_await(serve):
                assert os.listdir(os.path.dirname(path)) == []
            await probe.settled(seconds(10))


class TestArguments:
    async def test_what_is_wrong_is_said(self, path: str) -> None:
        with pytest.raises(ValueError, match=r"max_versions must be an integer of at least 4 \(.*\), not 3$"):
            WeightPublisher(path, max_versions=3)
        with pytest.raises(TypeError, match="stager must be an AsyncStager, or None, not 'x'"):
            WeightPublisher(path, "x")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="StagingOptions\\(use_shared_memory=True\\)"):
            WeightPublisher(path, AsyncStager())
        with pytest.raises(ValueError, match=r"timeout must be from 0\.01 to 1e\+06 seconds, not 0"):
            WeightPublisher(path, timeout=0)
        WeightSubscriber(path, timeout=cast("float", numpy.float32(60)))
        # The upper bound is no number of this class. The tests make each warning an error.
        WeightSubscriber(path, timeout=cast("float", numpy.float16(60)))
        with pytest.raises(ValueError, match=r"1e\+06 seconds, not 0\.0$"):
            WeightSubscriber(path, timeout=cast("float", numpy.float32(0)))
        with pytest.raises(ValueError, match=r"1e\+06 seconds, not a number of 1329 bits$"):
            WeightSubscriber(path, timeout=10**400)
        with pytest.raises(TypeError, match="timeout must be a number of seconds, not '60'"):
            WeightSubscriber(path, timeout="60")  # type: ignore[arg-type]
        for classes in (3, None, "Config", int, [3]):
            with pytest.raises(TypeError, match="classes must be "):
                WeightSubscriber(path, classes=classes)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="interval must be a number of seconds above 0, not 0"):
            WeightSubscriber(path, interval=0)
        with pytest.raises(ValueError, match="not a path of a socket"):
            WeightSubscriber("")
        with pytest.raises(TypeError, match="not below 7"):
            WeightSubscriber(7)

    async def test_versions_go_up(self, path: str) -> None:
        async with WeightPublisher(path) as publisher:
            assert [await publisher.publish(weights(0)) for _ in range(2)] == [0, 1]
            assert await publisher.publish(weights(0), version=10) == 10
            for wrong in (10, 3):
                with pytest.raises(ValueError, match=f"versions must increase: {wrong} comes after 10"):
                    publisher.publish(weights(0), version=wrong)
            with pytest.raises(ValueError, match="of at least 0, not -1"):
                publisher.publish(weights(0), version=-1)
            with pytest.raises(ValueError, match="version 11 was not published; the last is 10"):
                await publisher.acknowledged(11)
            with pytest.raises(ValueError, match="count must be an integer of at least 1, not 0"):
                await publisher.acknowledged(10, count=0)

    async def test_outside_of_the_block(self, path: str) -> None:
        publisher, subscriber = WeightPublisher(path), WeightSubscriber(path)
        with pytest.raises(WeightsError, match="the publisher is not open"):
            publisher.publish(weights(0))
        with pytest.raises(WeightsError, match="the subscriber is not open"):
            await subscriber.get()
        async with publisher, subscriber:
            assert repr(publisher) == f"<WeightPublisher '{path}', version None>"
            assert repr(subscriber).startswith(f"<WeightSubscriber '{path}', ")
            with pytest.raises(WeightsError, match="opened before"):
                await publisher.open()
            with pytest.raises(WeightsError, match="opened before"):
                await subscriber.open()
        with pytest.raises(WeightsError, match="the publisher is closed"):
            publisher.publish(weights(0))
        await publisher.aclose()
        await subscriber.aclose()


async def test_a_publisher_without_descriptors_for_its_socket_leaves_none_open(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    probe = LeakProbe(ignore_threads=("aiostage-weights",))
    with monkeypatch.context() as patch:
        patch.setattr("aiostage.weights.sockets._new_socket", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                await WeightPublisher(path).open()
    await probe.settled()
    async with WeightPublisher(path):
        pass
