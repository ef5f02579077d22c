"""Every order of the requests of writers, their heartbeats and a clean-up that takes them for dead.

All run on one fake store, one request at a time. Each request waits until it is chosen, and a search tries all choices.
In every order a pointer names a folder with all its files, and a writer is told that it has committed only if it has.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest

from aiostage import CheckpointError, CheckpointExistsError, CheckpointNotFoundError
from aiostage.abc import Buffer
from aiostage.storage import clean_up as module
from aiostage.storage import remote
from aiostage.storage.bucket import Bucket, ObjectMeta, StoredObject, Version
from aiostage.storage.clean_up import clean_up
from aiostage.storage.pointer import HEARTBEAT_NAME, LEASE_NAME, WITHDRAWN, remove_folder
from aiostage.storage.remote import RemoteStorage
from tests.storage.buckets import five_bytes, save_small

pytestmark = [pytest.mark.asyncio, pytest.mark.one_loop]

LEASE = 3600.0
MANIFEST, DATA, POINTER = "manifest.json", "file.bin", "checkpoint.json"


@dataclass
class Orders:
    """Chooses which of the waiting requests comes next, by a prefix of choices and then the first.

    Attributes:
        prefix: Which of the actors that wait, in the order of their names, at each choice.
        taken: The choices, each with how many there were.
    """

    prefix: Sequence[int]
    random: Random | None = None
    taken: list[tuple[int, int]] = field(default_factory=list)
    waiting: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    actors: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def turn(self, name: str) -> None:
        """Wait until a task is chosen. What is not one of the actors sets up, and need not wait."""
        if name not in self.actors:
            return
        chosen = self.waiting[name] = asyncio.get_running_loop().create_future()
        try:
            await chosen
        finally:
            if self.waiting.get(name) is chosen:
                del self.waiting[name]

    async def run(self, actors: dict[str, Coroutine[Any, Any, None]], *, cancelling: str | None) -> None:
        """Run all to their ends, and cancel one of them at some moment if asked to."""
        self.actors = {name: asyncio.create_task(actor, name=name) for name, actor in actors.items()}
        while True:
            # Until each waits or has ended.
            while any(not task.done() and name not in self.waiting for name, task in self.actors.items()):
                await asyncio.sleep(0)
            if not self.waiting:
                break
            names = sorted(self.waiting)
            if cancelling in names:
                names.append("cancel")
            if self.random is not None:
                choice = self.random.randrange(len(names))
            else:
                choice = self.prefix[len(self.taken)] if len(self.taken) < len(self.prefix) else 0
            self.taken.append((choice, len(names)))
            if names[choice] == "cancel" and cancelling is not None:
                self.actors[cancelling].cancel()
                del self.waiting[cancelling]
                cancelling = None
            else:
                self.waiting.pop(names[choice]).set_result(None)
        for task in self.actors.values():
            task.result()

    def next(self) -> list[int] | None:
        """Return the prefix that leads to another order; None if all were tried."""
        taken = list(self.taken)
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        return [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None


class FakeBucket(Bucket):
    """A store in memory, whose clock says that everything in it is old."""

    def __init__(self, orders: Orders) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.orders = orders
        self.writes = 0
        self.judged = False

    async def turn(self) -> None:
        """Wait until the calling task is chosen. What a clean-up does before it judges is in no order with the rest."""
        task = asyncio.current_task()
        assert task is not None
        if self.judged or task.get_name() != "clean-up":
            await self.orders.turn(task.get_name())

    @property
    def location(self) -> str:
        return "fake://bucket"

    def _write(self, path: str, data: bytes) -> None:
        self.writes += 1
        self.objects[path] = (data, self.writes)

    async def get(self, path: str, *, at_most: int) -> StoredObject:
        # From when a clean-up has looked how long the lease holds, it has taken the writer for dead: all is old here.
        self.judged = self.judged or path.endswith(LEASE_NAME)
        if path.endswith(POINTER):
            await self.turn()
        if path not in self.objects:
            raise FileNotFoundError(path)
        data, version = self.objects[path]
        return StoredObject(memoryview(data), Version(version))

    async def size(self, path: str) -> int:
        await self.turn()
        if path not in self.objects:
            raise FileNotFoundError(path)
        return len(self.objects[path][0])

    async def get_range(self, path: str, offset: int, nbytes: int) -> Buffer:
        raise NotImplementedError

    async def put(self, path: str, data: Buffer) -> None:
        self._write(path, bytes(data))

    async def create(self, path: str, data: Buffer) -> None:
        await self.turn()
        if path in self.objects:
            raise FileExistsError(path)
        self._write(path, bytes(data))

    async def replace(self, path: str, data: Buffer, seen: Version) -> None:
        await self.turn()
        if path not in self.objects or self.objects[path][1] != seen.tag:
            raise FileExistsError(path)
        self._write(path, bytes(data))

    async def upload(self, path: str, nbytes: int, parts: AsyncIterable[Buffer]) -> None:
        self._write(path, b"".join([bytes(part) async for part in parts]))

    async def list(self, prefix: str) -> AsyncIterator[Sequence[ObjectMeta]]:
        now = datetime.now(UTC)
        yield [
            # A pointer that comes so much later than a manifest may be to nothing, so a clean-up looks at each.
            ObjectMeta(path, now - timedelta(days=0 if "clock" in path else 1 if POINTER in path else 2), len(data))
            for path, (data, _) in self.objects.items()
            if path.startswith(f"{prefix}/" if prefix else "")
        ]

    async def delete(self, paths: Sequence[str]) -> None:
        # What is left of a folder goes with its manifest: one order less, and nobody can tell.
        if any(path.endswith((LEASE_NAME, MANIFEST, POINTER)) for path in paths):
            await self.turn()
        for path in paths:
            self.objects.pop(path, None)

    def touch(self, path: str, data: bytes, *, beside: str) -> None:
        raise NotImplementedError

    async def beat(self, folder: str, target: str = HEARTBEAT_NAME) -> None:
        """Do as heartbeats do: look for the lease, then write."""
        with suppress(FileNotFoundError):
            await self.size(f"{folder}/{LEASE_NAME}")
            await self.turn()
            self._write(f"{folder}/{target}", b"{}")


@dataclass
class Outcome:
    """What has become of the writers of one checkpoint, by their names."""

    bucket: FakeBucket
    before: str | None = None
    committed: dict[str, str] = field(default_factory=dict)
    cancelled: dict[str, str] = field(default_factory=dict)
    refused: dict[str, CheckpointError] = field(default_factory=dict)

    def pointed(self) -> str | None:
        """Return the folder that the pointer names."""
        data = self.bucket.objects.get(f"a/{POINTER}", (WITHDRAWN, 0))[0]
        found: str | None = json.loads(data)["data"]
        return found

    async def commit(self, pending: Any) -> None:
        """Be a writer."""
        task = asyncio.current_task()
        assert task is not None
        name, folder = task.get_name(), await pending.token()
        try:
            try:
                await pending.commit(memoryview(b"{}"))
                self.committed[name] = f"data-{folder}"
            except CheckpointError as error:
                self.refused[name] = error
                await pending.abort()
        except asyncio.CancelledError:
            self.cancelled[name] = f"data-{folder}"
            await pending.abort()

    async def wake(self, pending: Any) -> None:
        """Be a writer that has written its pointer and was suspended then, and find that the files are gone."""
        if not await pending._has_lease() and not await pending._is_succeeded():
            await pending._withdraw()
        else:
            self.committed["lost"] = pending._folder

    def wrong(self) -> list[str]:
        """Return what is not as it has to be, in words."""
        pointed, files = self.pointed(), (MANIFEST, DATA)
        found = [f"{file} is gone" for file in files if pointed and f"a/{pointed}/{file}" not in self.bucket.objects]
        may = [*self.committed.values(), *self.cancelled.values(), *([] if self.committed else [self.before])]
        if self.refused and len(self.refused) + len(self.committed) > 1:
            # The second has replaced the pointer of the first, and while it did a clean-up has removed those files.
            may.append(None)
        return found if pointed in may else [*found, "the pointer is not what the writers were told"]


@dataclass
class Found:
    """What a search has come to.

    Attributes:
        orders: How many orders were tried.
        wrong: What was wrong in some.
        outcomes: Which writers have committed, and which were refused.
    """

    orders: int = 0
    wrong: list[str] = field(default_factory=list)
    outcomes: set[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=set)


async def explore(
    *,
    writers: Sequence[str] = ("one",),
    overwrite: bool = False,
    gone: str | None = None,
    heartbeat: str | None = None,
    cancelling: bool = False,
    cleaning: bool = True,
    samples: int | None = None,
) -> Found:
    """Try all orders, or some by chance.

    With ``gone``, a writer that could not take its pointer back has left it to a folder without files: ``"first"``
    where there was no checkpoint before, ``"second"`` where there was one, ``"awake"`` if that writer is still at it.
    """
    prefix: Sequence[int] | None = []
    found = Found()
    while prefix is not None and (samples is None or found.orders < samples):
        orders = Orders(prefix, None if samples is None else Random(found.orders))
        bucket = FakeBucket(orders)
        storage = RemoteStorage(bucket, lease_seconds=LEASE)
        if overwrite and gone != "first":
            await save_small(storage, "a")
        outcome = Outcome(bucket)
        outcome.before = outcome.pointed()
        actors: dict[str, Coroutine[Any, Any, None]] = {}
        if gone is not None:
            lost = await lose(storage)
            # All that a clean-up does is of interest, and not only what it does once it has judged.
            bucket.judged = True
            if gone == "awake":
                actors["lost"] = outcome.wake(lost)
        folder = ""
        for name in writers:
            pending = await storage.open("a", overwrite=overwrite)
            await pending.write(DATA, 5, five_bytes())
            actors[name] = outcome.commit(pending)
            folder = f"a/data-{await pending.token()}"
        if cleaning:
            actors["clean-up"] = clean_up(bucket, LEASE)
        if heartbeat is not None:
            actors["heart"] = bucket.beat(folder, heartbeat)
        await orders.run(actors, cancelling="one" if cancelling else None)
        found.orders += 1
        found.wrong += [f"{each}: {orders.taken}" for each in outcome.wrong()]
        found.outcomes.add((tuple(sorted(outcome.committed)), tuple(sorted(outcome.refused))))
        prefix = [] if samples is not None else orders.next()
    return found


async def lose(storage: RemoteStorage) -> Any:
    """Leave a pointer to a folder without files, as a writer does that was suspended before it wrote the pointer."""
    pending: Any = await storage.open("a", overwrite=True)
    await pending._bucket.put(f"{pending._path}/{MANIFEST}", memoryview(b"{}"))
    await remove_folder(storage._bucket, pending._path)
    await pending._point()
    return pending


@pytest.fixture(autouse=True)
def heartless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no threads: what they would send is an actor of its own."""
    monkeypatch.setattr(remote, "Heartbeat", lambda *_: None)


