"""The walk: any depth, yields by count, what is left out, cast or refused."""

from __future__ import annotations

import asyncio
import copy
import math
from typing import Any

import pytest
import torch

from aiostage import AsyncStager, StagingOptions, TornSnapshotError, UnsupportedLeafError
from aiostage.leaf import Attribute
from tests.fuzz.classes import OwnCopy
from tests.staging.holding import copies_held

DEPTH = 100_000


def nested(depth: int, wrap: Any) -> Any:
    tree: Any = torch.ones(2)
    for level in range(depth):
        tree = wrap(tree, level)
    return tree


def take_down(tree: Any) -> None:
    """Free a deep tree level by level; Python's own way recurses."""
    while isinstance(tree, (list, dict, tuple)) and tree:
        inside = tree[0] if isinstance(tree, (list, tuple)) else tree["x"]
        if isinstance(tree, (list, dict)):
            tree.clear()
        tree = inside


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize(
    "wrap",
    [lambda tree, level: [tree], lambda tree, level: {"x": tree}, lambda tree, level: (tree,)],
    ids=["lists", "dicts", "tuples"],
)
async def test_nesting_is_bounded_by_memory_only(wrap: Any) -> None:
    source = nested(DEPTH, wrap)
    async with AsyncStager() as stager:
        staged = await stager.stage(source)
    depth, level = 0, staged
    while not isinstance(level, torch.Tensor):
        level = level["x"] if isinstance(level, dict) else level[0]
        depth += 1
    assert depth == DEPTH
    assert level.tolist() == [1, 1]
    take_down(staged)
    take_down(source)


def suspensions(coroutine: Any) -> int:
    """Run a coroutine that waits only for the loop's next turn, and count its turns."""
    count = 0

    async def drive() -> Any:
        return await coroutine

    loop = asyncio.new_event_loop()
    original = loop.call_soon

    def call_soon(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments, **keywords)

    loop.call_soon = call_soon  # type: ignore[method-assign]
    try:
        loop.run_until_complete(drive())
    finally:
        loop.close()
    return count


@pytest.mark.parametrize("use_async_staging", [False])
def test_yields_follow_the_limit(use_async_staging: bool) -> None:
    # Not plain, so that it is walked child by child.
    tree = [[torch.ones(1), {"a": n}, slice(n)] for n in range(2000)]

    def yields(max_loop_hold: float) -> int:
        stager = AsyncStager(StagingOptions(max_loop_hold=max_loop_hold, use_async_staging=use_async_staging))

        async def stage() -> int:
            async with stager, stager.snapshot(tree) as snapshot:
                await snapshot.captured()
                return snapshot.timings.yields

        return asyncio.run(stage())

    assert yields(math.inf) == 0
    finest = yields(1e-9)
    assert finest > 6000 * 8 / 512
    assert 0 < yields(1e-3) < finest


def test_every_yield_is_a_turn_of_the_loop() -> None:
    tree = [[torch.ones(1), slice(n)] for n in range(1000)]

    async def stage(max_loop_hold: float) -> None:
        async with AsyncStager(StagingOptions(max_loop_hold=max_loop_hold)) as stager:
            await stager.stage(tree)

    few, many = suspensions(stage(math.inf)), suspensions(stage(1e-9))
    assert many > few + 1000 * 8 * 2 // 512


@pytest.mark.asyncio
class TestPassthrough:
    async def test_leaves_subtrees_uncopied(self):
        kept = {"big": torch.ones(3), "deep": [torch.ones(1)]}
        asked = []

        def rule(path: Any, value: object) -> bool:
            asked.append(path)
            return path == ("kept",)

        async with AsyncStager(StagingOptions(passthrough=rule)) as stager:
            staged = await stager.stage({"kept": kept, "a": torch.ones(2)})
        assert staged["kept"] is kept
        assert ("kept", "big") not in asked
        assert ("a",) in asked

    async def test_holds_for_what_an_object_that_copies_itself_leads_to_as_well(self):
        kept, around = Thing(), []
        around.append(kept)
        for tree in ({"list": around, "own": OwnCopy(around)}, {"own": OwnCopy(around), "list": around}):
            options = StagingOptions(passthrough=lambda path, value: value is kept)
            async with AsyncStager(options) as stager:
                staged = await stager.stage(tree)
            assert staged["own"].value is staged["list"] is not around
            assert staged["list"][0] is kept

    async def test_an_error_in_the_rule_is_the_callers(self):
        def rule(path: Any, value: object) -> bool:
            raise ZeroDivisionError

        async with AsyncStager(StagingOptions(passthrough=rule)) as stager:
            with pytest.raises(ZeroDivisionError):
                await stager.stage({"a": torch.ones(1)})


