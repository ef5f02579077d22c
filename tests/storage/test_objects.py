"""Checkpoints in object stores: what the protocol promises, on a real server, in memory, and on a disk."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import secrets
import subprocess
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.store import LocalStore, MemoryStore, S3Store

from aiostage import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    StorageError,
)
from aiostage.storage import ObjectStorage
from aiostage.storage.bucket import StoredObject, Version
from aiostage.storage.pointer import HEARTBEAT_NAME, LEASE_NAME
from tests.patience import seconds
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server
from tests.storage.buckets import PART, content, parts_of, race, save, some_bytes, write
from tests.warm import PYTHON

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return LocalStore(tmp_path)
    return S3Store(BUCKET, **request.getfixturevalue("s3_server").options())


@pytest.fixture
def prefix() -> str:
    return f"run-{secrets.token_hex(4)}"


@pytest.fixture
def storage(store: Any, prefix: str) -> ObjectStorage:
    return ObjectStorage(store, prefix)


def paths(store: Any, prefix: str) -> list[str]:
    return sorted(meta["path"] for meta in obstore.list(store, prefix).collect())


@pytest.mark.parametrize("nbytes", [0, 1, PART, 2 * PART, 2 * PART + 1, 5 * PART + 12345])
async def test_what_is_written_is_read(storage: ObjectStorage, nbytes: int) -> None:
    data = some_bytes(nbytes)
    await save(storage, "a/b", data)
    assert await content(storage, "a/b") == (bytes(data[:100]), bytes(data))
    reader = await storage.read("a/b")
    assert abs(time.time() - (await reader.modified() or 0)) < 600


async def test_names_of_the_storage_itself_are_refused() -> None:
    pending = await ObjectStorage(MemoryStore()).open("a")
    for name in (LEASE_NAME, HEARTBEAT_NAME):
        with pytest.raises(ValueError, match=f"'{name}' is a file of the storage itself; choose another name"):
            await pending.write(name, 0, parts_of(b""))
    await pending.abort()


async def test_several_files_at_once(storage: ObjectStorage) -> None:
    files = {f"file-{number}": some_bytes(number * 1000 + 1, number) for number in range(8)}
    pending = await storage.open("a")
    async with asyncio.TaskGroup() as group:
        for name, data in files.items():
            group.create_task(write(pending, name, data))
    await pending.commit(memoryview(b"{}"))
    reader = await storage.read("a")
    for name, data in files.items():
        into = bytearray(data.nbytes)
        await reader.read(name, 0, memoryview(into))
        assert bytes(into) == bytes(data)


async def test_ranges(storage: ObjectStorage) -> None:
    data = some_bytes(3 * PART + 77)
    await save(storage, "a", data)
    reader = await storage.read("a")
    for start, stop in [(0, 0), (0, 1), (5, 4096), (PART - 1, 3 * PART + 1), (data.nbytes - 1, data.nbytes)]:
        into = bytearray(stop - start)
        await reader.read("data", start, memoryview(into))
        assert bytes(into) == bytes(data[start:stop])
    for start, nbytes in [(data.nbytes - 1, 2), (data.nbytes, 1), (data.nbytes + 5, 10), (1, 3 * PART + 77)]:
        with pytest.raises(CheckpointCorruptError, match="ends before byte"):
            await reader.read("data", start, memoryview(bytearray(nbytes)))


async def test_nothing_is_seen_before_the_commit(storage: ObjectStorage, store: Any, prefix: str) -> None:
    data = some_bytes(1000)
    pending = await storage.open("a")
    assert pending.location.endswith(f"{prefix}/a")
    await write(pending, "data", data)
    assert await storage.list() == []
    with pytest.raises(CheckpointNotFoundError, match=f"{prefix}/a: there is no checkpoint"):
        await storage.read("a")
    await pending.commit(data)
    assert await storage.list() == ["a"]
    await pending.abort()
    assert await storage.list() == ["a"]


async def test_an_aborted_draft_leaves_nothing(storage: ObjectStorage, store: Any, prefix: str) -> None:
    pending = await storage.open("a")
    await write(pending, "data", some_bytes(1000))
    assert paths(store, prefix)
    await pending.abort()
    await pending.abort()
    assert paths(store, prefix) == []


async def test_the_folder_is_a_checkpoint_as_on_a_disk(storage: ObjectStorage, store: Any, prefix: str) -> None:
    data = some_bytes(1000)
    await save(storage, "a", data)
    pointer = json.loads(bytes(obstore.get(store, f"{prefix}/a/checkpoint.json").bytes()))
    folder = f"{prefix}/a/{pointer['data']}"
    assert paths(store, prefix) == [
        f"{prefix}/a/checkpoint.json",
        f"{folder}/data",
        f"{folder}/lease.json",
        f"{folder}/manifest.json",
    ]
    assert bytes(obstore.get(store, f"{folder}/manifest.json").bytes()) == bytes(data[:100])


async def test_what_is_there_is_not_replaced_unasked(storage: ObjectStorage, store: Any, prefix: str) -> None:
    await save(storage, "a", some_bytes(1000))
    before = paths(store, prefix)
    with pytest.raises(CheckpointExistsError, match=f"{prefix}/a: there is already a checkpoint.*overwrite=True"):
        await storage.open("a")
    assert paths(store, prefix) == before


async def test_what_is_no_checkpoint_is_not_replaced(storage: ObjectStorage, store: Any, prefix: str) -> None:
    folder = "data-0123456789abcdef"
    damaged = {"format": "aiostage", "version": 1, "data": folder, "replaced": {folder: 1}}
    for text in ('{"mine": 1}', json.dumps(damaged)):
        obstore.put(store, f"{prefix}/a/checkpoint.json", text.encode())
        with pytest.raises(CheckpointExistsError, match="not the pointer of a checkpoint"):
            await storage.open("a", overwrite=True)
        with pytest.raises(CheckpointCorruptError, match="not the pointer of a checkpoint"):
            await storage.read("a")


async def test_a_store_that_gives_objects_no_tags_compares_nothing(
    storage: ObjectStorage, store: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer replaces the pointer all the same; a clean-up must not, because that may be another writer's."""
    await save(storage, "a", some_bytes(1000))
    bucket: Any = storage._bucket
    path = "a/checkpoint.json"
    pointer = bytes(obstore.get(store, f"{prefix}/{path}").bytes())
    with pytest.raises(NotImplementedError):
        await bucket.replace(path, memoryview(b"mine"), Version({}))
    assert bytes(obstore.get(store, f"{prefix}/{path}").bytes()) == pointer
    get = bucket.get

    async def without_tag(path: str, *, at_most: int) -> StoredObject:
        return StoredObject((await get(path, at_most=at_most)).data, Version({}))

    monkeypatch.setattr(bucket, "get", without_tag)
    new = some_bytes(2000)
    await save(storage, "a", new, overwrite=True)
    assert await content(storage, "a") == (bytes(new[:100]), bytes(new))


