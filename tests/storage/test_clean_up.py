"""What dead writers leave is removed, and nothing that a living one is at work on."""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import anyio
import obstore
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from obstore.store import LocalStore, MemoryStore, S3Store

from aiostage import CheckpointCorruptError, CheckpointError, StorageError
from aiostage.storage import FsspecStorage, ObjectStorage
from aiostage.storage import clean_up as module
from aiostage.storage.bucket import Bucket
from aiostage.storage.pointer import Heartbeat, lease_seconds, write_lease
from aiostage.storage.remote import RemoteStorage
from tests.patience import seconds
from tests.servers.weed import BUCKET
from tests.storage.buckets import content, save, some_bytes, write

pytestmark = pytest.mark.asyncio

LEASE = 3600.0


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Any:
    if request.param == "memory":
        return MemoryStore()
    return S3Store(BUCKET, prefix=secrets.token_hex(4), **request.getfixturevalue("s3_server").options())


def paths(store: Any) -> list[str]:
    return sorted(meta["path"] for meta in obstore.list(store).collect())


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let a clean-up believe that it takes place later than it does."""
    now = module._now

    async def then(bucket: Any) -> datetime:
        return await now(bucket) + timedelta(seconds=seconds)

    monkeypatch.setattr(module, "_now", then)


def suspend_before_pointer(pending: Any, storage: RemoteStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a clean-up take a writer for dead between its look for the lease and its pointer."""
    point = pending._point

    async def suspended() -> None:
        with monkeypatch.context() as patch:
            later(patch, LEASE + 5)
            await storage.clean_up()
        await point()

    monkeypatch.setattr(pending, "_point", suspended)


async def die(storage: ObjectStorage, name: str, *, overwrite: bool = False) -> None:
    """Leave what a writer leaves that ends before it commits."""
    await write(await storage.open(name, overwrite=overwrite), "data", some_bytes(1000))