ONE, NONE, REFUSED = (("one",), ()), ((), ()), ((), ("one",))


@pytest.mark.parametrize("overwrite", [False, True])
async def test_a_writer_has_committed_or_is_refused(overwrite: bool) -> None:
    found = await explore(overwrite=overwrite)
    assert not found.wrong, found.wrong[:3]
    assert found.outcomes == {ONE, REFUSED}
    assert found.orders > 50


@pytest.mark.parametrize("overwrite", [False, True])
async def test_a_cancelled_writer_leaves_a_whole_checkpoint_or_none(overwrite: bool) -> None:
    found = await explore(overwrite=overwrite, cancelling=True)
    assert not found.wrong, found.wrong[:3]
    assert found.outcomes == {ONE, REFUSED, NONE}


async def test_heartbeats_hide_nothing() -> None:
    found = await explore(heartbeat=HEARTBEAT_NAME)
    assert not found.wrong, found.wrong[:3]
    assert found.outcomes == {ONE, REFUSED}


@pytest.mark.parametrize("overwrite", [False, True])
async def test_of_two_writers_one_wins(overwrite: bool) -> None:
    found = await explore(writers=("one", "two"), overwrite=overwrite, samples=500)
    assert not found.wrong, found.wrong[:3]
    assert {committed for committed, _ in found.outcomes} >= {(), ("one",), ("two",)}
    assert all(committed for committed, refused in found.outcomes if not refused)