async def test_replacing_removes_what_was_there(storage: ObjectStorage, store: Any, prefix: str) -> None:
    old, new = some_bytes(1000, 1), some_bytes(2000, 2)
    await save(storage, "a", old)
    pending = await storage.open("a", overwrite=True)
    await write(pending, "data", new)
    assert await content(storage, "a") == (bytes(old[:100]), bytes(old))
    await pending.commit(new[:100])
    assert await content(storage, "a") == (bytes(new[:100]), bytes(new))
    assert len(paths(store, prefix)) == 4


async def test_of_two_writers_one_wins(storage: ObjectStorage, store: Any, prefix: str) -> None:
    await race(storage, "a")
    assert len(paths(store, prefix)) == 4


async def test_of_many_that_replace_one_is_left(store: Any, storage: ObjectStorage, prefix: str) -> None:
    await save(storage, "a", some_bytes(10))
    await asyncio.gather(*(save(storage, "a", some_bytes(1000, seed), overwrite=True) for seed in range(6)))
    _, data = await content(storage, "a")
    assert data in [bytes(some_bytes(1000, seed)) for seed in range(6)]
    assert len(paths(store, prefix)) == 4


async def test_deleting(storage: ObjectStorage, store: Any, prefix: str) -> None:
    await save(storage, "a", some_bytes(1000))
    await save(storage, "a/b", some_bytes(1000))
    await storage.delete("a")
    await storage.delete("a")
    assert await storage.list() == ["a/b"]
    await storage.delete("a/b")
    assert paths(store, prefix) == []


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_reader_gets_an_error_about_its_checkpoint(storage: ObjectStorage, replaced: bool) -> None:
    await save(storage, "a", some_bytes(1000))
    reader = await storage.read("a")
    if replaced:
        await save(storage, "a", some_bytes(1000), overwrite=True)
    else:
        await storage.delete("a")
    into = memoryview(bytearray(1000))
    for attempt in (reader.manifest(), reader.size("data"), reader.read("data", 0, into)):
        with pytest.raises(CheckpointNotFoundError, match="replaced while" if replaced else "deleted while"):
            await attempt