async def test_stale_files_go_once_its_lease_is_over(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage(store, lease_seconds=LEASE)
    await die(storage, "a")
    await die(storage, "b/c")
    await save(storage, "d", some_bytes(1000))
    await die(storage, "d", overwrite=True)
    obstore.put(store, "a/mine", b"")
    obstore.put(store, "data-0123456789abcdef/mine", b"")
    everything = paths(store)
    await storage.clean_up()
    assert paths(store) == everything
    later(monkeypatch, LEASE - 5)
    await storage.clean_up()
    assert paths(store) == everything
    later(monkeypatch, 10)
    await storage.clean_up()
    kept = [path for path in paths(store) if not path.startswith("d/")]
    assert kept == ["a/mine", "data-0123456789abcdef/mine"]
    assert (await content(storage, "d"))[1] == bytes(some_bytes(1000))
    assert len(paths(store)) == 6


async def test_a_longer_lease_counts(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await die(ObjectStorage(store, lease_seconds=2 * LEASE), "a")
    everything = paths(store)
    later(monkeypatch, 1.5 * LEASE)
    await ObjectStorage(store, lease_seconds=LEASE).clean_up()
    assert paths(store) == everything
    later(monkeypatch, LEASE)
    await ObjectStorage(store, lease_seconds=LEASE).clean_up()
    assert paths(store) == []


async def test_a_living_writer_renews_its_lease() -> None:
    store = MemoryStore()
    storage = ObjectStorage(store, lease_seconds=0.1)
    pending = await storage.open("a")
    (lease,) = paths(store)
    assert lease.endswith("/lease.json")
    # An object beside the lease, because a lease that comes back after a clean-up would hide that files are gone.
    beat = lease.replace("lease.json", "heartbeat.json")
    while paths(store) != [beat, lease]:
        await asyncio.sleep(0.005)
    first = obstore.head(store, beat)["last_modified"]
    while obstore.head(store, beat)["last_modified"] == first:
        await asyncio.sleep(0.005)
    with pytest.raises(ValueError, match="a file of the storage itself; choose another name"):
        await write(pending, "heartbeat.json", some_bytes(1))
    await pending.abort()
    assert paths(store) == []


async def test_a_writer_whose_heartbeat_expired_cannot_commit(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage(store, lease_seconds=LEASE)
    pending = await storage.open("a")
    await write(pending, "data", some_bytes(1000))
    later(monkeypatch, LEASE + 5)
    await storage.clean_up()
    assert paths(store) == []
    with pytest.raises(CheckpointError, match="deleted by another process because its heartbeat expired"):
        await pending.commit(memoryview(b"{}"))
    await pending.abort()
    assert paths(store) == []


async def test_a_heartbeat_that_comes_after_a_clean_up_ends(
    store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that was suspended for longer than its lease would otherwise commit files that are gone."""
    storage = ObjectStorage(store, lease_seconds=0.4)
    pending = await storage.open("a")
    await write(pending, "data", some_bytes(1000))
    later(monkeypatch, 60)
    await storage.clean_up()
    with anyio.fail_after(seconds(10)):
        while "the lease was removed because its heartbeat expired" not in caplog.text:
            await anyio.sleep(0.01)
    assert paths(store) == []
    with pytest.raises(CheckpointError, match="deleted by another process because its heartbeat expired"):
        await pending.commit(memoryview(b"{}"))
    await pending.abort()
    assert paths(store) == []


@pytest.mark.parametrize("overwrite", [False, True])
async def test_a_pointer_to_files_that_are_gone_is_withdrawn(
    store: Any, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a writer that was suspended between its look for the lease and its pointer."""
    storage = ObjectStorage(store, lease_seconds=LEASE)
    old, new = some_bytes(1000), some_bytes(1000, 1)
    if overwrite:
        await save(storage, "a", old)
    pending: Any = await storage.open("a", overwrite=overwrite)
    await write(pending, "data", new)
    suspend_before_pointer(pending, storage, monkeypatch)
    with pytest.raises(CheckpointError, match="deleted by another process because its heartbeat expired"):
        await pending.commit(new[:100])
    await pending.abort()
    if overwrite:
        assert await content(storage, "a") == (bytes(old[:100]), bytes(old))
        assert len(paths(store)) == 4
        return
    assert await storage.list() == []
    assert paths(store) == ["a/checkpoint.json"]
    await save(storage, "a", new)
    assert await content(storage, "a") == (bytes(new[:100]), bytes(new))
    assert await storage.list() == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["store", "local store", "fsspec", "fsspec memory"])
async def test_a_pointer_that_its_writer_could_not_take_back(
    store: Any, overwrite: bool, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    if kind != "store":
        if isinstance(store, S3Store):
            pytest.skip("the same without it")
        store = LocalStore(tmp_path)
    storage: RemoteStorage = ObjectStorage(store, lease_seconds=LEASE)
    if kind == "fsspec":
        storage = FsspecStorage(LocalFileSystem(), str(tmp_path), lease_seconds=LEASE)
    elif kind == "fsspec memory":
        storage = FsspecStorage(MemoryFileSystem(), f"/{secrets.token_hex(4)}", lease_seconds=LEASE)
    old, new = some_bytes(1000), some_bytes(1000, 1)
    if overwrite:
        await save(storage, "a", old)
    pending: Any = await storage.open("a", overwrite=overwrite)
    await write(pending, "data", new)

    async def out_of_reach(*_: Any, **__: Any) -> None:
        raise StorageError("out of reach.")

    suspend_before_pointer(pending, storage, monkeypatch)
    monkeypatch.setattr(pending, "_withdraw", out_of_reach)
    with pytest.raises(StorageError, match="out of reach"):
        await pending.commit(new[:100])
    await pending.abort()
    with pytest.raises(CheckpointCorruptError, match="missing"):
        await content(storage, "a")
    # The old files are younger than they would be after such a suspension.
    monkeypatch.setattr(module, "_seconds_between", lambda *_: LEASE + 5)
    kept = await storage.list()
    await storage.clean_up()
    # Neither the pointer nor what it has replaced goes at once.
    assert await storage.list() == kept == ["a"]
    with pytest.raises(CheckpointCorruptError, match="missing"):
        await content(storage, "a")
    later(monkeypatch, LEASE + 5)
    await storage.clean_up()
    if kind == "fsspec memory":
        assert "names files that are gone, because its writer could not take it back" in caplog.text
        await save(storage, "a", new, overwrite=True)
    elif overwrite:
        assert await content(storage, "a") == (bytes(old[:100]), bytes(old))
    else:
        assert await storage.list() == []
        await save(storage, "a", new)
    assert await storage.list() == ["a"]
    await content(storage, "a")


async def test_a_pointer_is_left_while_anything_speaks_for_its_folder(store: Any) -> None:
    """A lost manifest, or a lease that a clean-up has taken too late, is no removal."""
    storage = ObjectStorage(store, lease_seconds=LEASE)
    for lost in ("lease.json", "manifest.json"):
        await save(storage, "a", some_bytes(1000), overwrite=True)
        obstore.delete(store, [path for path in paths(store) if path.endswith(lost)])
        everything = paths(store)
        await storage.clean_up()
        assert paths(store) == everything
        assert await storage.list() == ["a"]


async def test_a_checkpoint_whose_pointer_is_copied_before_its_files(store: Any) -> None:
    """From another store, object by object, as tools do it that know nothing of pointers."""
    source, storage = ObjectStorage(MemoryStore()), ObjectStorage(store, lease_seconds=LEASE)
    data = some_bytes(1000)
    await save(source, "a", data)
    objects = paths(source._bucket._store)  # type: ignore[attr-defined]
    assert objects[0] == "a/checkpoint.json"
    for path in objects:
        obstore.put(store, path, obstore.get(source._bucket._store, path).bytes())  # type: ignore[attr-defined]
        await storage.clean_up()
    assert await storage.list() == ["a"]
    assert await content(storage, "a") == (bytes(data[:100]), bytes(data))


async def test_what_a_pointer_to_nothing_has_replaced_is_kept(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer could not take it back, and the clean-up that has removed its files has stopped half-way."""
    storage = ObjectStorage(store, lease_seconds=LEASE)
    old = some_bytes(1000)
    await save(storage, "a", old)
    pending: Any = await storage.open("a", overwrite=True)
    await write(pending, "data", some_bytes(1000, 1))
    await pending._point()
    obstore.delete(store, f"{pending._path}/lease.json")
    # Nothing tells by its time that it is a pointer to nothing.
    later(monkeypatch, LEASE + 5)
    monkeypatch.setattr(module, "_seconds_between", lambda *_: 0.0)
    everything = paths(store)
    await storage.clean_up()
    assert paths(store) == everything
    monkeypatch.setattr(module, "_seconds_between", lambda *_: LEASE + 5)
    await storage.clean_up()
    assert await content(storage, "a") == (bytes(old[:100]), bytes(old))
    assert len(paths(store)) == 4


async def test_a_damaged_pointer_keeps_its_folders_and_no_others(
    store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = ObjectStorage(store, lease_seconds=LEASE)
    await save(storage, "a", some_bytes(1000))
    await die(storage, "a", overwrite=True)
    obstore.put(store, "a/checkpoint.json", b"{")
    kept = paths(store)
    await die(storage, "b")
    later(monkeypatch, LEASE + 5)
    await storage.clean_up()
    assert paths(store) == kept
    assert "it is not the pointer of a checkpoint" in caplog.text


async def test_a_clean_up_removes_the_lease_before_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commits in between, having found its lease, is left as it is."""
    store = MemoryStore()
    storage = ObjectStorage(store, lease_seconds=LEASE)
    pending = await storage.open("a")
    await write(pending, "data", some_bytes(1000))
    later(monkeypatch, LEASE + 5)

    removed: list[list[str]] = []

    class Stopping:
        """A bucket whose first deletion of files lets the writer go first."""

        def __getattr__(self, name: str) -> Any:
            return getattr(storage._bucket, name)

        async def delete(self, paths: Sequence[str]) -> None:
            if not paths[0].startswith(".aiostage-clock"):
                removed.append([path.rpartition("/")[2] for path in paths])
                if len(removed) == 1:
                    await pending.commit(some_bytes(1000)[:100])
            await storage._bucket.delete(paths)

    await module.clean_up(cast("Bucket", Stopping()), LEASE)
    assert removed == [["lease.json"]]
    assert (await content(storage, "a"))[1] == bytes(some_bytes(1000))


async def test_a_commit_between_the_listings_of_a_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    storage = ObjectStorage(store, lease_seconds=LEASE)
    pending = await storage.open("a")
    await write(pending, "data", some_bytes(1000))

    async def commit_then_tell(bucket: Any) -> datetime:
        await pending.commit(some_bytes(1000)[:100])
        return datetime.now(UTC) + timedelta(days=1)

    monkeypatch.setattr(module, "_now", commit_then_tell)
    await storage.clean_up()
    assert (await content(storage, "a"))[1] == bytes(some_bytes(1000))


async def test_dropping_a_pending_checkpoint_stops_its_heartbeat() -> None:
    before = set(threading.enumerate())
    pending = await ObjectStorage(MemoryStore()).open("a")
    (thread,) = [
        thread for thread in threading.enumerate() if thread.name == "aiostage-heartbeat" and thread not in before
    ]
    del pending
    thread.join(seconds(10))
    assert not thread.is_alive()


async def test_a_beat_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    beaten = threading.Event()
    outcomes = iter([OSError("out of reach"), None])

    def beat() -> None:
        outcome = next(outcomes, None)
        if outcome is not None:
            raise outcome
        beaten.set()

    heart = Heartbeat(beat, 0.001, "heart")
    await asyncio.to_thread(beaten.wait, 10)
    await asyncio.to_thread(heart.stop)
    assert beaten.is_set()
    assert "could not renew a lease" in caplog.text


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"seconds": "x"}', b"\xff", b'{"seconds": []}'])
async def test_leases_that_cannot_be_read(data: bytes) -> None:
    assert lease_seconds(data) == 0.0
    assert lease_seconds(write_lease(5.0)) == 5.0


async def test_the_clock_of_a_killed_clean_up_is_removed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    storage = ObjectStorage(store, lease_seconds=LEASE)
    pending = await storage.open("a")
    obstore.put(store, ".aiostage-clock/0123456789abcdef", b".")
    await storage.clean_up()
    assert ".aiostage-clock/0123456789abcdef" in paths(store)
    monkeypatch.setattr(module, "_CLOCK_OBJECT_LIFETIME", timedelta(0))
    await storage.clean_up()
    assert len(paths(store)) == 1
    await pending.abort()


async def test_a_lease_that_never_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    store = MemoryStore()
    storage = ObjectStorage(store, lease_seconds=math.inf)
    pending = await storage.open("a")
    await write(pending, "data", some_bytes(1000))
    thread = next(thread for thread in threading.enumerate() if thread.name == "aiostage-heartbeat")
    await pending.commit(memoryview(b"{}"))
    assert failed == []
    assert not thread.is_alive()
    # What its writers leave is never taken for stale, whatever the storage says that cleans up.
    await die(storage, "b")
    later(monkeypatch, 1e9)
    await ObjectStorage(store, lease_seconds=1.0).clean_up()
    assert list(await storage.pending()) == ["b"]


@pytest.mark.parametrize("value", [None, True, "3"])
async def test_a_lease_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="lease_seconds must be a number of seconds, not "):
        ObjectStorage(MemoryStore(), lease_seconds=value)
