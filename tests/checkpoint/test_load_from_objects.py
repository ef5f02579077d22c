from __future__ import annotations

import asyncio
import secrets
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import torch
from obstore.store import MemoryStore, S3Store

import aiostage
from aiostage import CheckpointCorruptError, CheckpointNotFoundError
from aiostage.abc import Storage
from aiostage.checkpoint.part_reader import _tensor_over
from aiostage.checkpoint.verify import verify
from aiostage.storage import LocalStorage, ObjectStorage, storage_at
from aiostage.storage.bucket import RangeReader
from aiostage.storage.files import PartBuffers, aligned_memory
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.counting import CountingStorage
from tests.servers.proxy import running_proxy
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import save, some_bytes


def tree(value: float) -> dict[str, Any]:
    return {
        "step": int(value),
        "large": torch.full((3_000_001,), value),
        "turned": torch.full((30, 50), value).t(),
        "layers": [torch.full((7,), value) for _ in range(20)],
    }


@pytest.mark.asyncio
async def test_every_way_of_loading() -> None:
    storage = CountingStorage(storage_at(MemoryStore()))
    await aiostage.save(tree(2), (storage, "checkpoint"), max_shard_bytes=4_000_000)
    source = (storage, "checkpoint")
    assert_same(tree(2), await aiostage.load(source))
    for in_place in (False, True):
        live = tree(1)
        await aiostage.load(source, into=live, in_place=in_place)
        assert_same(tree(2), live)
    assert_same({"layers": tree(2)["layers"]}, await aiostage.load(source, only="layers"))
    assert (await verify(source)).manifest.leaves == 22


@pytest.mark.asyncio
async def test_an_object_that_was_changed() -> None:
    store = MemoryStore()
    storage = storage_at(store)
    await aiostage.save(tree(2), (storage, "checkpoint"))
    (path,) = [entry["path"] for batch in store.list() for entry in batch if entry["path"].endswith(".safetensors")]
    data = bytearray(bytes(store.get(path).bytes()))
    data[-1] ^= 1
    store.put(path, bytes(data))
    live = tree(1)
    with pytest.raises(CheckpointCorruptError, match="do not match their checksum") as caught:
        await aiostage.load((storage, "checkpoint"), into=live)
    assert (caught.value.path or "").endswith("model.safetensors")
    assert_same(tree(1), live)


@pytest.mark.asyncio
async def test_as_many_requests_at_once_as_hide_their_latency(s3_server: S3Server) -> None:
    saved = {str(n): torch.full((10,), float(n)) for n in range(40)}
    prefix = f"run-{secrets.token_hex(4)}"
    await aiostage.save(
        saved, (ObjectStorage(S3Store(BUCKET, **s3_server.options()), prefix), "checkpoint"), max_shard_bytes=40
    )
    with running_proxy(s3_server.port) as proxy:
        proxy.delay = 0.05
        storage = ObjectStorage(S3Store(BUCKET, **s3_server.options(port=proxy.port)), prefix)
        # One at a time until it is known what there is, then first of all the headers.
        assert_same(saved, await aiostage.load((storage, "checkpoint")))
        assert 12 <= proxy.most_at_once["GET"] <= 16
        assert proxy.most_at_once["HEAD"] <= 16


class Slow(CountingStorage):
    """Whose reads, but that of the header, wait until so many are under way."""

    def __init__(self, storage: Storage, reads_at_once: int, expected: int) -> None:
        super().__init__(storage)
        self.reads_at_once = reads_at_once
        self.before = self.wait
        self.expected = expected
        self.reached = asyncio.Event()
        self.under_way = self.most = 0

    async def wait(self, name: str, offset: int) -> None:
        if offset:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            if self.under_way == self.expected:
                self.reached.set()
            await self.reached.wait()
            # One more would begin before this one goes on.
            await asyncio.sleep(0.01)
            self.under_way -= 1


@pytest.mark.asyncio
@pytest.mark.parametrize(("wanted", "most"), [(1, 2), (7, 7), (100, 16)])
async def test_how_many_reads_there_are_is_for_the_storage_to_say(wanted: int, most: int, tmp_path: Path) -> None:
    info = await aiostage.save({"a": torch.zeros(18 << 20, dtype=torch.int64)}, tmp_path / "checkpoint")
    storage = Slow(LocalStorage(tmp_path), wanted, most)
    await verify((storage, info.path.name))
    # However many it likes, no more than 128 MiB are on their way.
    assert storage.most == most


PART = 8 << 20


