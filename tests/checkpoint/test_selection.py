from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import CheckpointMismatchError
from aiostage.leaf import Path as LeafPath
from aiostage.storage import LocalStorage
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.counting import CountingStorage

LARGE = 3_000_000
PART = 8 << 20


def tree(value: float = 2) -> dict[str, Any]:
    value = float(value)
    weight = torch.full((4,), value)
    return {
        "step": int(value),
        "model": {"layers": [{"weight": weight, "bias": torch.full((2,), value)} for _ in range(3)], "head": weight},
        "optimizer": OrderedDict(
            state={0: {"exp_avg": torch.full((4,), value)}}, groups=[{"lr": value, "params": [0, 1]}]
        ),
        "pair": ("name", value, ("inner", value)),
        "empty": {},
    }


async def saved(tmp_path: Path) -> Path:
    return (await aiostage.save(tree(), tmp_path / "checkpoint")).path


@pytest.mark.asyncio
async def test_patterns(tmp_path: Path) -> None:
    path = await saved(tmp_path)
    whole = tree()
    assert_same({"model": whole["model"]}, await aiostage.load(path, only="model"))
    assert_same({"model": whole["model"]}, await aiostage.load(path, only="model.*"))
    assert_same({"step": 2}, await aiostage.load(path, only=["step"]))
    assert_same({"model": {"head": whole["model"]["head"]}}, await aiostage.load(path, only="model.head"))
    assert_same(whole, await aiostage.load(path, only="*"))
    layers = [None, {"bias": whole["model"]["layers"][1]["bias"]}, None]
    assert_same({"model": {"layers": layers}}, await aiostage.load(path, only="*.1.bias"))
    found = await aiostage.load(path, only=["*.weight", "optimizer.state"])
    weights = [{"weight": layer["weight"]} for layer in whole["model"]["layers"]]
    assert_same({"model": {"layers": weights}, "optimizer": OrderedDict(state=whole["optimizer"]["state"])}, found)
    assert_same({"pair": (None, 2.0, None)}, await aiostage.load(path, only="pair.1"))


@pytest.mark.asyncio
async def test_a_function_of_a_path(tmp_path: Path) -> None:
    path = await saved(tmp_path)
    asked: list[LeafPath] = []

    def wanted(at: LeafPath) -> bool:
        asked.append(at)
        return at[-1] == "bias" or at == ("optimizer", "state", 0)

    whole = tree()
    found = await aiostage.load(path, only=wanted)
    layers = [{"bias": layer["bias"]} for layer in whole["model"]["layers"]]
    state = OrderedDict(state={0: whole["optimizer"]["state"][0]})
    assert_same({"model": {"layers": layers}, "optimizer": state}, found)
    assert ("model", "layers", 0, "weight") in asked
    # Below a selected part the function is not called.
    assert ("optimizer", "state", 0, "exp_avg") not in asked


@pytest.mark.asyncio
async def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    parts = {name: torch.full((LARGE,), float(n)) for n, name in enumerate("abcd")}
    await aiostage.save({"large": parts, "small": torch.ones(3)}, tmp_path / "checkpoint", max_shard_bytes=4 * LARGE)
    storage = CountingStorage(LocalStorage(tmp_path))
    found = await aiostage.load((storage, "checkpoint"), only="large.b")
    assert_same({"large": {"b": parts["b"]}}, found)
    # Its own file, and of the others what the headers are in.
    assert max(storage.read_bytes.values()) <= 4 * LARGE + 4096 + PART
    assert storage.read_bytes.total() <= 4 * LARGE + 5 * PART
    storage.read_bytes.clear()
    await aiostage.load((storage, "checkpoint"), only="large.b", verify=False)
    assert storage.read_bytes.total() < 4 * LARGE + 5 * 8192


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
async def test_into_a_live_tree(tmp_path: Path, in_place: bool) -> None:
    path = await saved(tmp_path)
    live = tree(1)
    await aiostage.load(path, into=live, only=["model.layers.1.*", "optimizer.groups", "pair.2"], in_place=in_place)
    expected = tree(1)
    expected["optimizer"]["groups"] = tree(2)["optimizer"]["groups"]
    expected["model"]["layers"][1]["bias"] = torch.full((2,), 2.0)
    # One memory under four names, of which one was wanted.
    expected["model"]["layers"][1]["weight"].fill_(2)
    assert live["model"]["head"].tolist() == [2] * 4
    assert live["step"] == 1
    assert live["pair"] == ("name", 1.0, ("inner", 2.0))
    assert live["optimizer"]["groups"] == expected["optimizer"]["groups"]
    assert_same(expected["model"], live["model"])


