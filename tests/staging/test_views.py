"""Views of one memory, with and without their base, in any order of addresses and of the tree."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch

import aiostage

pytestmark = pytest.mark.asyncio

ROWS = {"q": slice(0, 2), "k": slice(2, 4), "v": slice(4, 6)}


def check(staged: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> None:
    """Compare values, and which tensors share memory."""
    assert list(staged) == list(source)
    for name, tensor in source.items():
        assert torch.equal(staged[name], tensor), name
    bases = {name: tensor.data_ptr() for name, tensor in source.items()}
    first = next(iter(source))
    for name, tensor in staged.items():
        assert tensor.data_ptr() - staged[first].data_ptr() == bases[name] - bases[first], name


def qkv(order: tuple[str, ...]) -> dict[str, torch.Tensor]:
    weight = torch.arange(12.0).reshape(6, 2)
    return {name: weight[ROWS[name]] if name in ROWS else weight for name in order}


@pytest.mark.parametrize("order", list(permutations(("qkv", "q", "k", "v"))), ids="-".join)
async def test_views_and_their_base_in_any_order_are_staged_as_they_are(order: tuple[str, ...]) -> None:
    source = qkv(order)
    async with aiostage.AsyncStager() as stager:
        for _ in range(2):
            check(await stager.stage(source), source)


@pytest.mark.parametrize("order", list(permutations(("qkv", "q", "k", "v"))), ids="-".join)
async def test_views_and_their_base_in_any_order_are_saved_as_they_are(order: tuple[str, ...], tmp_path: Path) -> None:
    source = qkv(order)
    await aiostage.save(source, tmp_path / "checkpoint")
    check(await aiostage.load(tmp_path / "checkpoint"), source)


@pytest.mark.parametrize("order", list(permutations(("a", "b", "c", "d"))), ids="-".join)
async def test_a_leaf_between_views_is_not_lost(order: tuple[str, ...], tmp_path: Path) -> None:
    x, y = torch.arange(10.0), torch.arange(100.0, 110.0)
    leaves = {"a": x, "b": y, "c": x[4:8], "d": x[2:6]}
    source = {name: leaves[name] for name in order}
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage(source)
    await aiostage.save(source, tmp_path / "checkpoint")
    loaded = await aiostage.load(tmp_path / "checkpoint")
    for copy in (staged, loaded):
        for name, tensor in source.items():
            assert torch.equal(copy[name], tensor), name


async def test_leaves_of_one_kind_with_others_between_them_are_cast_each_from_its_own_source() -> None:
    # Casts go through tensors and not through addresses; an even number of each kind makes the ends look like a range.
    source = {str(n): torch.full((3,), float(n), dtype=torch.float32 if n % 2 else torch.float64) for n in range(9)}
    async with aiostage.AsyncStager(aiostage.StagingOptions(dtype=torch.bfloat16)) as stager:
        staged = await stager.stage(source)
    assert [staged[str(n)].tolist() for n in range(9)] == [[float(n)] * 3 for n in range(9)]


@pytest.mark.parametrize("shape", [(8, 4, 1, 1), (1, 4, 3, 1), (1, 1, 1, 1)])
async def test_strides_of_dimensions_of_size_one_are_kept(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = torch.randn(shape).to(memory_format=torch.channels_last)
    source = {"weight": weight, "again": weight}
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage(source)
    await aiostage.save(source, tmp_path / "checkpoint")
    loaded = await aiostage.load(tmp_path / "checkpoint")
    live = {name: torch.zeros(shape).to(memory_format=torch.channels_last) for name in source}
    await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)
    for copy in (staged, loaded, live):
        assert copy["weight"].stride() == weight.stride()
        assert torch.equal(copy["weight"], weight)
    assert loaded["weight"] is loaded["again"]


async def test_a_staged_jagged_tensor_combines_with_its_source() -> None:
    source = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    async with aiostage.AsyncStager() as stager:
        first = await stager.stage({"jagged": source})
        second = await stager.stage({"jagged": source})
    for sum_of_two in (first["jagged"] + source, first["jagged"] + second["jagged"]):
        assert [part.tolist() for part in sum_of_two.unbind()] == [[[2.0] * 3] * 2, [[0.0] * 3] * 4]


@pytest.mark.parametrize("first", [1, 2, 3])
async def test_a_view_of_another_dtype_may_begin_within_an_element_of_the_others(first: int, tmp_path: Path) -> None:
    base = torch.arange(12.0)
    source = {"halves": base.view(torch.int16)[first:9], "rest": base[1:6], "doubles": base.view(torch.float64)[1:4]}
    async with aiostage.AsyncStager() as stager:
        check(await stager.stage(source), source)
    await aiostage.save(source, tmp_path / "checkpoint")
    check(await aiostage.load(tmp_path / "checkpoint"), source)


@pytest.mark.parametrize("skipped", [1, 4, 8])
async def test_views_of_memory_that_begins_anywhere_stay_together(skipped: int, tmp_path: Path) -> None:
    # As of the bytes of a file behind its header.
    base = torch.frombuffer(bytearray(range(96)), dtype=torch.uint8, offset=skipped, count=80)
    source = {"bytes": base[1:75], "floats": base.view(torch.float32)[1:], "doubles": base.view(torch.float64)}
    async with aiostage.AsyncStager() as stager:
        check(await stager.stage(source), source)
    await aiostage.save(source, tmp_path / "checkpoint")
    check(await aiostage.load(tmp_path / "checkpoint"), source)
