"""Everything that survives ``torch.save`` and ``torch.load(weights_only=True)`` survives a checkpoint."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.testing._internal.two_tensor import TwoTensor

import aiostage
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.trees import DTYPES, not_strided, of_bytes, trees


def through_torch(tree: Any) -> Any:
    """Return what comes back from PyTorch; raises if it refuses."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def with_attributes() -> OrderedDict[str, Any]:
    made: OrderedDict[str, Any] = OrderedDict(weight=torch.ones(2))
    made._metadata = OrderedDict(version=2)  # type: ignore[attr-defined]
    return made


def circle() -> list[Any]:
    made: list[Any] = [1]
    made.append(made)
    return made


def trained() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


BASE = torch.arange(6.0)
SCHEMES = [torch.per_tensor_affine, torch.per_channel_affine, torch.per_channel_affine_float_qparams]

SURVIVORS: dict[str, Any] = {
    "scalars": [None, True, 1, -(10**40), 1.5, float("inf"), 1 + 2j, "ü", b"bytes", bytearray(b"more")],
    "containers": {"tuple": (1, (2,)), "set": {1, "a"}, "counter": Counter("aab"), "ordered": OrderedDict(a=1), 3: []},
    "of torch": [torch.float32, torch.uint3, torch.Size([2, 0]), torch.device("cuda:1"), torch.sparse_coo],
    "schemes": SCHEMES,
    "dtypes": [of_bytes(bytes(range(48)), dtype) for dtype in (*DTYPES, torch.float4_e2m1fn_x2)],
    "views": [BASE, BASE[1:], BASE.view(2, 3).t(), BASE[:2].view(2, 1).expand(2, 3), BASE[:0]],
    "parameters": [torch.nn.Parameter(BASE), torch.nn.Parameter(BASE, False), BASE.clone().requires_grad_()],
    "not strided": not_strided(),
    "attributes": with_attributes(),
    "circle": circle(),
    "training": trained(),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", SURVIVORS)
async def test_survivors(kind: str, tmp_path: Path) -> None:
    tree = {"tree": SURVIVORS[kind]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        through_torch(tree)
    await aiostage.save(tree, tmp_path / "plain")
    await aiostage.save(tree, tmp_path / "staged")
    if kind == "circle":
        loaded = (await aiostage.load(tmp_path / "staged"))["tree"]
        assert loaded[1] is loaded
        return
    assert_same(tree, await aiostage.load(tmp_path / "plain"))
    assert_same(tree, await aiostage.load(tmp_path / "staged"))


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:The PyTorch API of nested tensors")
async def test_storages_and_jagged_tensors(tmp_path: Path) -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    tree = [BASE.untyped_storage(), BASE.clone().storage(), jagged]
    through_torch(tree[:2])
    # From PyTorch 2.15 on, weights_only=True refuses a jagged tensor, which ours still carries.
    with suppress(pickle.UnpicklingError):
        through_torch(tree[2:])
    await aiostage.save(tree, tmp_path / "checkpoint")
    loaded = await aiostage.load(tmp_path / "checkpoint")
    assert loaded[0].tolist() == BASE.untyped_storage().tolist()
    assert loaded[1].tolist() == BASE.tolist()
    assert [part.tolist() for part in loaded[2].unbind()] == [part.tolist() for part in jagged.unbind()]


@pytest.mark.asyncio
async def test_declared_classes(tmp_path: Path) -> None:
    tree = [TwoTensor(torch.ones(2), torch.zeros(2))]
    with pytest.raises(pickle.UnpicklingError):
        through_torch(tree)
    await aiostage.save(tree, tmp_path / "checkpoint")
    with torch.serialization.safe_globals([TwoTensor]):
        through_torch(tree)
        (loaded,) = await aiostage.load(tmp_path / "checkpoint")
    assert type(loaded) is TwoTensor


@pytest.mark.one_loop
@pytest.mark.asyncio
@settings(max_examples=60, deadline=None)
@given(tree=trees())
@pytest.mark.filterwarnings("ignore")
async def test_any_tree(tree: Any, tmp_path: Path) -> None:
    try:
        through_torch(tree)
    except Exception:
        return
    await aiostage.save(tree, tmp_path / "checkpoint", overwrite=True)
    assert_same(tree, await aiostage.load(tmp_path / "checkpoint"))
