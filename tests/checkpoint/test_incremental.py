from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
import torch
import xxhash

import aiostage
from aiostage import AsyncStager, CheckpointCorruptError, Checkpointer, StagingOptions
from aiostage.abc import Buffer, Reader
from aiostage.format.parts import PART_BYTES
from aiostage.format.placement import BLOCK_BYTES, Extent, PlacedFile, append
from aiostage.incremental.writing import _Group
from aiostage.storage import LocalStorage
from aiostage.storage.files import PartBuffers
from aiostage.testing import at_every_await
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.memory_storage import MANIFEST, MemoryReader, MemoryStorage
from tests.checkpoint.names import name_of
from tests.checkpoint.runs import MIB, LoRA, copied, numbers
from tests.checkpoint.test_checkpointer import Copier, Gate, settled, until


def test_parts_are_whole_blocks() -> None:
    assert PART_BYTES % BLOCK_BYTES == 0


def test_ranges_of_a_file_in_pieces() -> None:
    pieces = [Extent("a", "f", 100, 10), Extent(None, "g", 0, 0), Extent(None, "g", 0, 5), Extent("a", "f", 200, 10)]
    file = PlacedFile.of([], pieces)
    assert file.nbytes == 25
    assert list(file.located(0, 25)) == [pieces[0], pieces[2], pieces[3]]
    assert list(file.located(8, 16)) == [Extent("a", "f", 108, 2), pieces[2], Extent("a", "f", 200, 1)]
    assert list(file.located(24, 25)) == [Extent("a", "f", 209, 1)]
    assert list(file.located(7, 7)) == []
    joined: list[Extent] = []
    for piece in (Extent("a", "f", 0, 5), Extent("a", "f", 5, 5), Extent("b", "f", 10, 1)):
        append(joined, piece)
    assert joined == [Extent("a", "f", 0, 10), Extent("b", "f", 10, 1)]


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize("own", [False, True])
async def test_only_what_has_changed_is_written(own: bool) -> None:
    storage, model = MemoryStorage(), LoRA()
    kept = []
    async with Checkpointer(storage, Copier() if own else None, incremental=True) as checkpoints:
        for step in range(4):
            state = model.state_dict(step)
            if own:
                # A stager of one's own, which takes no deep copies.
                state = copied(state)
            await checkpoints.save(step, state)
            kept.append(copied(model.state_dict(step)))
            await settled(checkpoints)
            model.train()
    written = [storage.written_bytes[name_of(step)] for step in range(4)]
    total = sum(tensor.nbytes for branch in (model.tower, model.adapter) for tensor in branch.values())
    assert total <= written[0] <= total + 64 * 1024
    # The adapter is a quarter of a megabyte; blocks are what can be told apart.
    assert all(0 < nbytes <= 2 * BLOCK_BYTES for nbytes in written[1:]), written
    for step, state in enumerate(kept):
        assert_same(state, await checkpoints.restore(step=step))


