"""What other programs make of our files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import aiostage
import aiostage.blocking

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 10))
    found: dict[str, Any] = {"model": dict(model.state_dict()), "step": 7}
    found["dtypes"] = {str(dtype): (torch.arange(12) % 2).view(3, 4).to(dtype) for dtype in DTYPES}
    found["float8"] = torch.ones(5).to(torch.float8_e4m3fn)
    found["scales"] = torch.ones(5).to(torch.float8_e8m0fnu)
    found["float4"] = torch.arange(12, dtype=torch.uint8).view(2, 6).view(torch.float4_e2m1fn_x2)
    found["turned"] = torch.arange(6.0).view(2, 3).t()
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.asyncio
async def test_safetensors(tmp_path: Path) -> None:
    saved = state()
    info = await aiostage.save(saved, tmp_path / "checkpoint")
    path = info.path / "model.safetensors"
    assert_equal(load_file(path), flat(saved))
    assert_equal(flat(await aiostage.load(info.path)), flat(saved))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "writer": "aiostage"}
        assert torch.equal(file.get_slice("model.0.weight")[3:5], saved["model"]["0.weight"][3:5])


@pytest.mark.asyncio
async def test_shards_as_hubs_have_them(tmp_path: Path) -> None:
    saved = state()
    info = await aiostage.save(saved, tmp_path / "checkpoint", max_shard_bytes=1000)
    index = json.loads((info.path / "model.safetensors.index.json").read_text())
    expected = flat(saved)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    found: dict[str, torch.Tensor] = {}
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for shard in shards:
        loaded = load_file(info.path / shard)
        assert set(loaded) == {name for name, where in index["weight_map"].items() if where == shard}
        found |= loaded
    assert_equal(found, expected)


@pytest.mark.asyncio
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 1000])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
async def test_distributed_checkpoints_reader(tmp_path: Path, max_shard_bytes: int) -> None:
    # What this reader has no name for, though the format does.
    saved = {key: value for key, value in state().items() if key not in ("scales", "float4")}
    info = await aiostage.save(saved, tmp_path / "checkpoint", max_shard_bytes=max_shard_bytes)
    expected = flat(saved)
    found = {name: torch.zeros_like(tensor).contiguous() for name, tensor in expected.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(info.path)), no_dist=True)
    assert_equal(found, expected)


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
async def test_tied_tensors_have_one_name_for_distributed_checkpoints_reader(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    info = await aiostage.save({"embed": weight, "head": weight}, tmp_path / "checkpoint")
    live = {name: torch.zeros(6) for name in ("embed", "head")}
    with pytest.raises(dcp.CheckpointException, match=r"Missing key in checkpoint state_dict: head\."):
        dcp.load(live, storage_reader=HuggingFaceStorageReader(str(info.path)), no_dist=True)
    # What docs/checkpoints.md says to do.
    live["head"] = live["embed"]
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(live, storage_reader=HuggingFaceStorageReader(str(info.path)), planner=planner, no_dist=True)
    assert torch.equal(live["head"], weight)
    loaded = await aiostage.load(info.path)
    assert loaded["embed"] is loaded["head"]


def tied() -> dict[str, Any]:
    """Tied by identity and by memory, as views of a part, as a part of a part, and turned."""
    weight = torch.arange(12.0).view(3, 4)
    rows = torch.arange(30.0).view(5, 6)
    return {
        "embed": weight,
        "head": {"same": weight, "detached": weight.detach(), "turned": weight.t()},
        "list": [weight, torch.ones(2)],
        "upper": rows[:3],
        "lower": rows[2:],
        "column": rows[:, 1],
        "expanded": torch.ones(1).expand(3),
        "empty": (torch.zeros(0), torch.zeros(0)),
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 60])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
async def test_tied_tensors_under_each_of_their_names(tmp_path: Path, max_shard_bytes: int) -> None:
    saved = tied()
    once = await aiostage.save(saved, tmp_path / "once")
    info = await aiostage.save(saved, tmp_path / "each", max_shard_bytes=max_shard_bytes, duplicate_tied=True)
    assert (info.nbytes, info.leaves) == (once.nbytes, once.leaves)
    found: dict[str, torch.Tensor] = {}
    for path in info.path.glob("*.safetensors"):
        found |= load_file(path)
    expected = flat({**saved, "list": dict(enumerate(saved["list"])), "empty": dict(enumerate(saved["empty"]))})
    # What the tree refers to where no name stands for all of the memory.
    assert found.keys() - expected.keys() == {"expanded.storage", "upper.storage"}
    assert_equal({name: found[name] for name in expected}, expected)
    live = {name: torch.zeros_like(tensor).contiguous() for name, tensor in expected.items()}
    dcp.load(live, storage_reader=HuggingFaceStorageReader(str(info.path)), no_dist=True)
    assert_equal(live, expected)
    # They are tied for us, and tell what was done to the others.
    for loaded in (await aiostage.load(info.path), await aiostage.load(tmp_path / "once")):
        assert loaded["embed"] is loaded["head"]["same"] is loaded["list"][0]
        loaded["embed"].zero_()
        assert not loaded["head"]["turned"].any()
        assert not loaded["head"]["detached"].any()
        loaded["upper"][2] = -1
        assert torch.equal(loaded["lower"][0], torch.full((6,), -1.0))
        assert torch.equal(loaded["column"], torch.tensor([1.0, 7, -1, 19, 25]))
    into = tied()
    into["embed"].zero_()
    await aiostage.load(info.path, into=into)
    assert_equal(flat(into["head"]), flat(saved["head"]))


@pytest.mark.asyncio
@pytest.mark.parametrize("incremental", [False, True])
async def test_a_run_with_tied_tensors_under_each_of_their_names(incremental: bool, tmp_path: Path) -> None:
    options: Any = {"max_shard_bytes": 60, "duplicate_tied": True, "incremental": incremental}
    async with aiostage.Checkpointer(tmp_path, **options) as checkpoints:
        for step in range(2):
            await checkpoints.save(step, tied())
    await asyncio.to_thread(save_blocking, tmp_path / "blocking", options)
    for path in (tmp_path / "step-00000000", tmp_path / "blocking" / "step-00000000"):
        files = sorted(path.glob("*.safetensors"))
        assert len(files) > 1
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert torch.equal(found["head.turned"], found["embed"].t())
    loaded = await aiostage.load(tmp_path / "step-00000001")
    assert loaded["embed"] is loaded["head"]["same"]


def save_blocking(path: Path, options: Any) -> None:
    with aiostage.blocking.Checkpointer(path, **options) as checkpoints:
        checkpoints.save(0, tied())


@pytest.mark.asyncio
async def test_tied_tensors_that_pass_through_little_memory(tmp_path: Path) -> None:
    """Their bytes would be needed twice, and are there once."""
    weight = torch.ones(6 << 20)
    saved = {"first": torch.ones(6 << 20), "embed": weight, "head": weight}
    async with aiostage.AsyncStager(aiostage.StagingOptions(max_host_bytes=40 << 20)) as stager:
        await aiostage.save(saved, tmp_path / "once", stager=stager)
        with pytest.raises(aiostage.HostMemoryError, match="Raise max_host_bytes"):
            await aiostage.save(saved, tmp_path / "each", stager=stager, duplicate_tied=True)
    assert [path.name for path in tmp_path.iterdir()] == ["once"]
