"""Long work in a worker thread gives the GIL away often, and ends when it is cancelled."""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage._loop import workers
from aiostage._loop.workers import ShorterSwitchInterval, Stopped, Workers, releasing_gil, stoppable
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


@pytest.fixture
def users_interval() -> Iterator[float]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.004)
    yield sys.getswitchinterval()
    sys.setswitchinterval(before)


def test_pauses_are_made_unless_the_switch_interval_is_short(
    users_interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(workers, "let_threads_run", lambda: pauses.append(sys.getswitchinterval()))
    asked = iter(range(3))
    with pytest.raises(Stopped), stoppable(lambda: next(asked, None) is None):
        deque(releasing_gil(count()), maxlen=0)
    assert pauses == [users_interval] * 3
    asked = iter(range(3))
    with ShorterSwitchInterval(), pytest.raises(Stopped), stoppable(lambda: next(asked, None) is None):
        deque(releasing_gil(count()), maxlen=0)
    assert len(pauses) == 3


def test_the_last_block_restores_the_switch_interval(users_interval: float) -> None:
    block = ShorterSwitchInterval()
    with block:
        with block:
            assert sys.getswitchinterval() == pytest.approx(0.0002, abs=2e-6)
        assert sys.getswitchinterval() == pytest.approx(0.0002, abs=2e-6)
    assert sys.getswitchinterval() == users_interval


@pytest.mark.parametrize("interval", [0.001, 0.05])
def test_a_switch_interval_that_is_set_meanwhile_stays(users_interval: float, interval: float) -> None:
    with ShorterSwitchInterval():
        sys.setswitchinterval(interval)
        interval = sys.getswitchinterval()
    assert sys.getswitchinterval() == interval


@pytest.mark.parametrize("microseconds", [201, 333, 999, 1001, 5000, 123457])
def test_the_switch_interval_does_not_shrink_by_rounding(users_interval: float, microseconds: int) -> None:
    sys.setswitchinterval(microseconds / 1e6 + 5e-7)
    before = sys.getswitchinterval()
    for _ in range(5):
        with ShorterSwitchInterval():
            pass
        assert sys.getswitchinterval() == before == pytest.approx(microseconds / 1e6)


def test_a_shorter_switch_interval_is_left_alone(users_interval: float) -> None:
    sys.setswitchinterval(0.00005)
    shorter = sys.getswitchinterval()
    with ShorterSwitchInterval():
        assert sys.getswitchinterval() == shorter
    assert sys.getswitchinterval() == shorter


def test_a_forked_child_has_the_switch_interval_of_the_user(users_interval: float) -> None:
    block = ShorterSwitchInterval()
    with block:
        child = os.fork()
        if child == 0:
            # Its parent's threads do not leave the block in it.
            right = sys.getswitchinterval() == users_interval
            with block:
                right = right and sys.getswitchinterval() < 0.001
            os._exit(0 if right and sys.getswitchinterval() == users_interval else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert sys.getswitchinterval() < 0.001
    assert sys.getswitchinterval() == users_interval


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["returns", "raises", "is cancelled"])
async def test_a_call_of_a_load_has_a_short_switch_interval(users_interval: float, end: str) -> None:
    pool = Workers(1, "test", switches_soon=True)
    seen: list[float] = []

    def call() -> None:
        seen.append(sys.getswitchinterval())
        if end == "raises":
            raise ZeroDivisionError
        for _ in releasing_gil(count() if end == "is cancelled" else ()):
            pass

    task = asyncio.create_task(pool.run(call))
    while not seen:
        await asyncio.sleep(0)
    if end == "is cancelled":
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert seen[0] < 0.001
    assert sys.getswitchinterval() == users_interval
    pool.stop()


@pytest.mark.asyncio
async def test_a_load_has_a_short_switch_interval_and_a_save_has_not(
    users_interval: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[float]] = {"save": [], "load": []}
    layout, build = TreeEncoder.walk, TreeDecoder.build

    def walk(encoder: TreeEncoder, tree: Any) -> None:
        seen["save"].append(sys.getswitchinterval())
        layout(encoder, tree)

    def decode(decoder: TreeDecoder) -> Any:
        seen["load"].append(sys.getswitchinterval())
        return build(decoder)

    monkeypatch.setattr(TreeEncoder, "walk", walk)
    monkeypatch.setattr(TreeDecoder, "build", decode)
    await aiostage.save({"a": torch.ones(2)}, tmp_path / "a")
    assert (await aiostage.load(tmp_path / "a"))["a"].tolist() == [1, 1]
    assert set(seen["save"]) == {users_interval}
    assert seen["load"]
    assert max(seen["load"]) < 0.001
    assert sys.getswitchinterval() == users_interval


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
