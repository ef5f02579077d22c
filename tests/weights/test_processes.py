"""Publisher and subscribers in processes of their own, which are stopped and killed."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.forkserver
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from aiostage import AsyncStager, StagingOptions
from aiostage.testing import LeakProbe
from aiostage.weights import WeightPublisher, WeightSubscriber
from tests.patience import seconds
from tests.servers.weed import S3Server
from tests.weights import peers
from tests.weights.trees import until, versions_in, weights

pytestmark = [pytest.mark.asyncio, pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc")]

# One process imports torch, and forks into all that are needed.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.weights.peers"])


@contextmanager
def running(target: Any, *arguments: Any) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """Run a function in a process, which is killed at the end."""
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(arguments[0], theirs, *arguments[1:]), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


async def said(pipe: Connection) -> Any:
    """Return what a process says."""
    assert await asyncio.to_thread(pipe.poll, seconds(30)), "the process says nothing"
    return pipe.recv()


async def test_subscribers_that_are_stopped_and_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.sock")
    stager = AsyncStager(StagingOptions(use_shared_memory=True))
    # What a stopped subscriber is given for a heartbeat; a busy machine must not take the others for dead.
    async with stager, WeightPublisher(path, stager, timeout=seconds(0.5)) as publisher:
        with running(peers.subscribe, path) as (one, pipe_one), running(peers.subscribe, path) as (two, pipe_two):
            await publisher.publish(weights(0))
            for pipe in (pipe_one, pipe_two):
                pipe.send("hold")
                assert await said(pipe) == (0, {0.0})
            await publisher.publish(weights(1))
            pipe_two.send("take")
            assert await said(pipe_two) == (1, {1.0})
            await publisher.acknowledged(1)
            assert publisher.versions == (0, 1)
            assert {each.pid for each in publisher.subscribers} == {one.pid, two.pid}

            # A killed one is gone at once, and what it held with it.
            os.kill(one.pid, signal.SIGKILL)
            await until(lambda: one.pid not in {each.pid for each in publisher.subscribers})

            # A stopped one says nothing, is taken for dead, and its memory is still not written to.
            os.kill(two.pid, signal.SIGSTOP)
            await until(lambda: publisher.subscribers == ())
            assert publisher.versions == (1,)
            for number in range(2, 12):
                await publisher.publish(weights(number))
                assert len(publisher.versions) == 1
            os.kill(two.pid, signal.SIGCONT)
            pipe_two.send("take")
            number, found = await said(pipe_two)
            assert (number, found) == (11, {11.0})
        await until(lambda: publisher.subscribers == ())
        assert publisher.versions == (11,)
        assert stager.statistics().leases == 1


async def test_a_server_that_swaps_weights_between_requests(tmp_path: Path) -> None:
    """The trainer publishes about as fast as it can, is killed, and comes back with numbers that start again."""
    path = str(tmp_path / "weights.sock")
    multiprocessing.forkserver.ensure_running()
    model, lock, swaps = peers.module(), asyncio.Lock(), list[tuple[str, int]]()
    probe = LeakProbe(ignore_threads=("aiostage", "asyncio", "uvloop"))

    async def swap(subscriber: WeightSubscriber) -> None:
        async for version in subscriber:
            async with lock:
                assert versions_in(version.state_dict) == {float(version.version)}
                model.load_state_dict(version.state_dict, assign=len(swaps) % 2 == 0)
            swaps.append((version.epoch, version.version))

    async def request() -> float:
        async with lock:
            (version,) = versions_in(dict(model.named_buffers()))
            await asyncio.sleep(0)
            assert versions_in(dict(model.named_buffers())) == {version}
        return version

    async with WeightSubscriber(path) as subscriber:
        swapping = asyncio.create_task(swap(subscriber))
        for first in (100, 7):
            with running(peers.publish, path, first) as (process, pipe):
                assert await said(pipe) == "publishing"
                before = len(swaps)
                while len(swaps) < before + 15:
                    await request()
                    await asyncio.sleep(0.0005)
                    assert not swapping.done(), swapping.result()
                os.kill(process.pid, signal.SIGKILL)
                await until(lambda: not subscriber.connected)
            # It goes on to answer with what it has.
            assert await request() == swaps[-1][1]
        epochs = {epoch for epoch, _ in swaps}
        assert len(epochs) == 2
        for epoch in epochs:
            numbers = [number for each, number in swaps if each == epoch]
            assert numbers == sorted(set(numbers))
        swapping.cancel()
        await asyncio.wait([swapping])
    model.load_state_dict({name: tensor.clone() for name, tensor in model.named_buffers()}, assign=True)
    await probe.settled(seconds(10))
    # Files of the killed processes disturb no other process.
    async with WeightPublisher(path):
        pass
    assert os.listdir(tmp_path) == []


async def test_over_an_object_store_either_side_is_killed(s3_server: S3Server) -> None:
    where = {**s3_server.options(), "prefix": secrets.token_hex(4)}
    storage, swaps = peers.storage_of(where), list[tuple[str, int]]()

    async def follow() -> None:
        async with WeightSubscriber(storage, interval=0.01) as subscriber:
            async for version in subscriber:
                assert versions_in(version.state_dict) == {float(version.version)}
                swaps.append((version.epoch, version.version))

    following = asyncio.create_task(follow())
    for first in (100, 7):
        with running(peers.publish, where, first) as (publisher, pipe):
            assert await said(pipe) == "publishing"
            with running(peers.subscribe, where) as (subscriber, words):
                words.send("take")
                number, found = await said(words)
                assert found == {float(number)}
                words.send("take")
                # Both at a random point of their work.
                os.kill(subscriber.pid, signal.SIGKILL)
            before = len(swaps)
            await until(lambda before=before: len(swaps) > before + 3 or following.done())
            os.kill(publisher.pid, signal.SIGKILL)
        # One that begins when there is no publisher finds the newest version that is complete.
        with running(peers.subscribe, where) as (_, words):
            words.send("take")
            number, found = await said(words)
            assert found == {float(number)}
    following.cancel()
    await asyncio.wait([following])
    assert following.cancelled()
    epochs = dict.fromkeys(epoch for epoch, _ in swaps)
    assert len(epochs) == 2
    for epoch in epochs:
        numbers = [number for each, number in swaps if each == epoch]
        assert numbers == sorted(set(numbers))
    async with WeightPublisher(storage, max_versions=4) as publisher:
        await publisher.publish(weights(1), version=1)
        # Those of the killed ones count.
        assert len([name for name in await storage.list() if name.startswith("weights-")]) == 4
