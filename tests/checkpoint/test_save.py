from __future__ import annotations

import asyncio
import gc
import json
import os
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import xxhash
from safetensors.torch import load_file

import aiostage
from aiostage import AsyncStager, CheckpointExistsError, CheckpointStager
from aiostage.checkpoint import convert
from aiostage.checkpoint.progress import SaveProgress
from aiostage.testing import at_every_await
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.leftovers import OWN, nothing_left


def tree(step: int = 1) -> dict[str, Any]:
    layers = {f"layer{n}": torch.full((50,), float(step + n)) for n in range(4)}
    return {"step": step, "layers": layers, "turned": torch.full((3, 2), step).t()}


async def step_at(target: Path) -> int:
    """Return the step of the checkpoint at a place, after checking that it is whole and alone there."""
    loaded = await aiostage.load(target)
    assert_same(tree(loaded["step"]), loaded)
    assert os.listdir(target.parent) == [target.name]
    return int(loaded["step"])


@pytest.mark.asyncio
async def test_info(tmp_path: Path) -> None:
    info = await aiostage.save(tree(), tmp_path / "checkpoint")
    assert info.path == tmp_path / "checkpoint"
    assert (info.nbytes, info.leaves) == (4 * 200 + 48, 5)
    assert info.files == ("model.safetensors", "manifest.json")
    assert sorted(info.files) == sorted(os.listdir(info.path))
    assert info.written_bytes == sum((info.path / name).stat().st_size for name in info.files)
    for name in info.files:
        assert info.checksums[name] == f"xxh3_64:{xxhash.xxh3_64_hexdigest((info.path / name).read_bytes())}"
    assert 0 < info.captured <= info.committed
    # Nothing is captured of a tree that was loaded for this.
    converted = await convert(info.path, tmp_path / "again")
    assert (converted.captured, converted.checksums) == (0, info.checksums)


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    source = tree()
    await aiostage.save(source, tmp_path / "checkpoint")
    await aiostage.save(tree(2), tmp_path / "checkpoint", overwrite=True)
    await aiostage.load(tmp_path / "checkpoint", into=source)
    assert_same(tree(2), source)


@pytest.mark.anyio
async def test_cancelled_on_trio(tmp_path: Path) -> None:
    with nothing_left():
        with anyio.CancelScope() as scope:
            await aiostage.save(tree(), tmp_path / "checkpoint", progress=lambda _: scope.cancel())
        assert scope.cancelled_caught
    assert not os.listdir(tmp_path)


@pytest.mark.asyncio
async def test_one_file_opens_elsewhere(tmp_path: Path) -> None:
    source = tree()
    info = await aiostage.save(source, tmp_path / "checkpoint")
    found = load_file(info.path / "model.safetensors")
    assert {f"layers.{name}" for name in source["layers"]} | {"turned"} == set(found)
    assert all(torch.equal(found[f"layers.{name}"], tensor) for name, tensor in source["layers"].items())
    assert torch.equal(found["turned"], source["turned"])