@pytest.mark.parametrize("gone", ["first", "second", "awake"])
async def test_a_pointer_to_nothing_is_withdrawn(gone: str) -> None:
    found = await explore(writers=(), overwrite=True, gone=gone)
    assert not found.wrong, found.wrong[:3]
    assert found.outcomes == {NONE}


@pytest.mark.parametrize("gone", ["first", "second", "awake"])
async def test_withdrawing_a_pointer_to_nothing_takes_none_of_a_writer(gone: str) -> None:
    """Who replaces it meanwhile is taken for dead too, so it may be refused; what it was told is so."""
    found = await explore(overwrite=True, gone=gone, samples=1000)
    assert not found.wrong, found.wrong[:3]
    assert {committed for committed, _ in found.outcomes} >= {("one",)}


async def test_a_writer_that_was_withdrawn_and_followed_by_others_has_not_committed() -> None:
    storage = RemoteStorage(FakeBucket(Orders([])), lease_seconds=LEASE)
    await save_small(storage, "a")
    lost = await lose(storage)
    await storage.clean_up()
    assert sorted(await storage.list()) == ["a"]
    for _ in range(2):
        again = await storage.open("a", overwrite=True)
        await again.write(DATA, 5, five_bytes())
        await again.commit(memoryview(b"{}"))
        assert not await lost._is_succeeded()