async def test_a_file_that_is_missing(storage: ObjectStorage) -> None:
    await save(storage, "a", some_bytes(1000))
    reader = await storage.read("a")
    with pytest.raises(CheckpointCorruptError, match="/other: the file is missing"):
        await reader.size("other")
    with pytest.raises(CheckpointCorruptError, match="not a plain name"):
        await reader.read("../b", 0, memoryview(bytearray(1)))


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\n", "a/data-0123456789abcdef"])
async def test_names_that_lead_elsewhere(storage: ObjectStorage, name: str) -> None:
    with pytest.raises(ValueError, match="is not a name for a checkpoint"):
        await storage.open(name)


@pytest.mark.parametrize("name", ["step-1", "a b/ü", "50%", "a%2Fb", "#~+&?=", "日本"])
async def test_names_come_back_as_they_were(storage: ObjectStorage, name: str) -> None:
    await save(storage, name, some_bytes(10))
    assert await storage.list() == [name]
    assert await content(storage, name) == (bytes(some_bytes(10)), bytes(some_bytes(10)))


@pytest.mark.parametrize("nbytes", [0, 100, 3 * PART, 4 * PART + 1])
async def test_parts_of_another_length_are_refused(
    storage: ObjectStorage, store: Any, prefix: str, nbytes: int
) -> None:
    pending = await storage.open("a")
    with pytest.raises(CheckpointError, match=f"expected {nbytes} bytes, but its parts have"):
        await pending.write("data", nbytes, parts_of(some_bytes(4 * PART)))
    await pending.abort()
    assert paths(store, prefix) == []


async def test_parts_that_fail(storage: ObjectStorage, store: Any, prefix: str) -> None:
    data = some_bytes(4 * PART)

    async def failing() -> AsyncIterator[memoryview]:
        async for part in parts_of(data[: 3 * PART]):
            yield part
        raise OSError("no more")

    pending = await storage.open("a")
    with pytest.raises(OSError, match=r"^no more$"):
        await pending.write("data", data.nbytes, failing())
    await pending.abort()
    assert paths(store, prefix) == []


async def test_nothing_is_copied_and_everything_let_go(storage: ObjectStorage, store: Any) -> None:
    """Each part is an exporter of its own, so its death tells when the store has done with it."""
    if isinstance(store, MemoryStore):
        pytest.skip("it keeps what it is given")
    alive: list[weakref.ref[Any]] = []
    most = 0

    async def parts() -> AsyncIterator[memoryview]:
        nonlocal most
        for _ in range(12):
            part = np.zeros(PART, np.uint8)
            alive.append(weakref.ref(part))
            view = memoryview(part)
            del part
            yield view
            del view
            most = max(most, sum(reference() is not None for reference in alive))

    pending = await storage.open("a")
    await pending.write("data", 12 * PART, parts())
    gc.collect()
    assert [reference() for reference in alive] == [None] * 12
    # Eight requests of one part, the next one, and the one that is being handed over.
    assert most <= 10
    await pending.abort()