@pytest.mark.asyncio
async def test_nothing_has_changed(tmp_path: Path) -> None:
    model = LoRA()
    async with Checkpointer(tmp_path, incremental=True) as checkpoints:
        for step in range(3):
            await checkpoints.save(step, model.state_dict(0))
    for step in (1, 2):
        assert [path.name for path in (tmp_path / name_of(step)).iterdir()] == [MANIFEST]
    manifest = json.loads((tmp_path / name_of(2) / MANIFEST).read_text())
    # References name where bytes lie, never another reference.
    assert {source for source, _, _ in manifest["sources"]} == {name_of(0)}
    assert_same(model.state_dict(0), await aiostage.load(tmp_path / name_of(2)))


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_everything_has_changed_and_much_of_it() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in range(2):
            state = {"large": numbers(20_000_000, step), "small": torch.tensor(step)}
            await (await checkpoints.save(step, state)).committed()
    # In files of limited size, so that no more than four of them are ever under way.
    sizes = {name: len(data) for name, data in storage.checkpoints[name_of(1)].items() if name != MANIFEST}
    assert sorted(sizes) == [f"model.safetensors.0000{n}" for n in (1, 2, 3)]
    assert max(sizes.values()) == 32 * MIB
    assert_same(state, await checkpoints.restore())


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize("max_host_bytes", [None, 96 * MIB])
async def test_what_has_changed_is_copied_only_where_it_has_to_be(
    max_host_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_bytes = 0

    def copy(group: _Group, data: Buffer, buffers: PartBuffers) -> None:
        nonlocal copied_bytes
        copied_bytes += len(data)
        original(group, data, buffers)

    original = _Group.copy
    monkeypatch.setattr(_Group, "copy", copy)
    storage = MemoryStorage()
    state = {"tower": numbers(100 * MIB // 4, 0), "step": torch.tensor(0)}
    async with (
        AsyncStager(StagingOptions(max_host_bytes=max_host_bytes)) as stager,
        Checkpointer(storage, stager, incremental=True) as checkpoints,
    ):
        await (await checkpoints.save(0, state)).committed()
        # Whole parts stay where they are until they are written, unless their memory is waited for. In the end four
        # blocks more are written: what is left of a file of which most was replaced.
        for step, (start, stop, changed, apart) in enumerate([(0, 100, 100, 4), (4, 70, 67, 11), (20, 30, 15, 15)], 1):
            state["tower"][start * MIB // 4 : stop * MIB // 4] += 1
            copied_bytes = 0
            info = await (await checkpoints.save(step, state)).committed()
            assert info.written_bytes // MIB == changed
            assert copied_bytes // MIB == (changed if max_host_bytes is not None else apart)
            assert_same(state, await checkpoints.restore())


@pytest.mark.asyncio
async def test_files_that_are_new_or_of_another_size() -> None:
    storage = MemoryStorage()
    states = [
        {"a": numbers(3 * MIB, 0)},
        {"a": numbers(3 * MIB, 0), "b": numbers(MIB, 1)},
        {"a": numbers(MIB, 0)},
        {},
        {"a": numbers(MIB, 0), "view": numbers(MIB, 2)[::2]},
    ]
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step, state in enumerate(states):
            await checkpoints.save(step, state)
    for step, state in enumerate(states):
        assert_same(state, await checkpoints.restore(step=step))


@pytest.mark.asyncio
async def test_a_run_goes_on_after_a_restart(tmp_path: Path) -> None:
    model = LoRA()
    for step in range(3):
        async with Checkpointer(tmp_path, incremental=True) as checkpoints:
            if step:
                assert_same(model.state_dict(step - 1), await checkpoints.restore())
            model.train()
            info = await (await checkpoints.save(step, model.state_dict(step))).committed()
    assert info.nbytes > 40 * MIB
    assert info.written_bytes == sum(path.stat().st_size for path in info.path.iterdir())
    assert info.written_bytes < 3 * MIB
    assert info.files == ("model.safetensors", MANIFEST)


@pytest.mark.asyncio
async def test_checkpoints_that_were_not_saved_so_are_written_anew(tmp_path: Path) -> None:
    model = LoRA()
    async with Checkpointer(tmp_path) as checkpoints:
        await checkpoints.save(0, model.state_dict(0))
    async with Checkpointer(tmp_path, incremental=True) as checkpoints:
        await checkpoints.save(1, model.state_dict(1))
        await checkpoints.save(2, model.state_dict(2))
    sizes = [sum(path.stat().st_size for path in (tmp_path / name_of(step)).iterdir()) for step in range(3)]
    assert sizes[1] >= sizes[0] > 40 * MIB > 3 * MIB > sizes[2]
    # And whole ones are readable for those who know nothing of pieces.
    assert json.loads((tmp_path / name_of(0) / MANIFEST).read_text())["version"] == 1


@pytest.mark.asyncio
async def test_saves_that_overlap() -> None:
    storage, model = MemoryStorage(), LoRA(3)
    kept = []
    async with AsyncStager() as stager, Checkpointer(storage, stager, incremental=True, keep=2, max_in_flight=3) as run:
        for step in range(9):
            await run.save(step, model.state_dict(step))
            kept.append(copied(model.state_dict(step)))
            model.train()
    assert await run.steps() == [7, 8]
    for step in (7, 8):
        assert_same(kept[step], await run.restore(step=step))


# ------------------------------------------------------------------------------------------------------------ damage


def without_a_source(storage: MemoryStorage) -> None:
    del storage.checkpoints[name_of(0)]


def source_without_its_file(storage: MemoryStorage) -> None:
    del storage.checkpoints[name_of(0)]["model.safetensors"]


def shorter_source(storage: MemoryStorage) -> None:
    files = storage.checkpoints[name_of(0)]
    files["model.safetensors"] = files["model.safetensors"][: 20 * MIB]


def other_bytes_in_the_source(storage: MemoryStorage) -> None:
    files = storage.checkpoints[name_of(0)]
    files["model.safetensors"] = files["model.safetensors"][: 20 * MIB] + bytes(
        len(files["model.safetensors"]) - 20 * MIB
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "damage", [without_a_source, source_without_its_file, shorter_source, other_bytes_in_the_source]
)
async def test_damaged_sources(damage: Callable[[MemoryStorage], None]) -> None:
    storage, model = MemoryStorage(), LoRA()
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in range(2):
            await checkpoints.save(step, model.state_dict(step))
            model.train()
    damage(storage)
    with pytest.raises(CheckpointCorruptError):
        await checkpoints.restore(step=1)


def change(text: str, old: str, new: str) -> bytes:
    assert old in text
    return text.replace(old, new, 1).encode()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step-00000000"', '"../step-00000000"'),
        ('"step-00000000"', '"/etc"'),
        ('"step-00000000"', "7"),
        ('"pieces":[[', '"pieces":[[-1'),
        ('"pieces":[[', '"pieces":[[9'),
        ('"model.safetensors",', '"../model.safetensors",'),
        ('"places":[', '"places":[['),
        ('"block_bytes":1048576', '"block_bytes":1048577'),
        ('"version":2', '"version":3'),
        ('"blocks":["', '"blocks":["","'),
    ],
)
@pytest.mark.parametrize("sound", [False, True])
async def test_hostile_manifests(old: str, new: str, sound: bool) -> None:
    storage, model = MemoryStorage(), LoRA(3)
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in range(2):
            await checkpoints.save(step, model.state_dict(step))
            model.train()
    files = storage.checkpoints[name_of(1)]
    changed = change(files[MANIFEST].decode(), old, new)
    if sound:
        # Also where the checksum is right.
        body = changed[: changed.rindex(b'],"digest":')]
        changed = body + b'],"digest":"%s"}\n' % xxhash.xxh3_64_hexdigest(body).encode()
    files[MANIFEST] = changed
    with pytest.raises(CheckpointCorruptError):
        await checkpoints.restore(step=1)


# ------------------------------------------------------------------------------------------------------ cancellation


@pytest.mark.asyncio
async def test_cancelled_at_every_await() -> None:
    storage, model = MemoryStorage(), LoRA(3)
    async with AsyncStager() as stager, Checkpointer(storage, stager, incremental=True) as checkpoints:
        await (await checkpoints.save(0, model.state_dict(0))).committed()
        rounds = 0

        async def save() -> None:
            nonlocal rounds
            rounds += 1
            await (await checkpoints.save(rounds, model.state_dict(rounds))).committed()

        async for _ in at_every_await(save):
            await settled(checkpoints)
            assert storage.under_way == []
            for step in await checkpoints.steps():
                assert (await checkpoints.restore(step=step))["step"] == step
    assert await checkpoints.latest() == rounds


@pytest.mark.asyncio
async def test_abandoned_in_the_middle_of_a_changed_file() -> None:
    storage = MemoryStorage()
    state = {"large": numbers(20_000_000, 0)}
    with anyio.CancelScope() as scope:
        async with Checkpointer(storage, incremental=True) as checkpoints:
            await (await checkpoints.save(0, state)).committed()
            state["large"].add_(1)
            gate = Gate(storage, "write")
            await checkpoints.save(1, state)
            await until(lambda: gate.waiting)
            scope.cancel()
    assert storage.under_way == []
    storage.before = None
    assert await checkpoints.steps() == [0]


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    model = LoRA()
    async with Checkpointer(LocalStorage(tmp_path), incremental=True, keep=1) as checkpoints:
        for step in range(3):
            await checkpoints.save(step, model.state_dict(step))
            await settled(checkpoints)
            model.train()
    loaded = await checkpoints.restore()
    assert loaded["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [name_of(0), f"{name_of(0)}.removed", name_of(2)]


class ReaderThatFailsToClose(MemoryReader):
    def __init__(self, storage: ClosingStorage, name: str) -> None:
        super().__init__(storage, name)
        self.storage = storage
        storage.open_readers += 1
        storage.others_opened |= name == name_of(0)

    async def aclose(self) -> None:
        self.storage.open_readers -= 1
        # As a cancellation at its first await does.
        if self.name == name_of(2) and self.storage.others_opened:
            raise OSError("the connection is lost")


class ClosingStorage(MemoryStorage):
    open_readers = 0
    others_opened = False

    async def read(self, name: str) -> Reader:
        await super().read(name)
        return ReaderThatFailsToClose(self, name)


@pytest.mark.asyncio
async def test_every_reader_is_closed_also_if_one_fails() -> None:
    storage, model = ClosingStorage(), LoRA()
    async with Checkpointer(storage, incremental=True) as checkpoints:
        for step in range(3):
            await (await checkpoints.save(step, model.state_dict(step))).committed()
    storage.others_opened = False
    with pytest.raises(OSError, match="connection is lost"):
        await aiostage.load((storage, name_of(2)))
    assert storage.open_readers == 0
