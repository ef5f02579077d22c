"""DCP's checkpoints in our storages."""

from __future__ import annotations

import asyncio
import io
import os
import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import obstore
import pytest
import torch
import torch.distributed as dist
from obstore.store import S3Store
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

import aiostage
from aiostage import AsyncStager, CheckpointCorruptError, RankFailedError, dcp
from aiostage.abc import Reader, Storage
from aiostage.storage import LocalStorage, ObjectStorage
from tests.dcp import models
from tests.dcp.test_together import TIMEOUT, Counter, groups, sharded
from tests.dcp.world import World
from tests.servers.s3 import open_uploads
from tests.servers.weed import BUCKET, S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

EVERYTHING = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "bfloat16": torch.randn(7, dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "complex": torch.randn(3, dtype=torch.complex64).conj(),
    "strided": torch.randn(30, 40).t(),
    "large": torch.randn(3_000_000),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "nested": {"step": 3, "name": "a", "list": [1, torch.arange(5)]},
}


@dataclass
class Odd:
    """A value that takes code to be made."""

    number: int


class CountingStorage(LocalStorage):
    """Knows which of its readers are open."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.readers: list[Reader] = []
        self.closed: list[Reader] = []

    async def read(self, name: str) -> Reader:
        reader = await super().read(name)
        close = reader.aclose

        async def aclose() -> None:
            self.closed.append(reader)
            await close()

        reader.aclose = aclose  # type: ignore[method-assign]
        self.readers.append(reader)
        return reader


def empty_like(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return torch.zeros(tree.shape, dtype=tree.dtype)
    if isinstance(tree, dict):
        return {key: empty_like(value) for key, value in tree.items()}
    return [empty_like(value) for value in tree] if isinstance(tree, list) else None


@pytest.mark.asyncio
class TestAlone:
    @pytest.mark.parametrize("face", ["aiostage", "torch"])
    async def test_a_reader_is_closed_however_the_load_ends(self, tmp_path: Path, face: str) -> None:
        await dcp.save({"a": torch.ones(3)}, checkpoint_id="a", storage_writer=dcp.StorageWriter(tmp_path))
        storage = CountingStorage(tmp_path)
        reader = dcp.StorageReader(storage)

        async def load(state: dict[str, Any]) -> None:
            if face == "aiostage":
                await dcp.load(state, checkpoint_id="a", storage_reader=reader)
            else:
                await asyncio.to_thread(checkpoint.load, state, checkpoint_id="a", storage_reader=reader)

        await load({"a": torch.zeros(3)})
        # A key that the checkpoint does not have: planning fails, before anything is read.
        with pytest.raises(CheckpointException):
            await load({"b": torch.zeros(3)})
        (tmp_path / "a" / "rank-00000.bin").write_bytes(bytes(12))
        with pytest.raises(CheckpointException):
            await load({"a": torch.zeros(3)})
        if face == "torch":
            # PyTorch tells a reader nothing of the end. The next load closes what the last has left open.
            await asyncio.to_thread(reader.reset, "a")
        assert len(storage.readers) >= 3
        assert set(storage.closed) == set(storage.readers)

    @pytest.mark.parametrize("kind", ["local", "memory"])
    async def test_everything(self, tmp_path: Path, kind: str) -> None:
        root = tmp_path if kind == "local" else f"memory://{tmp_path.name}/{os.getpid()}"
        async with AsyncStager() as stager:
            writer = dcp.StorageWriter(root)
            await dcp.save(EVERYTHING, checkpoint_id="a", storage_writer=writer, stager=stager)
            # Staged memory is not kept by what was written from it.
            assert stager.statistics().leases == 0
        into = empty_like(EVERYTHING)
        await dcp.load(into, checkpoint_id="a", storage_reader=dcp.StorageReader(root))
        assert not list(models.compare(EVERYTHING, into, ""))
        assert into["nested"]["name"] == "a"
        plain = empty_like(EVERYTHING)
        plainly = partial(checkpoint.load, checkpoint_id="a", storage_reader=dcp.StorageReader(root), no_dist=True)
        await asyncio.to_thread(plainly, plain)
        assert not list(models.compare(EVERYTHING, plain, ""))

    async def test_keys_that_are_no_text(self, tmp_path: Path) -> None:
        """Also with PyTorch's own load and planner, which put values under the text of their keys."""
        values = {"a": {3: {"x": [1, {7: "seven"}], 4: torch.ones(2)}, "b": 5, (1, 2): None}, "n": Odd(3)}
        await dcp.save(values, checkpoint_id="a", storage_writer=dcp.StorageWriter(tmp_path))

        class Own(DefaultLoadPlanner):
            names: ClassVar[list[str]] = []

            def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
                self.names.append(read_item.dest_index.fqn)
                super().load_bytes(read_item, value)

        for planner in (None, DefaultLoadPlanner(), Own()):
            live = {"a": {3: {"x": [0, {7: ""}], 4: torch.zeros(2)}, "b": 0, (1, 2): 0}, "n": Odd(0)}
            reader = dcp.StorageReader(tmp_path)
            plainly = partial(checkpoint.load, checkpoint_id="a", storage_reader=reader, planner=planner, no_dist=True)
            await asyncio.to_thread(plainly, live)
            nested = live["a"]
            assert nested[3][4].tolist() == [1, 1]  # type: ignore[index]
            if isinstance(planner, Own):
                # One with code of its own decides for itself.
                assert "a.3.x.1.7" in planner.names
                continue
            assert nested == {3: {"x": [1, {7: "seven"}], 4: nested[3][4]}, "b": 5, (1, 2): None}  # type: ignore[index]
            # As DCP's planner does, it runs the code that values name.
            assert live["n"] == Odd(3)
            await dcp.save(live, checkpoint_id="b", storage_writer=dcp.StorageWriter(tmp_path, overwrite=True))

    async def test_appears_whole_and_replaces_in_one_step(self, tmp_path: Path) -> None:
        for number in range(3):
            writer = dcp.StorageWriter(tmp_path, overwrite=True)
            await dcp.save({"n": torch.full((5,), number)}, checkpoint_id="a", storage_writer=writer)
            into = {"n": torch.zeros(5, dtype=torch.int64)}
            await dcp.load(into, checkpoint_id="a", storage_reader=dcp.StorageReader(tmp_path))
            assert into["n"].unique().tolist() == [number]
        assert await LocalStorage(tmp_path).list() == ["a"]
        assert sorted(os.listdir(tmp_path)) == ["a"]
        with pytest.raises(RankFailedError, match="CheckpointExistsError"):
            await dcp.save({}, checkpoint_id="a", storage_writer=dcp.StorageWriter(tmp_path))

    async def test_a_failed_save_leaves_nothing(self, tmp_path: Path) -> None:
        writer = dcp.StorageWriter(tmp_path, overwrite=True)
        await dcp.save({"n": torch.ones(5)}, checkpoint_id="a", storage_writer=writer)

        class Breaks(DefaultSavePlanner):
            def resolve_data(self, write_item: Any) -> Any:
                raise OSError(5, "Input/output error")

        with pytest.raises(RankFailedError, match="Input/output error"):
            await dcp.save({"n": torch.zeros(5)}, checkpoint_id="a", storage_writer=writer, planner=Breaks())
        assert os.listdir(tmp_path) == ["a"]
        into = {"n": torch.zeros(5)}
        await dcp.load(into, checkpoint_id="a", storage_reader=dcp.StorageReader(tmp_path))
        assert into["n"].sum() == 5

    async def test_damage_is_found(self, tmp_path: Path) -> None:
        await dcp.save({"n": torch.ones(5000)}, checkpoint_id="a", storage_writer=dcp.StorageWriter(tmp_path))
        for file in ("rank-00000.bin", ".metadata"):
            path = tmp_path / "a" / file
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(RankFailedError, match="not those that were written"):
                await dcp.load({"n": torch.ones(5000)}, checkpoint_id="a", storage_reader=dcp.StorageReader(tmp_path))
            path.write_bytes(whole)

    async def test_is_none_of_dcps(self, tmp_path: Path) -> None:
        await aiostage.save({"n": torch.ones(5)}, tmp_path / "ours")
        for name, reason in (("ours", "not a checkpoint of aiostage.dcp"), ("none", "there is no checkpoint")):
            with pytest.raises(RankFailedError, match=reason):
                await dcp.load({"n": torch.ones(5)}, checkpoint_id=name, storage_reader=dcp.StorageReader(tmp_path))
        await dcp.save({"n": torch.ones(5)}, checkpoint_id="dcp", storage_writer=dcp.StorageWriter(tmp_path))
        with pytest.raises(CheckpointCorruptError):
            await aiostage.load(tmp_path / "dcp")

    async def test_refuses(self, tmp_path: Path) -> None:
        class Private(Storage):
            open = read = list = pending = delete = clean_up = None  # type: ignore[assignment]

        with pytest.raises(TypeError, match="is not a MultiWriterStorage"):
            dcp.StorageWriter(Private())  # type: ignore[abstract]
        with pytest.raises(RankFailedError, match="needs a name: pass checkpoint_id"):
            await dcp.save({}, storage_writer=dcp.StorageWriter(tmp_path))
        # DCP keeps plans for each name of a class, as long as the process lives.
        caching: Any = type(f"Caching{tmp_path.name}", (DefaultSavePlanner,), {})
        planner = partial(caching, enable_plan_caching=True)
        writer = dcp.StorageWriter(tmp_path)
        await dcp.save({"n": torch.ones(5)}, checkpoint_id="a", storage_writer=writer, planner=planner())
        with pytest.raises(RankFailedError, match="enable_plan_caching=False"):
            await dcp.save({"n": torch.ones(5)}, checkpoint_id="b", storage_writer=writer, planner=planner())
        assert os.listdir(tmp_path) == ["a"]


