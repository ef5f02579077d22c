"""Staged tensors in shared memory through multiprocessing, and through picklers that write for files."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from aiostage import AsyncStager, StagingOptions
from tests.forking import run_forking
from tests.patience import seconds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc")

SHARED = StagingOptions(use_shared_memory=True)


def answer(incoming: Any, outgoing: Any) -> None:
    while (tree := incoming.get()) is not None:
        tied = tree["a"].untyped_storage().data_ptr() == tree["row"].untyped_storage().data_ptr()
        kinds = type(tree["p"]).__name__, tree["p"].requires_grad, tree["sparse"].layout
        outgoing.put((float(tree["a"].sum()), tied, kinds, len(os.listdir("/proc/self/fd"))))
        # What is written here stays here.
        tree["a"].zero_()
        del tree


def tree(value: float) -> dict[str, Any]:
    a = torch.full((100, 100), value)
    many = {f"w{number}": torch.ones(10) for number in range(500)}
    return {"a": a, "row": a[1], "p": torch.nn.Parameter(torch.ones(2)), "sparse": torch.eye(3).to_sparse(), **many}


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_to_a_spawned_process_and_back() -> None:
    context = multiprocessing.get_context("spawn")
    out, back = context.Queue(), context.Queue()
    process = context.Process(target=answer, args=(out, back))
    process.start()
    try:
        async with AsyncStager(SHARED) as stager:
            descriptors = []
            for value in range(4):
                staged = await stager.stage(tree(value))
                out.put(staged)
                total, tied, kinds, count = back.get(timeout=seconds(40))
                descriptors.append(count)
                assert total == 10_000 * value
                assert tied
                assert kinds == ("Parameter", True, torch.sparse_coo)
                assert staged["a"].unique().tolist() == [value]
            # 500 tensors took one descriptor, and no staging left one behind.
            assert max(descriptors) - min(descriptors) <= 2
    finally:
        out.put(None)
        process.join(seconds(20))
    assert process.exitcode == 0


@pytest.mark.asyncio
async def test_what_was_sent_stays_when_the_sender_drops_it() -> None:
    async with AsyncStager(SHARED) as stager:
        staged = await stager.stage({"a": torch.ones(1000)})
        message = bytes(ForkingPickler.dumps(staged))
        del staged
        gc.collect()
        for _ in range(3):
            # Other memory is taken: what was sent is locked.
            await stager.stage({"a": torch.zeros(1000)})
        received = await asyncio.to_thread(pickle.loads, message)
        assert received["a"].sum() == 1000
        await stager.stage({"a": torch.zeros(1000)})
        assert received["a"].sum() == 1000
        assert stager.statistics().arenas == 2
        del received
        gc.collect()
        await stager.stage({"a": torch.zeros(1000)})


def total(staged: dict[str, torch.Tensor], queue: Any) -> None:
    queue.put(float(staged["a"].sum()))


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_as_an_argument_of_a_process() -> None:
    context = multiprocessing.get_context("spawn")
    async with AsyncStager(SHARED) as stager:
        queue = context.SimpleQueue()
        process = context.Process(target=total, args=(await stager.stage({"a": torch.ones(1000)}), queue))
        process.start()
        assert queue.get() == 1000
        process.join(seconds(20))
        assert process.exitcode == 0


@pytest.mark.asyncio
async def test_after_the_stager_was_closed_the_bytes_are_sent() -> None:
    async with AsyncStager(SHARED) as stager:
        staged = await stager.stage({"a": torch.ones(1000)})
    message = bytes(ForkingPickler.dumps(staged))
    received = await asyncio.to_thread(pickle.loads, message)
    assert received["a"].sum() == 1000


@pytest.mark.asyncio
async def test_what_writes_for_a_file_gets_the_bytes() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    async with AsyncStager(SHARED) as stager:
        staged = await stager.stage({"a": torch.arange(1000.0)})
        stream = io.BytesIO()
        torch.save(staged, stream)
        pickles = [pickle.dumps(staged), pickle.dumps(staged, 2), cloudpickle.dumps(staged)]
        del staged
    gc.collect()
    stream.seek(0)
    for read in (torch.load(stream), *map(pickle.loads, pickles)):
        assert torch.equal(read["a"], torch.arange(1000.0))


@pytest.mark.asyncio
async def test_other_tensors_go_as_they_did() -> None:
    async with AsyncStager(SHARED) as stager:
        staged = await stager.stage({"a": torch.ones(3)})
        other = torch.arange(5.0)
        message = bytes(ForkingPickler.dumps({"staged": staged, "other": other}))
        received = await asyncio.to_thread(pickle.loads, message)
        other[0] = 7
        # PyTorch's way: the same memory on both sides.
        assert received["other"].tolist() == [7, 1, 2, 3, 4]
        assert received["staged"]["a"].tolist() == [1, 1, 1]


FORKING = """
import asyncio, gc, pickle
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
import torch
from aiostage import AsyncStager, StagingOptions

async def main():
    async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
        staged = await stager.stage({"a": torch.ones(1000)})
        # Sent and received, so that only the stager still has the descriptor: the thread that sends closes its own
        # after what it has sent may have been received.
        pickle.loads(bytes(ForkingPickler.dumps(staged)))
        resource_sharer.stop(60)
        gc.collect()
        read, write = os.pipe()
        ready, running = os.pipe()
        child = os.fork()
        if not child:
            os.close(write)
            os.write(running, b".")
            os.read(read, 1)
            os._exit(0)
        # A child closes what it has inherited before its fork() returns, which may be after the one here.
        os.read(ready, 1)
        arenas = stager.statistics().arenas
        del staged
        gc.collect()
        await stager.stage({"a": torch.zeros(1000)})
        assert stager.statistics().arenas == arenas, stager.statistics()
        os.close(write)
        os.waitpid(child, 0)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_forked_child_keeps_no_lock() -> None:
    run_forking(FORKING)


FORKED_SENDER = """
import asyncio, multiprocessing, os, pickle
from multiprocessing.reduction import ForkingPickler
import torch
from aiostage import AsyncStager, StagingOptions

def send(staged):
    # Another file, of zeros, has the numbers that are free in the child.
    other = os.memfd_create("other")
    os.ftruncate(other, 1 << 20)
    for _ in range(10):
        os.dup(other)
    received = pickle.loads(bytes(ForkingPickler.dumps(staged)))
    assert received["a"].tolist() == [1.0] * 1000

async def main():
    async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
        staged = await stager.stage({"a": torch.ones(1000)})
        pickle.loads(bytes(ForkingPickler.dumps(staged)))
        child = multiprocessing.get_context("fork").Process(target=send, args=(staged,))
        child.start()
        child.join()
        assert child.exitcode == 0

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_forked_child_sends_what_its_parent_has_sent() -> None:
    run_forking(FORKED_SENDER)