@pytest.mark.asyncio
async def test_what_either_side_lacks(tmp_path: Path) -> None:
    path = await saved(tmp_path)
    # What is not wanted may be missing on both sides.
    live: dict[str, Any] = {"model": {"head": torch.zeros(4)}, "mine": {"a": [torch.zeros(2)]}}
    await aiostage.load(path, into=live, only="model.head")
    assert live["model"]["head"].tolist() == [2] * 4
    with pytest.raises(CheckpointMismatchError) as caught:
        await aiostage.load(path, into=live, only=["model", "*.bias"])
    assert caught.value.unexpected == ("state_dict['model']['layers']",)
    with pytest.raises(CheckpointMismatchError) as caught:
        await aiostage.load(path, into={"model": {"head": torch.zeros(4), "tail": 1}}, only=["model"])
    assert caught.value.missing == ("state_dict['model']['tail']",)


@pytest.mark.asyncio
async def test_what_matches_nothing(tmp_path: Path) -> None:
    path = await saved(tmp_path)
    with pytest.raises(ValueError, match=r"'modle.\*' matches nothing .* step, model"):
        await aiostage.load(path, only=["modle.*", "step"])
    with pytest.raises(
        ValueError, match=f"selects nothing of the checkpoint {path}. Its first paths are step, model, "
    ):
        await aiostage.load(path, only=lambda at: False)
    with pytest.raises(ValueError, match="Its first paths are") as caught:
        await aiostage.load(path, only=["step", "model", "nothing"])
    examples = str(caught.value).partition("first paths are ")[2].removesuffix(".").split(", ")
    assert len(examples) == len(set(examples))
    torch.save({"a": {"b": 1}}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"selects nothing of the checkpoint .*file.pt. Its first paths are a, a.b."):
        await aiostage.load(tmp_path / "file.pt", only=lambda at: False)
    with pytest.raises(ValueError, match="None selects everything"):
        await aiostage.load(path, only=[])
    with pytest.raises(ValueError, match=r"'modle.\*' matches nothing .* step, model"):
        await aiostage.load(path, only="modle.*")
    for only in ([1], 1):
        with pytest.raises(TypeError, match="patterns or a function"):
            await aiostage.load(path, only=only)  # type: ignore[arg-type]
    await aiostage.save(torch.ones(1), tmp_path / "tensor")
    with pytest.raises(ValueError, match=r"selects parts of dicts.*tensor is none of these"):
        await aiostage.load(tmp_path / "tensor", only="*")


@pytest.mark.asyncio
async def test_circles_and_what_is_shared(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"x": torch.ones(1), "y": torch.zeros(1)}
    made: dict[str, Any] = {"first": shared, "second": {"again": shared, "z": torch.zeros(2)}}
    shared["up"] = made
    await aiostage.save(made, tmp_path / "checkpoint")
    found = await aiostage.load(tmp_path / "checkpoint", only="first.x")
    assert found["first"]["up"] is found
    assert found["second"]["again"] is found["first"]
    assert set(found["first"]) == {"x", "up"}
    assert set(found["second"]) == {"again"}
    deep: Any = [torch.ones(1)]
    for _ in range(3000):
        deep = [deep]
    await aiostage.save({"deep": deep, "flat": 1}, tmp_path / "deep")
    assert await aiostage.load(tmp_path / "deep", only="flat") == {"flat": 1}


@pytest.mark.asyncio
async def test_a_checkpointer_restores_parts_in_place(tmp_path: Path) -> None:
    live = tree(1)
    async with aiostage.Checkpointer(tmp_path) as checkpoints:
        await (await checkpoints.save(5, tree(2))).committed()
        await checkpoints.restore(live, only="model", in_place=True)
        assert live["model"]["head"].tolist() == [2] * 4
        assert live["step"] == 1
        assert await checkpoints.restore(step=5, only="step") == {"step": 2}


@dataclass
class Settings:
    rate: float


def changed_settings() -> type:
    """Return a class of the same name of which no object can be made from attributes."""
    return dataclass(type("Settings", (dict,), {"__module__": __name__, "__annotations__": {"rate": float}}))


@pytest.mark.asyncio
async def test_what_is_left_out_need_not_be_possible(tmp_path: Path) -> None:
    # The class has changed since the save, and no object of it can be made.
    await aiostage.save({"a": torch.ones(1), "b": Settings(0.5)}, tmp_path / "a")
    changed = changed_settings()
    with pytest.raises(aiostage.CheckpointError, match="not made of attributes alone"):
        await aiostage.load(tmp_path / "a", classes=[changed])
    assert list(await aiostage.load(tmp_path / "a", classes=[changed], only="a")) == ["a"]