@pytest.mark.asyncio
class TestDtype:
    async def test_casts_floats_and_nothing_else(self):
        source = {"f": torch.ones(3), "i": torch.arange(3), "d": torch.ones(2, 2, dtype=torch.float64).t(), "b": True}
        async with AsyncStager(StagingOptions(dtype=torch.bfloat16)) as stager:
            for _ in range(4):
                staged = await stager.stage(source)
            assert stager.statistics().nbytes == 4 * (6 + 24 + 8)
        assert [staged[name].dtype for name in "fid"] == [torch.bfloat16, torch.int64, torch.bfloat16]
        assert staged["d"].stride() == (1, 2)

    async def test_a_rule_sees_path_and_tensor(self):
        def rule(path: Any, tensor: torch.Tensor) -> torch.dtype | None:
            return torch.float16 if path == ("a", 0) else None

        async with AsyncStager(StagingOptions(dtype=rule)) as stager:
            staged = await stager.stage({"a": [torch.ones(2), torch.ones(2)]})
        assert [tensor.dtype for tensor in staged["a"]] == [torch.float16, torch.float32]

    async def test_views_of_one_storage_are_cast_together(self):
        base = torch.arange(8.0)
        async with AsyncStager(StagingOptions(dtype=torch.float16)) as stager:
            staged = await stager.stage({"a": base, "b": base[2:5]})
        assert staged["b"].tolist() == [2, 3, 4]
        assert staged["a"].untyped_storage()._cdata == staged["b"].untyped_storage()._cdata

    async def test_a_mixed_cast_is_refused(self):
        base = torch.arange(8.0)
        tree = {"a": base, "b": base.view(torch.int32)}
        async with AsyncStager(StagingOptions(dtype=torch.float16)) as stager:
            with pytest.raises(UnsupportedLeafError, match="shares memory"):
                await stager.stage(tree)
            assert stager.statistics().arenas == 0

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore::UserWarning")
    async def test_the_scales_of_a_quantized_tensor_are_not_cast(self):
        scales, zeros = torch.tensor([0.1, 0.3]), torch.tensor([1, 2])
        source = torch.quantize_per_channel(torch.arange(8.0).reshape(2, 4), scales, zeros, 0, torch.qint8)
        async with AsyncStager(StagingOptions(dtype=torch.bfloat16)) as stager:
            staged = await stager.stage([source, torch.ones(1)])
        assert torch.equal(staged[0].dequantize(), source.dequantize())
        assert staged[1].dtype is torch.bfloat16

    async def test_a_gradient_has_the_dtype_of_its_tensor(self):
        tensor = torch.ones(2, requires_grad=True)
        tensor.grad = torch.full((2,), 3.0)

        def rule(path: Any, value: torch.Tensor) -> torch.dtype | None:
            return torch.float16 if value.requires_grad else None

        async with AsyncStager(StagingOptions(dtype=rule)) as stager:
            staged = await stager.stage([tensor])
            assert staged[0].grad.tolist() == [3.0, 3.0]
            assert staged[0].grad.dtype is staged[0].dtype is torch.float16
            with pytest.raises(UnsupportedLeafError, match=r"gradient of a tensor that is to be torch\.float16"):
                await stager.stage([tensor.grad, tensor])

    @pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no such dtype")
    @pytest.mark.parametrize("of", ["tensor", "gradient"])
    async def test_what_lies_in_memory_that_the_code_of_an_object_has_copied_keeps_its_dtype(self, of: str):
        class Holding:
            def __init__(self, value: torch.Tensor) -> None:
                self.value = value

            def __deepcopy__(self, memo: dict[int, Any]) -> Any:
                return Holding(copy.deepcopy(self.value, memo))

        base = torch.arange(8.0)
        tensor = base[2:4] if of == "tensor" else torch.ones(2)
        tensor.grad = torch.full((2,), 3.0) if of == "tensor" else base[2:4]
        async with AsyncStager(StagingOptions(dtype=torch.float16)) as stager:
            staged = await stager.stage({"a": tensor, "b": Holding(base), "c": torch.ones(1)})
        assert staged["a"].dtype is staged["a"].grad.dtype is torch.float32
        assert staged["a"].tolist() == tensor.tolist()
        assert staged["a"].grad.tolist() == tensor.grad.tolist()
        assert staged["c"].dtype is torch.float16

    @pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no such dtype")
    async def test_a_dtype_that_pytorch_cannot_cast_is_refused(self):
        async with AsyncStager(StagingOptions(dtype=torch.float32)) as stager:
            with pytest.raises(UnsupportedLeafError, match=r"\['a'\]: PyTorch cannot cast torch\.float4_e2m1fn_x2"):
                await stager.stage({"a": torch.zeros(2, dtype=torch.float4_e2m1fn_x2)})

    async def test_a_rule_that_returns_no_float_is_an_error(self):
        async with AsyncStager(StagingOptions(dtype=lambda path, tensor: torch.int8)) as stager:
            with pytest.raises(TypeError, match=r"\['a'\].*floating-point"):
                await stager.stage({"a": torch.ones(1)})