async def saved_by_both(root: str) -> int:
    state = {"sharded": sharded(), "counter": Counter(4), "step": 3, "mine": torch.full((9,), float(dist.get_rank()))}
    await dcp.save(state, checkpoint_id="a/b", storage_writer=dcp.StorageWriter(root), timeout=TIMEOUT)
    # Plain DCP by the same writer.
    checkpoint.save(state, checkpoint_id="plain", storage_writer=dcp.StorageWriter(root))
    for name in ("a/b", "plain"):
        into = {"sharded": sharded(100), "counter": Counter(0), "step": 0}
        await dcp.load(into, checkpoint_id=name, storage_reader=dcp.StorageReader(root), timeout=TIMEOUT)
        assert torch.equal(into["sharded"].to_local(), state["sharded"].to_local())  # type: ignore[attr-defined]
        assert into["counter"].count == 4  # type: ignore[attr-defined]
        assert into["step"] == 3
    return len(groups())


class BreaksOnOne(DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(5, "Input/output error")
        return super().resolve_data(write_item)


async def one_fails(root: str) -> str:
    writer = dcp.StorageWriter(root, overwrite=True)
    with pytest.raises(RankFailedError) as raised:
        await dcp.save(
            {"sharded": sharded(7)}, checkpoint_id="a/b", storage_writer=writer, planner=BreaksOnOne(), timeout=TIMEOUT
        )
    dist.barrier()
    into = {"sharded": sharded(100)}
    await dcp.load(into, checkpoint_id="a/b", storage_reader=dcp.StorageReader(root), timeout=TIMEOUT)
    assert torch.equal(into["sharded"].to_local(), sharded().to_local())
    return str(raised.value)


def test_two_ranks_write_one_checkpoint(pair: World, tmp_path: Path) -> None:
    pair.run(saved_by_both, str(tmp_path))
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [
        ".metadata",
        "manifest.json",
        "rank-00000.bin",
        "rank-00001.bin",
    ]
    for message in pair.run(one_fails, str(tmp_path)):
        assert message.startswith("rank 1 failed: OSError: [Errno 5] Input/output error")
    assert os.listdir(tmp_path / "a") == ["b"], "a failed save leaves something behind"


def storage_of(options: dict[str, Any], prefix: str) -> ObjectStorage:
    return ObjectStorage(S3Store(BUCKET, prefix=prefix, **options))


async def to_s3(options: dict[str, Any], prefix: str) -> None:
    state = {"sharded": sharded(), "mine": torch.full((5_000_000,), float(dist.get_rank())), "step": 3}
    async with AsyncStager() as stager:
        writer = dcp.StorageWriter(storage_of(options, prefix), overwrite=True)
        saving = dcp.start_save(state, checkpoint_id="latest", storage_writer=writer, stager=stager, timeout=TIMEOUT)
        await saving.captured()
        state["sharded"].to_local().zero_()  # type: ignore[attr-defined]
        await saving.committed()
        assert stager.statistics().leases == 0
    into = {"sharded": sharded(100), "step": 0}
    reader = dcp.StorageReader(storage_of(options, prefix))
    await dcp.load(into, checkpoint_id="latest", storage_reader=reader, timeout=TIMEOUT)
    assert torch.equal(into["sharded"].to_local(), sharded().to_local())  # type: ignore[attr-defined]
    assert into["step"] == 3
    # One rank fails: the checkpoint of before is there, and nothing else.
    with pytest.raises(RankFailedError):
        await dcp.save(
            {"sharded": sharded(7)},
            checkpoint_id="latest",
            storage_writer=writer,
            planner=BreaksOnOne(),
            timeout=TIMEOUT,
        )
    into = {"sharded": sharded(100)}
    await dcp.load(into, checkpoint_id="latest", storage_reader=reader, timeout=TIMEOUT)
    assert torch.equal(into["sharded"].to_local(), sharded().to_local())


@pytest.mark.slow
def test_two_ranks_to_s3(pair: World, s3_server: S3Server) -> None:
    prefix = secrets.token_hex(4)
    pair.run(to_s3, s3_server.options(), prefix)
    store = S3Store(BUCKET, prefix=prefix, **s3_server.options())
    paths = sorted(meta["path"] for batch in obstore.list(store) for meta in batch)
    assert len({path.split("/")[1] for path in paths if "/data-" in path}) == 1, paths
    assert sum(path.endswith(".bin") for path in paths) == 2
    assert open_uploads(s3_server, prefix) == []