class Ranges:
    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.answers: list[weakref.ref[Any]] = []
        self.most = 0

    @property
    def alive(self) -> int:
        return sum(answer() is not None for answer in self.answers)


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """What is asked of object stores, and which answers are in memory."""
    found = Ranges()
    real = obstore.get_range_async

    async def get_range_async(store: Any, path: str, *, start: int, length: int) -> memoryview:
        found.asked.append((start, length))
        # Not obstore's own memory, of which nothing tells when it is freed.
        data = np.array(np.frombuffer(memoryview(await real(store, path, start=start, length=length)), np.uint8))
        found.answers.append(weakref.ref(data))
        found.most = max(found.most, found.alive)
        return data.data

    def ask(*arguments: Any, **options: Any) -> asyncio.Future[memoryview]:
        return asyncio.ensure_future(get_range_async(*arguments, **options))

    monkeypatch.setattr(obstore, "get_range_async", ask)
    return found


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize("verify", [True, False])
async def test_each_part_is_one_request_and_is_copied_once(
    ranges: Ranges, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two pieces each, because the header comes first in the file.
    saved = {str(number): torch.full((PART // 4,), float(number)) for number in range(40)}
    storage = storage_at(MemoryStore())
    await aiostage.save(saved, (storage, "checkpoint"))
    copied, threads, real = 0, set(), np.copyto

    def copyto(target: Any, source: Any) -> None:
        nonlocal copied
        copied += target.nbytes
        threads.add(threading.current_thread())
        real(target, source)

    def no_buffer(*_: object) -> None:
        raise AssertionError("a part has gone through a buffer")

    monkeypatch.setattr(np, "copyto", copyto)
    monkeypatch.setattr(PartBuffers, "take", no_buffer)
    assert_same(saved, await aiostage.load((storage, "checkpoint"), verify=verify))
    parts = [(start, length) for start, length in ranges.asked if length == PART]
    assert sorted(parts) == [(number * PART, PART) for number in range(40)]
    # And the rest of the file, which is as long as the header. Without digests the header is read before.
    assert len(ranges.asked) == (41 if verify else 42)
    # The part with the header was kept, and is copied by PyTorch.
    assert copied == (39 * PART + 4096 if verify else 40 * PART + 4096)
    assert threading.main_thread() not in threads
    # Sixteen requests at once: an answer is freed before its task asks for the next.
    assert ranges.most <= 17
    assert not ranges.alive


@pytest.mark.asyncio
@pytest.mark.parametrize("verify", [True, False])
async def test_parts_of_every_kind(ranges: Ranges, verify: bool) -> None:
    small = [torch.full((n % 7 + 1,), n, dtype=torch.int16) for n in range(150)]
    saved: dict[str, Any] = {
        "small": small,
        "turned": torch.arange(6_000_000, dtype=torch.float64).view(2000, 3000).t(),
        "odd": torch.arange(PART + 13, dtype=torch.int32).to(torch.uint8),
        "empty": torch.empty(0),
        "last": torch.arange(3_000_000),
    }
    storage = storage_at(MemoryStore())
    await aiostage.save(saved, (storage, "checkpoint"))
    source = (storage, "checkpoint")
    assert_same(saved, await aiostage.load(source, verify=verify))
    assert_same({"odd": saved["odd"]}, await aiostage.load(source, only="odd", verify=verify))
    for in_place in (True, False):
        live = {
            "small": [torch.zeros_like(each) for each in small],
            **{key: torch.zeros_like(value) for key, value in saved.items() if isinstance(value, torch.Tensor)},
        }
        await aiostage.load(source, into=live, in_place=in_place, verify=verify)
        assert_same(saved, live)
    assert not ranges.alive


@pytest.mark.asyncio
async def test_a_cancelled_load_writes_nothing_more(ranges: Ranges, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {str(number): torch.full((PART // 4,), number + 1.0) for number in range(20)}
    storage = storage_at(MemoryStore())
    await aiostage.save(saved, (storage, "checkpoint"))
    live = {key: torch.zeros_like(value) for key, value in saved.items()}
    begun, go_on, real = threading.Event(), threading.Event(), np.copyto

    def copyto(target: Any, source: Any) -> None:
        begun.set()
        go_on.wait(10)
        real(target, source)

    monkeypatch.setattr(np, "copyto", copyto)
    task = asyncio.ensure_future(aiostage.load((storage, "checkpoint"), into=live, in_place=True))
    while not begun.is_set() and not task.done():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done(), "a thread writes to the live tensors"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    seen = {key: value.clone() for key, value in live.items()}
    await asyncio.sleep(0.05)
    assert_same(seen, live)
    del task
    assert not ranges.alive


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_elements_lie_where_their_dtype_may(offset: int) -> None:
    data = aligned_memory(PART)
    data[:] = np.arange(PART) % 251
    tensor = _tensor_over(data.data[offset : offset + 4096])
    assert tensor.data_ptr() % 16 == 0
    assert (tensor.data_ptr() == data.ctypes.data) == (offset == 0)
    assert tensor.numpy().tobytes() == data[offset : offset + 4096].tobytes()


@pytest.mark.asyncio
async def test_a_range_of_a_file() -> None:
    store = MemoryStore()
    storage = storage_at(store)
    data = some_bytes(PART + 100)
    await save(storage, "checkpoint", data)
    reader = await storage.read("checkpoint")
    assert isinstance(reader, RangeReader)
    assert await reader.get_range("data", 5, PART) == data[5 : 5 + PART]
    # By several requests, for which the caller gives the memory.
    assert await reader.get_range("data", 0, PART + 1) is None
    assert await reader.get_range("data", 0, 0) is None
    for offset in (PART, PART + 100):
        with pytest.raises(CheckpointCorruptError, match=f"it ends before byte {offset + 200}"):
            await reader.get_range("data", offset, 200)
    with pytest.raises(CheckpointCorruptError, match="the file is missing"):
        await reader.get_range("other", 0, 100)
    await storage.delete("checkpoint")
    with pytest.raises(CheckpointNotFoundError, match="it was deleted while it was being read"):
        await reader.get_range("data", 0, 100)