@pytest.mark.parametrize("steps", range(0, 40, 8))
async def test_cancelled_at_any_await(
    steps: int, s3_server: S3Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = S3Store(BUCKET, **s3_server.options())
    storage = ObjectStorage(store, prefix)
    data = some_bytes(5 * PART)

    async def whole() -> None:
        pending = await storage.open("a")
        try:
            await write(pending, "data", data)
            await pending.commit(data[:100])
        except BaseException:
            await pending.abort()
            raise

    task = asyncio.ensure_future(whole())
    for _ in range(steps):
        await asyncio.sleep(0.005)
    task.cancel()
    try:
        await task
        committed = True
    except asyncio.CancelledError:
        committed = bool(await storage.list())
    assert open_uploads(s3_server, prefix) == []
    if committed:
        assert await content(storage, "a") == (bytes(data[:100]), bytes(data))
    else:
        assert paths(store, prefix) == []
    assert not caplog.records


async def test_a_wrong_secret(s3_server: S3Server, prefix: str) -> None:
    storage = ObjectStorage.from_url(f"s3://{BUCKET}/{prefix}", **(s3_server.options() | {"secret_access_key": "?"}))
    with pytest.raises(StorageError, match=rf"s3://{BUCKET}/{prefix}/a/.*403.*Check the credentials") as caught:
        await storage.open("a")
    assert isinstance(caught.value, OSError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert "Debug source" not in str(caught.value)


async def test_a_store_without_conditions(s3_server: S3Server, prefix: str) -> None:
    storage = ObjectStorage(S3Store(BUCKET, conditional_put="disabled", **s3_server.options()), prefix)
    with pytest.raises(StorageError, match=r"cannot write an object only where there is none.*conditional_put"):
        await save(storage, "a", some_bytes(10))
    await save(storage, "b", some_bytes(10), overwrite=True)


async def test_a_server_that_is_not_there(prefix: str) -> None:
    storage = ObjectStorage.from_url(
        f"s3://{BUCKET}/{prefix}", **S3Server(1).options(), retry_config={"max_retries": 1}
    )
    for attempt in (storage.open("a"), storage.read("a"), storage.list(), storage.delete("a"), storage.clean_up()):
        with pytest.raises(StorageError, match=f"s3://{BUCKET}/{prefix}"):
            await attempt


async def test_options_that_are_wrong() -> None:
    storage = ObjectStorage.from_url("s3://bucket/a", nonsense="1")
    with pytest.raises(StorageError, match=r"s3://bucket/a: the store cannot be set up: .*nonsense"):
        await storage.list()
    for url in ("s3:///a", "s3://bucket/a?x=1", "relative/path"):
        with pytest.raises(ValueError, match="is not the URL of a bucket"):
            ObjectStorage.from_url(url)


async def test_memory_urls_name_the_same_memory() -> None:
    name = secrets.token_hex(4)
    await save(ObjectStorage.from_url(f"memory://{name}/a"), "b/c", some_bytes(10))
    assert await ObjectStorage.from_url(f"memory://{name}/a/b").list() == ["c"]
    assert await ObjectStorage.from_url(f"memory://{name}x/a/b").list() == []
    assert repr(ObjectStorage.from_url(f"memory://{name}/a/")) == f"ObjectStorage('memory://{name}/a')"


async def test_where_stores_are(tmp_path: Path) -> None:
    assert repr(ObjectStorage(MemoryStore())) == "ObjectStorage('memory://')"
    store = S3Store("bucket", prefix="x", region="us-east-1", access_key_id="k", secret_access_key="hidden")
    assert repr(ObjectStorage(store, "y/")) == "ObjectStorage('s3://bucket/x/y')"


FORKING = """
import asyncio, os, signal
from obstore.store import MemoryStore
from aiostage import CheckpointError
from aiostage.storage import ObjectStorage

storage = ObjectStorage(MemoryStore())
asyncio.run(storage.list())
child = os.fork()
if child == 0:
    signal.alarm(20)
    try:
        asyncio.run(ObjectStorage(MemoryStore()).list())
    except CheckpointError as error:
        assert str(error).startswith("memory://: obstore was in use when this process was forked")
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
asyncio.run(storage.list())
"""


@pytest.mark.one_loop
async def test_a_forked_process_gets_an_error_instead_of_waiting_forever() -> None:
    await asyncio.to_thread(subprocess.run, [*PYTHON, "-c", FORKING], check=True, timeout=seconds(50))
