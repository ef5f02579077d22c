from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

import aiostage
from aiostage import UnsupportedLeafError
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.trees import DTYPES, OPAQUE_DTYPES, not_strided, of_bytes, trees


async def there_and_back(tree: Any, target: Path) -> Any:
    await aiostage.save(tree, target, overwrite=True)
    return await aiostage.load(target)


@pytest.mark.one_loop
@pytest.mark.asyncio
@given(tree=trees())
async def test_any_tree(tree: Any, tmp_path: Path) -> None:
    assert_same(tree, await there_and_back(tree, tmp_path / "checkpoint"))


@pytest.mark.one_loop
@pytest.mark.asyncio
@given(tree=trees())
async def test_any_tree_in_many_files_without_staging(tree: Any, tmp_path: Path) -> None:
    await aiostage.save(tree, tmp_path / "checkpoint", overwrite=True, max_shard_bytes=64)
    assert_same(tree, await aiostage.load(tmp_path / "checkpoint"))


@pytest.mark.asyncio
async def test_every_dtype(tmp_path: Path) -> None:
    data = bytes(range(240))
    dtypes = [*DTYPES, *OPAQUE_DTYPES]
    tree = {str(dtype): [of_bytes(data, dtype), of_bytes(data, dtype)[: 240 // dtype.itemsize : 3]] for dtype in dtypes}
    tree |= {f"{dtype} turned": [of_bytes(data[:192], dtype).view(4, -1).t()] for dtype in dtypes}
    assert_same(tree, await there_and_back(tree, tmp_path / "checkpoint"))


@pytest.mark.asyncio
async def test_layouts_that_are_not_one_piece_of_memory(tmp_path: Path) -> None:
    tree = {"all": not_strided(), "bsr": torch.eye(4).to_sparse_bsr((2, 2)), "bsc": torch.eye(4).to_sparse_bsc((2, 2))}
    assert_same(tree, await there_and_back(tree, tmp_path / "checkpoint"))


@pytest.mark.asyncio
async def test_a_shared_part_of_a_sparse_tensor_stays_shared(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    loaded = await there_and_back({"sparse": sparse, "values": sparse._values()}, tmp_path / "checkpoint")
    loaded["values"].fill_(7)
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3) * 7)


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS, torch.optim.Adagrad]
)
async def test_a_module_and_its_optimizer_train_on(optimizer_class: type[Any], tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
        return model, optimizer_class(model.parameters(), lr=0.01)

    def train(model: torch.nn.Module, optimizer: Any) -> None:
        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = model(torch.arange(50.0).view(2, 1, 5, 5)).square().mean()
            value.backward()
            return value

        optimizer.step(loss)

    model, optimizer = make()
    train(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    loaded = await there_and_back(state, tmp_path / "checkpoint")
    assert_same(state["optimizer"], loaded["optimizer"])
    assert loaded["model"]._metadata == state["model"]._metadata
    again, optimizer_again = make()
    again.load_state_dict(loaded["model"])
    optimizer_again.load_state_dict(loaded["optimizer"])
    for _ in range(2):
        train(model, optimizer)
        train(again, optimizer_again)
    assert_same(model.state_dict(), again.state_dict())


@pytest.mark.asyncio
async def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    state = {"embedding": embedding.state_dict(), "head": head.state_dict(), "parameter": head.weight}
    info = await aiostage.save(state, tmp_path / "checkpoint")
    assert (info.nbytes, info.leaves) == (60, 3)
    loaded = await aiostage.load(tmp_path / "checkpoint")
    assert_same(state, loaded)
    assert loaded["embedding"]["weight"].data_ptr() == loaded["parameter"].data_ptr()


@pytest.mark.asyncio
async def test_a_view_of_much_memory_saves_what_it_shows(tmp_path: Path) -> None:
    base = torch.arange(1_000_000.0)
    tree = {"few": base[10:20], "wide": base[::100_000], "column": base.view(1000, 1000)[:3, 0]}
    await aiostage.save({"few": tree["few"]}, tmp_path / "few")
    assert sum(file.stat().st_size for file in (tmp_path / "few").iterdir()) < 10_000
    assert_same(tree, await there_and_back(tree, tmp_path / "all"))


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_cycles_and_depth(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"list": [], "tensor": torch.ones(2)}
    tree["list"] += [tree, (tree["list"],), tree["tensor"]]
    tree["tensor"].back = tree  # type: ignore[attr-defined]
    deep: list[Any] = []
    tree["deep"] = deep
    for _ in range(20_000):
        deep.append([])
        deep = deep[0]
    deep.append(torch.tensor(3))
    loaded = await there_and_back(tree, tmp_path / "checkpoint")
    assert loaded["list"][0] is loaded
    assert loaded["list"][1][0] is loaded["list"]
    assert loaded["list"][2] is loaded["tensor"]
    assert loaded["tensor"].back is loaded
    deep = loaded["deep"]
    for _ in range(20_000):
        (deep,) = deep
    assert deep[0] == 3


@pytest.mark.asyncio
@pytest.mark.parametrize("tree", [None, 3, math.inf, "text", [], {}, torch.tensor(1.5), torch.empty(0, 2)], ids=repr)
async def test_a_root_may_be_anything(tree: Any, tmp_path: Path) -> None:
    assert_same(tree, await there_and_back(tree, tmp_path / "checkpoint"))


@pytest.mark.asyncio
async def test_keys_that_name_tensors_alike(tmp_path: Path) -> None:
    tree = {
        "a": {"b": torch.tensor(1)},
        "a.b": torch.tensor(2),
        "": torch.tensor(3),
        "__metadata__": torch.tensor(4),
        1: torch.tensor(5),
        "1": torch.tensor(6),
        None: {"x" * 10_000: torch.tensor(7)},
        "\ud800": torch.tensor(8),
        (1, "two"): torch.tensor(9),
        "/../..\0\n": torch.tensor(10),
    }
    assert_same(tree, await there_and_back(tree, tmp_path / "checkpoint"))


class Plain:
    def __init__(self) -> None:
        self.x = 1


class Text(str):
    __slots__ = ()


REFUSED: dict[str, Any] = {
    "an object": Plain(),
    "a subclass of str": Text("x"),
    "a subclass of dict": type("Mine", (dict,), {})(a=1),
    "a function": math.sqrt,
    "a class": Plain,
    "a factory": defaultdict(lambda: 1),
    "an array of objects": np.array([None, {}], dtype=object),
    "a module": torch.nn.Linear(1, 1),
    "a tensor without memory": torch.ones(2, device="meta"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", REFUSED)
async def test_refuses_what_cannot_be_carried_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    tree = {"fine": torch.ones(3), "some": OrderedDict(where=[0, REFUSED[kind]])}
    for save in (aiostage.save, aiostage.save):
        with pytest.raises(UnsupportedLeafError) as caught:
            await save(tree, tmp_path / "new" / "checkpoint")
        assert caught.value.path is not None
        assert caught.value.path.startswith("state_dict['some']['where'][1]"), caught.value.path
        assert not list(tmp_path.iterdir())


@pytest.mark.asyncio
async def test_refusing_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    await aiostage.save({"step": 1}, target)
    with pytest.raises(UnsupportedLeafError):
        await aiostage.save({"step": Plain()}, target, overwrite=True)
    assert await aiostage.load(target) == {"step": 1}
    assert list(tmp_path.iterdir()) == [target]