async def test_a_writer_that_many_others_have_followed_has_committed() -> None:
    storage = RemoteStorage(FakeBucket(Orders([])), lease_seconds=LEASE)
    first: Any = await storage.open("a")
    await first.write(DATA, 5, five_bytes())
    await first._bucket.put(f"{first._path}/{MANIFEST}", memoryview(b"{}"))
    await first._point()
    for _ in range(3):
        again = await storage.open("a", overwrite=True)
        await again.write(DATA, 5, five_bytes())
        await again.commit(memoryview(b"{}"))
    assert not await first._has_lease()
    assert await first._is_succeeded()


async def test_the_search_finds_a_clean_up_that_replaces_what_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unseen(bucket: Any, name: str, data: Buffer, seen: Version) -> None:
        await bucket.turn()
        await bucket.put(f"{name}/{POINTER}", data)

    monkeypatch.setattr(module, "_exchange_compared", unseen)
    found = await explore(overwrite=True, gone="first", samples=1000)
    assert any("not what the writers were told" in each for each in found.wrong)


async def test_two_writers_that_replace_both_commit() -> None:
    """The second removes the files of the first, and its lease, maybe before the first has looked for it."""
    found = await explore(writers=("one", "two"), overwrite=True, cleaning=False, samples=500)
    assert not found.wrong, found.wrong[:3]
    assert found.outcomes == {(("one", "two"), ())}


async def test_a_checkpoint_that_is_deleted_at_once_was_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage(FakeBucket(Orders([])), lease_seconds=LEASE)
    pending: Any = await storage.open("a")
    point = pending._point

    async def deleted() -> None:
        await point()
        await storage.delete("a")

    monkeypatch.setattr(pending, "_point", deleted)
    await pending.commit(memoryview(b"{}"))
    assert list(await storage.list()) == []


async def test_the_search_finds_a_writer_that_looks_only_before(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: set[str] = set()
    look = remote._RemoteCheckpoint._has_lease

    async def once(self: Any) -> bool:
        if self._folder in looked:
            return True
        looked.add(self._folder)
        return await look(self)

    monkeypatch.setattr(remote._RemoteCheckpoint, "_has_lease", once)
    found = await explore()
    assert any("manifest.json is gone" in each for each in found.wrong)


async def test_the_search_finds_a_heartbeat_that_brings_the_lease_back() -> None:
    found = await explore(heartbeat=LEASE_NAME)
    assert any("file.bin is gone" in each for each in found.wrong)


async def test_the_search_finds_a_clean_up_that_does_not_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    look = module._is_used

    async def before(bucket: Any, suspect: Any) -> bool:
        return f"{'/'.join(suspect)}/{LEASE_NAME}" in bucket.objects and await look(bucket, suspect)

    monkeypatch.setattr(module, "_is_used", before)
    found = await explore()
    assert any("file.bin is gone" in each for each in found.wrong)


async def test_a_withdrawn_checkpoint_is_none_and_can_be_written_again() -> None:
    storage = RemoteStorage(FakeBucket(Orders([])), lease_seconds=LEASE)
    await save_small(storage, "b")
    await storage._bucket.put(f"a/{POINTER}", memoryview(WITHDRAWN))
    assert list(await storage.list()) == ["b"]
    assert await storage.revision("a") is None
    with pytest.raises(CheckpointNotFoundError):
        await storage.read("a")
    await storage.delete("a")
    await storage.prune_files("a", [])
    await storage.open("a")
    assert list(await storage.pending()) == ["a"]
    await storage.clean_up()
    assert list(await storage.pending()) == []
    await save_small(storage, "a")
    assert sorted(await storage.list()) == ["a", "b"]
    with pytest.raises(CheckpointExistsError):
        await storage.open("a")


@pytest.mark.parametrize("nbytes", [len(WITHDRAWN), len(WITHDRAWN) + 1])
async def test_an_odd_pointer_hides_no_others_from_a_listing(nbytes: int) -> None:
    """One of the length of a withdrawn pointer is read to tell the two apart."""
    storage = RemoteStorage(FakeBucket(Orders([])), lease_seconds=LEASE)
    await save_small(storage, "a")
    await storage._bucket.put(f"odd/{POINTER}", memoryview(bytes(nbytes)))
    assert sorted(await storage.list()) == ["a", "odd"]