@pytest.mark.asyncio
async def test_shards_and_index_open_elsewhere(tmp_path: Path) -> None:
    source = tree() | {"large": torch.arange(1000)}
    info = await aiostage.save(source, tmp_path / "checkpoint", max_shard_bytes=450)
    index = json.loads((info.path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": info.nbytes}
    shards = [name for name in info.files if name.endswith(".safetensors")]
    assert shards == [f"model-{n:05}-of-00004.safetensors" for n in range(1, 5)]
    assert info.files == (*shards, "model.safetensors.index.json", "manifest.json")
    found: dict[str, torch.Tensor] = {}
    for name in shards:
        tensors = load_file(info.path / name)
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 450 or set(tensors) == {"large"}
        found |= tensors
    assert set(found) == set(index["weight_map"])
    assert torch.equal(found["large"], source["large"])
    assert_same(source, await aiostage.load(info.path))


@pytest.mark.asyncio
@pytest.mark.parametrize("limit", [0, -1])
async def test_shards_need_room(limit: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be an integer of at least 1"):
        await aiostage.save(tree(), tmp_path / "checkpoint", max_shard_bytes=limit)


@pytest.mark.asyncio
async def test_many_small_tensors(tmp_path: Path) -> None:
    source = {f"p{n}": torch.full((n % 5,), n) for n in range(3000)}
    info = await aiostage.save(source, tmp_path / "checkpoint")
    assert info.leaves == 3000
    loaded = await aiostage.load(info.path)
    assert list(loaded) == list(source)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.items())


@pytest.mark.asyncio
async def test_files_of_several_parts(tmp_path: Path) -> None:
    source = {"large": torch.arange(5_000_000, dtype=torch.int32), "turned": torch.arange(10**6).view(1000, -1).t()}
    info = await aiostage.save(source, tmp_path / "checkpoint")
    assert torch.equal(load_file(info.path / "model.safetensors")["turned"], source["turned"])
    assert_same(source, await aiostage.load(info.path))


@pytest.mark.asyncio
async def test_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    await aiostage.save(tree(), tmp_path / "checkpoint")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "directory", "empty", "checkpoint"):
        # What overwrites nothing but checkpoints is no advice elsewhere.
        advice = "overwrite=True" if name in ("empty", "checkpoint") else "not a checkpoint .* remove what is there"
        with pytest.raises(CheckpointExistsError, match=advice) as caught:
            await aiostage.save(tree(2), tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
        assert isinstance(caught.value, FileExistsError)
    for name in ("file", "directory"):
        with pytest.raises(CheckpointExistsError, match="not a checkpoint"):
            await aiostage.save(tree(2), tmp_path / name, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "text"
    await aiostage.save(tree(3), tmp_path / "empty", overwrite=True)
    assert (await aiostage.load(tmp_path / "empty"))["step"] == 3


@pytest.mark.asyncio
async def test_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "checkpoint"
    for step in range(3):
        info = await aiostage.save(tree(step), target, overwrite=True, max_shard_bytes=1000 - step * 400)
        assert await step_at(target) == step
        assert sorted(info.files) == sorted(os.listdir(target))


@pytest.mark.asyncio
async def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/checkpoint")
    info = await aiostage.save(tree(1), tmp_path / "link")
    assert info.path == tmp_path / "real" / "checkpoint"
    await aiostage.save(tree(2), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert await step_at(tmp_path / "real" / "checkpoint") == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "sp ace\n", "-", ".hidden"])
async def test_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    info = await aiostage.save(tree(), name)
    await aiostage.save(tree(2), os.path.join(".", name), overwrite=True)
    assert info.path == tmp_path / name
    assert await step_at(tmp_path / name) == 2


@pytest.mark.asyncio
async def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with nothing_left(), pytest.raises(OSError, match="file"):
        await aiostage.save(tree(), tmp_path / "file" / "below" / "checkpoint")


@pytest.mark.asyncio
async def test_progress(tmp_path: Path) -> None:
    seen: list[SaveProgress] = []
    source = {"large": torch.zeros(6_000_000), "small": torch.zeros(3)}
    info = await aiostage.save(source, tmp_path / "checkpoint", max_shard_bytes=1000, progress=seen.append)
    written = [progress.written_bytes for progress in seen]
    assert written == sorted(written)
    assert len(written) > 2
    assert {progress.total_bytes for progress in seen} == {written[-1]}
    assert written[-1] == sum((info.path / name).stat().st_size for name in info.files[:-1])


@pytest.mark.asyncio
async def test_what_progress_raises_ends_the_save(tmp_path: Path) -> None:
    def refuse(progress: SaveProgress) -> None:
        raise LookupError("enough")

    with nothing_left(), pytest.raises(LookupError, match="enough"):
        await aiostage.save(tree(), tmp_path / "checkpoint", progress=refuse)
    assert not os.listdir(tmp_path)


@pytest.mark.asyncio
async def test_the_source_may_change_while_it_is_written(tmp_path: Path) -> None:
    source = tree()

    def change(progress: SaveProgress) -> None:
        source["step"] = 7
        source["turned"].zero_()

    await aiostage.save(source, tmp_path / "checkpoint", max_shard_bytes=100, progress=change)
    assert source["step"] == 7
    assert await step_at(tmp_path / "checkpoint") == 1


class Meddler(CheckpointStager):
    """Takes no copy, but puts something where the checkpoint is to be."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def appear(self) -> None:
        self.target.mkdir()
        (self.target / "theirs").touch()

    async def stage(self, state_dict: Any) -> Any:
        await anyio.to_thread.run_sync(self.appear)
        return state_dict

    async def aclose(self) -> None:
        raise AssertionError("a stager of the caller's is not closed")


@pytest.mark.asyncio
@pytest.mark.parametrize("overwrite", [False, True])
async def test_a_target_that_appears_meanwhile(overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with pytest.raises(CheckpointExistsError):
        await aiostage.save(tree(), target, stager=Meddler(target), overwrite=overwrite)
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert os.listdir(target) == ["theirs"]


@pytest.mark.asyncio
async def test_saves_to_one_place_at_once(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    saves = [aiostage.save(tree(step), target) for step in range(5)]
    outcomes = await asyncio.gather(*saves, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["CheckpointExistsError"] * 4 + ["CheckpointInfo"]
    first = await step_at(target)
    assert isinstance(outcomes[first], aiostage.CheckpointInfo)
    await asyncio.gather(*(aiostage.save(tree(step), target, overwrite=True) for step in range(5)))
    await step_at(target)


@pytest.mark.asyncio
async def test_a_stager_of_ones_own(tmp_path: Path) -> None:
    async with AsyncStager() as stager:
        for step in range(3):
            gc.disable()
            await aiostage.save(tree(step), tmp_path / "checkpoint", stager=stager, overwrite=True)
            # At once, not when the collector comes.
            assert stager.statistics().leases == 0
            gc.enable()
        assert stager.statistics().arenas == 1
        assert await step_at(tmp_path / "checkpoint") == 2
        async with stager.snapshot(tree(3)) as snapshot:
            await aiostage.save(snapshot, tmp_path / "checkpoint", overwrite=True)
        assert await step_at(tmp_path / "checkpoint") == 3


@pytest.mark.asyncio
@pytest.mark.parametrize("overwrite", [False, True])
async def test_cancelled_at_every_await(overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"

    async def save() -> None:
        await aiostage.save(tree(2), target, overwrite=overwrite, max_shard_bytes=500, progress=lambda _: None)

    async def check() -> bool:
        if overwrite or os.listdir(tmp_path):
            return await step_at(target) == 2
        return False

    if overwrite:
        await aiostage.save(tree(1), target)
    committed = []
    with nothing_left():
        async with aclosing(at_every_await(save)) as rounds:
            async for _ in rounds:
                # The cancellation, which is still being handled, keeps the staged memory.
                with nothing_left(OWN):
                    committed.append(await check())
                if committed[-1]:
                    break
    assert len(committed) > 8
    assert not any(committed[:-1])


@pytest.mark.asyncio
async def test_convert_cancelled_at_every_await(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    source = (await aiostage.save(tree(2), tmp_path / "from" / "checkpoint")).path
    numbers = []
    async for number in at_every_await(lambda: convert(source, tmp_path / "to" / "checkpoint", overwrite=True)):
        numbers.append(number)
        if (tmp_path / "to").exists():
            assert set(os.listdir(tmp_path / "to")) <= {"checkpoint"}
    assert len(numbers) > 8
    assert await step_at(tmp_path / "to" / "checkpoint") == 2


@pytest.mark.asyncio
async def test_many_saves_leave_nothing_behind(tmp_path: Path) -> None:
    with nothing_left():
        for step in range(20):
            await aiostage.save(tree(step), tmp_path / "checkpoint", overwrite=True)
            await aiostage.load(tmp_path / "checkpoint")
    assert os.listdir(tmp_path) == ["checkpoint"]


class CopiesItself:
    """Copied by its own code, which may look at tensors, and of no kind that a file can carry."""

    def __deepcopy__(self, memo: object) -> CopiesItself:
        return CopiesItself()


@pytest.mark.asyncio
@pytest.mark.parametrize("odd", [object(), CopiesItself()], ids=["written as it lands", "written when captured"])
async def test_a_task_that_has_failed_keeps_no_memory(odd: object, tmp_path: Path) -> None:
    async with AsyncStager() as stager:
        gc.disable()
        try:
            # The task refers to its error, that to the frames, and this frame to the task: only the collector ends it.
            task = asyncio.ensure_future(aiostage.save({"a": torch.ones(3), "b": odd}, tmp_path / "a", stager=stager))
            with pytest.raises(aiostage.UnsupportedLeafError):
                await task
            assert stager.statistics().leases == 0
        finally:
            gc.enable()
