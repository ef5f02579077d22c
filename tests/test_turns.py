"""Long work in a worker thread gives the GIL away often, and ends when it is cancelled."""

from __future__ import annotations

import asyncio
import base64
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage._loop import workers
from aiostage._loop.workers import Stopped, Workers, releasing_gil, stoppable
from aiostage.checkpoint import writer as writer_module
from aiostage.checkpoint.reader import CheckpointReader, Outline
from aiostage.checkpoint.writer import CheckpointWriter
from aiostage.format.decode import Memory, TreeDecoder
from aiostage.format.encode import TreeEncoder
from aiostage.format.layout import FileTensor, file_tensors, index_content, measure, tensor_files
from aiostage.format.manifest import read_manifest, write_manifest
from aiostage.format.nodes import NodeTable
from aiostage.format.parts import cut
from aiostage.format.safetensors import TensorRecord, read_header, write_header
from aiostage.format.values import read_bytes

COUNT = 20_000
RECORDS = [TensorRecord(f"t{i}", "U8", (1,), i, i + 1) for i in range(COUNT)]
HEADER = bytes(write_header(RECORDS))
BYTE = torch.zeros(1, dtype=torch.uint8)
TENSORS = [FileTensor(f"t{i}", "U8", (1,), 1, 1, BYTE, None) for i in range(COUNT)]
WORDS = [f"word {i}" for i in range(COUNT)]
PLAIN = {f"key {i}": (i,) for i in range(COUNT)}


def encoded(tree: Any) -> TreeEncoder:
    encoder = TreeEncoder()
    encoder.walk(tree)
    return encoder


def manifest() -> bytes:
    text = write_manifest(nbytes=0, leaves=0, part_bytes=1 << 20, files=[], nodes=list(encoded(PLAIN).lines()))
    return bytes(text)


MANIFEST = manifest()


def table() -> NodeTable:
    found = NodeTable()
    read_manifest(MANIFEST, path="", add_node=found.add)
    found.complete()
    found.tensor_names()
    return found


TABLE = table()
MANY = encoded([torch.ones(1) for _ in range(COUNT)])
LEAVES = measure(MANY.tensors)[0]

WORK: dict[str, Callable[[], object]] = {
    "write_header": lambda: write_header(RECORDS),
    "read_header": lambda: read_header(HEADER[8:], COUNT, path=""),
    "tensor_files": lambda: tensor_files(TENSORS, 1000),
    "index_content": lambda: index_content(tensor_files(TENSORS, 10)),
    "cut": lambda: cut([torch.ones(1) for _ in range(COUNT)], 64),
    "read_bytes": lambda: read_bytes("bytes", base64.b64encode(bytes(64 << 20)).decode()),
    "walk": lambda: encoded(PLAIN),
    "walk of one list": lambda: encoded(WORDS),
    "measure": lambda: measure(MANY.tensors),
    "file_tensors": lambda: file_tensors(LEAVES, []),
    "write_manifest": manifest,
    "read_manifest": table,
    "decode": lambda: TreeDecoder(TABLE, Memory({}, {}), path="").build(),
}


@pytest.mark.parametrize("name", WORK)
def test_work_on_many_objects_gives_the_gil_away_often(name: str) -> None:
    # Each asks once in 0.3 ms at the most, and the fastest of these takes some 10 ms.
    asked = count()

    def is_cancelled() -> bool:
        next(asked)
        return False

    with stoppable(is_cancelled):
        WORK[name]()
    assert next(asked) >= 5


@pytest.mark.parametrize("name", WORK)
def test_work_on_many_objects_ends_when_it_is_cancelled(name: str) -> None:
    asked = count()
    with stoppable(lambda: next(asked) == 3), pytest.raises(Stopped):
        WORK[name]()


def test_other_threads_run_meanwhile() -> None:
    there = threading.Event()
    threading.Thread(target=there.set).start()
    for _ in releasing_gil(iter(there.is_set, True)):
        pass
    assert there.is_set()


def test_what_is_outside_of_a_block_is_not_stopped() -> None:
    with stoppable(lambda: True), pytest.raises(Stopped):
        deque(releasing_gil(count()), maxlen=0)
    for _ in releasing_gil(range(100_000)):
        pass


@pytest.mark.asyncio
async def test_a_call_in_a_worker_ends_when_its_task_is_cancelled() -> None:
    workers = Workers(1, "test")
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def forever() -> None:
        loop.call_soon_threadsafe(begun.set)
        for _ in releasing_gil(count()):
            pass

    task = asyncio.create_task(workers.run(forever))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await workers.run(lambda: 3) == 3
    workers.stop()


def die_in(threads: list[str], objects: Iterable[object]) -> None:
    """Note in which thread objects end."""
    for each in objects:
        weakref.finalize(each, lambda: threads.append(threading.current_thread().name))


@pytest.mark.asyncio
@pytest.mark.parametrize("steps", [True, False], ids=["in steps", "the control"])
@pytest.mark.parametrize("way", ["save", "Checkpointer", "load", "load into"])
async def test_what_a_save_or_a_load_needed_ends_in_a_thread(
    way: str, steps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the event loop the end of 50,000 tensors and their nodes takes tens of milliseconds in one step."""
    tree = {f"a.{number}": torch.full((4,), float(number)) for number in range(300)}
    threads: list[str] = []
    plan, decode = CheckpointWriter.plan, CheckpointReader.decode

    async def planning(writer: CheckpointWriter, staged: Any, *others: Any) -> None:
        die_in(threads, staged.values())
        await plan(writer, staged, *others)

    async def decoding(reader: CheckpointReader, outline: Outline, data: Any, *others: Any) -> Any:
        die_in(threads, data.values())
        return await decode(reader, outline, data, *others)

    if not steps:
        monkeypatch.setattr(sys.modules["aiostage.checkpoint.loading"], "empty_in_steps", lambda containers: None)
        monkeypatch.setattr(writer_module, "empty_in_steps", lambda containers: None)
    if way == "save":
        monkeypatch.setattr(CheckpointWriter, "plan", planning)
        await aiostage.save(tree, tmp_path / "a")
    elif way == "Checkpointer":
        monkeypatch.setattr(CheckpointWriter, "plan", planning)
        async with aiostage.Checkpointer(tmp_path) as checkpoints:
            await (await checkpoints.save(1, tree)).committed()
    else:
        await aiostage.save(tree, tmp_path / "a")
        monkeypatch.setattr(CheckpointReader, "decode", decoding)
        loaded = await aiostage.load(tmp_path / "a", into=tree if way == "load into" else None)
        assert loaded["a.299"].tolist() == [299.0] * 4
    assert len(threads) == 300
    assert ("MainThread" not in threads) is steps


def test_containers_are_emptied_from_the_last_on_and_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    releases: list[tuple[int, ...]] = []
    containers: list[list[Any] | dict[Any, Any]] = [dict.fromkeys(range(40)), [], list(range(33))]
    first, _, last = containers
    monkeypatch.setattr(workers, "release_gil", lambda: releases.append((len(first), len(last))))
    workers.empty_in_steps(containers)
    assert releases == [(40, 17), (40, 1), (40, 0), (24, 0), (8, 0), (0, 0)]
    assert not containers