@pytest.mark.asyncio
async def test_a_frozenset_is_made_only_of_what_has_to_be_copied() -> None:
    atoms, tensor = frozenset(range(1000)), torch.ones(2)
    async with AsyncStager() as stager:
        staged = await stager.stage([atoms, frozenset([tensor]), tensor, frozenset([atoms, (1, 2)])])
    assert staged[0] is atoms
    assert staged[1] == {staged[2]}
    assert staged[2] is not tensor
    assert staged[3] == {atoms, (1, 2)}


class Thing:
    def __init__(self) -> None:
        self.value = [1]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("tree", "change", "path"),
    [
        ({"a": [1]}, lambda tree: tree["a"].append(2), "state_dict['a']"),
        ({"a": [1, 2]}, lambda tree: tree["a"].__setitem__(1, 3), "state_dict['a'][1]"),
        ({"a": {1}}, lambda tree: tree["a"].add(2), "state_dict['a']"),
        ({"a": {"b": 1}}, lambda tree: tree["a"].pop("b"), "state_dict['a']"),
        ({"a": Thing()}, lambda tree: setattr(tree["a"], "value", None), "state_dict['a'].value"),
        ({"a": torch.ones(2)}, lambda tree: tree["a"].add_(1), "state_dict['a']"),
    ],
    ids=["grown list", "item", "set", "removed key", "attribute", "tensor"],
)
async def test_torn_names_the_place(tree: Any, change: Any, path: str) -> None:
    tree = copy.deepcopy(tree) | {"tensor": torch.ones(3)}
    async with AsyncStager() as stager:
        with copies_held(stager) as release:
            async with stager.snapshot(tree) as snapshot:
                change(tree)
                release.set()
                with pytest.raises(TornSnapshotError) as caught:
                    await snapshot.captured()
    assert caught.value.paths == (path,)


@pytest.mark.asyncio
async def test_a_change_between_the_call_and_the_start_is_torn() -> None:
    tree = {"a": torch.ones(2), "n": 1}
    async with AsyncStager() as stager:
        coroutine = stager.stage(tree)
        tree["a"].add_(1)
        with pytest.raises(TornSnapshotError):
            await coroutine


@pytest.mark.asyncio
async def test_attributes_of_tensors_come_along() -> None:
    tensor = torch.ones(2)
    tensor.scale = torch.full((1,), 3.0)  # type: ignore[attr-defined]
    tensor.twin = tensor  # type: ignore[attr-defined]
    async with AsyncStager() as stager, stager.snapshot({"a": tensor}) as snapshot:
        paths = [leaf.path async for leaf in snapshot]
        staged = (await snapshot.result())["a"]
    assert staged.scale.tolist() == [3]
    assert staged.twin is staged
    assert ("a", Attribute("scale")) in paths
