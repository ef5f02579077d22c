"""Inference mode belongs to a thread: what is made in the caller's is written to by threads that are not in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import aiostage
from aiostage import AsyncStager, StagingOptions

KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "small": lambda: torch.arange(5.0),
    "large": lambda: torch.arange(100_000.0),
    "turned": lambda: torch.arange(20.0).view(4, 5).t(),
    "expanded": lambda: torch.arange(3.0)[:, None].expand(3, 4),
    "conjugate": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "float8": lambda: torch.arange(8.0).to(torch.float8_e4m3fn),
    "parameter": lambda: torch.nn.Parameter(torch.arange(6.0)),
    "scalar": lambda: torch.tensor(3),
    "sparse": lambda: torch.eye(4).to_sparse(),
}


def numbers(tensor: torch.Tensor) -> object:
    with torch.inference_mode():
        return (tensor.to_dense() if tensor.layout is not torch.strided else tensor).tolist()


def tree() -> dict[str, torch.Tensor]:
    return {kind: make() for kind, make in KINDS.items()}


def all_numbers(state: dict[str, torch.Tensor]) -> dict[str, object]:
    return {kind: numbers(tensor) for kind, tensor in state.items()}


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_stages_and_saves(kind: str, tmp_path: Path) -> None:
    source = {"x": KINDS[kind]()}
    with torch.inference_mode():
        async with AsyncStager() as stager:
            staged = await stager.stage(source)
        await aiostage.save(source, tmp_path / "a")
        loaded = await aiostage.load(tmp_path / "a")
    assert numbers(staged["x"]) == numbers(loaded["x"]) == numbers(source["x"])
    assert staged["x"].is_inference()


@pytest.mark.asyncio
async def test_saves_through_a_window(tmp_path: Path) -> None:
    source = {"a": torch.arange(600_000.0).view(600, 1000).t(), "b": [torch.ones(n) for n in range(1, 50)]}
    with torch.inference_mode():
        async with AsyncStager(StagingOptions(max_host_bytes=4 * 2**20)) as stager:
            await aiostage.save(source, tmp_path / "a", stager=stager)
    loaded = await aiostage.load(tmp_path / "a")
    assert torch.equal(loaded["a"], source["a"])
    assert all(map(torch.equal, loaded["b"], source["b"]))


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
async def test_loads_into_a_live_tree(made_inside: bool, in_place: bool, tmp_path: Path) -> None:
    source = tree()
    # Those have to be loaded again.
    del source["sparse"], source["expanded"]
    await aiostage.save(source, tmp_path / "a")
    with torch.inference_mode() if made_inside else nullcontext():
        live = {kind: tensor.detach().clone() for kind, tensor in source.items()}
        for tensor in live.values():
            tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype).zero_()
    targets = dict(live)
    with torch.inference_mode():
        await aiostage.load(tmp_path / "a", into=live, in_place=in_place)
    assert all_numbers(targets) == all_numbers(source)
    assert [tensor.is_inference() for tensor in targets.values()] == [made_inside] * len(targets)
