from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiostage
from aiostage import CheckpointMismatchError, CheckpointNotFoundError
from aiostage.checkpoint import register
from aiostage.testing import at_every_await
from tests.checkpoint.comparing import assert_same, data_of
from tests.checkpoint.leftovers import nothing_left


def tree(step: int = 1) -> dict[str, Any]:
    value = float(step)
    shared = torch.full((6,), value)
    return {
        "step": step,
        "tied": [shared, shared.view(2, 3).t(), shared],
        "parameter": torch.nn.Parameter(torch.full((3,), value)),
        "turned": torch.full((4, 5), value).t(),
        "float8": torch.full((7,), value).to(torch.float8_e4m3fn),
        "complex": torch.full((2,), complex(value, -value)),
        "expanded": torch.full((1, 1), value).expand(3, 2),
        "none": torch.empty(0, 3),
        "groups": [{"lr": value / 10, "betas": (0.5, value)}],
        "nested": ({"inside": torch.full((2,), value)}, None),
        "array": np.full(3, value),
    }


def tensors_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found | {f"tied{n}": value for n, value in enumerate(state["tied"])} | state["nested"][0]


@pytest.mark.asyncio
async def test_loaded_memory_is_the_callers(tmp_path: Path) -> None:
    await aiostage.save(tree(), tmp_path / "checkpoint")
    gc.disable()
    try:
        loaded, other = await aiostage.load(tmp_path / "checkpoint"), await aiostage.load(tmp_path / "checkpoint")
        loaded["tied"][0].fill_(5)
        assert_same(tree(), other)
        assert torch.equal(loaded["tied"][1], torch.full((3, 2), 5.0))
        loaded["turned"].add_(1)
        loaded["parameter"].sum().backward()
        gone = weakref.ref(loaded["turned"].untyped_storage())
        del loaded
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_into_changes_tensors_in_place(tmp_path: Path) -> None:
    await aiostage.save(tree(2), tmp_path / "checkpoint")
    live = tree(1)
    tensors, group, inside = tensors_of(live), live["groups"][0], live["nested"][0]
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert await aiostage.load(tmp_path / "checkpoint", into=live) is live
    assert_same(tree(2), live)
    again = tensors_of(live)
    assert all(again[name] is tensor for name, tensor in tensors.items())
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == addresses
    assert live["groups"][0] is group
    assert live["nested"][0] is inside


@pytest.mark.asyncio
async def test_into_keeps_how_live_tensors_lie_in_memory(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1 + 2j])}, tmp_path / "checkpoint")
    base = torch.zeros(12)
    conjugate = torch.zeros(1, dtype=torch.complex64).conj()
    live = {"a": base[::2].view(3, 2).t(), "b": conjugate}
    await aiostage.load(tmp_path / "checkpoint", into=live)
    assert live["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert base.tolist() == [0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0]
    assert live["b"] is conjugate
    assert conjugate.tolist() == [1 + 2j]
    assert conjugate.is_conj()


@pytest.mark.asyncio
async def test_into_a_module_and_its_optimizer(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (1 + seed))
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    (model, optimizer), (other, other_optimizer) = make(0), make(1)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    await aiostage.save(state, tmp_path / "checkpoint")
    weight = other[0].weight  # type: ignore[index]
    into = {"model": other.state_dict(), "optimizer": other_optimizer.state_dict()}
    await aiostage.load(tmp_path / "checkpoint", into=into)
    assert_same(state, into)
    assert other[0].weight is weight  # type: ignore[index]
    # Tensors of an optimizer's state are its own; its groups are copies that have to be handed back.
    assert_same(optimizer.state_dict()["state"], other_optimizer.state_dict()["state"])
    other_optimizer.load_state_dict(into["optimizer"])
    assert_same(optimizer.state_dict(), other_optimizer.state_dict())
    assert_same(dict(model.named_buffers()), dict(other.named_buffers()))


@pytest.mark.asyncio
async def test_one_error_names_everything_that_does_not_fit(tmp_path: Path) -> None:
    saved = tree(2) | {"new": 1, "kind": [1], "deeper": {"a": {"b": torch.ones(1)}}}
    saved["groups"].append({"lr": 3})
    saved["nested"][0]["more"] = torch.ones(1)
    await aiostage.save(saved, tmp_path / "checkpoint")
    live = tree(1) | {"old": torch.ones(1), "kind": {"a": 1}, "deeper": {"a": 3}}
    live["turned"] = torch.zeros(5, 3)
    live["complex"] = torch.zeros(2)
    live["parameter"] = 3
    live["groups"][0]["momentum"] = 1
    before = tree(1)
    with pytest.raises(CheckpointMismatchError) as caught:
        await aiostage.load(tmp_path / "checkpoint", into=live)
    error = caught.value
    assert set(error.missing) == {"state_dict['old']", "state_dict['groups'][0]['momentum']"}
    assert set(error.unexpected) == {
        "state_dict['new']",
        "state_dict['groups'][1]",
        "state_dict['nested'][0]['more']",
    }
    mismatched = {text.split(" (")[0]: text.split(" (", 1)[1] for text in error.mismatched}
    assert set(mismatched) == {
        "state_dict['turned']",
        "state_dict['complex']",
        "state_dict['parameter']",
        "state_dict['kind']",
        "state_dict['deeper']['a']",
    }
    assert "(5, 4) into torch.float32 (5, 3)" in mismatched["state_dict['turned']"]
    for path in (*error.missing, *error.unexpected, *mismatched):
        assert path in str(error)
    assert_same(before["tied"], live["tied"])
    assert live["step"] == 1
    assert torch.equal(live["turned"], torch.zeros(5, 3))


@pytest.mark.asyncio
async def test_live_tensors_that_cannot_be_written_to(tmp_path: Path) -> None:
    shared = torch.zeros(4)
    with torch.inference_mode():
        inference = torch.zeros(2)
    odd = {
        "meta": torch.zeros(2, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
        "inference": inference,
        "expanded": torch.zeros(1).expand(2),
        "tied": shared[:2],
        "tied too": shared[1:3],
        "fine": torch.zeros(2),
    }
    saved = {name: torch.ones(2) for name in odd} | {"sparse": torch.eye(2)}
    await aiostage.save(saved, tmp_path / "checkpoint")
    with pytest.raises(CheckpointMismatchError) as caught:
        await aiostage.load(tmp_path / "checkpoint", into=odd)
    found = {text.split(" (")[0] for text in caught.value.mismatched}
    assert found == {f"state_dict[{name!r}]" for name in odd} - {"state_dict['tied']", "state_dict['fine']"}
    assert not odd["fine"].any()


@pytest.mark.asyncio
async def test_into_takes_another_kind_of_dict(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.ones(1), "b": 2}, tmp_path / "checkpoint")
    live = OrderedDict(b=1, a=torch.zeros(1))
    await aiostage.load(tmp_path / "checkpoint", into=live)
    assert list(live.items()) == [("b", 2), ("a", torch.ones(1))]


@pytest.mark.asyncio
async def test_a_live_tree_with_circles(tmp_path: Path) -> None:
    def circular(value: float) -> dict[str, Any]:
        made: dict[str, Any] = {"tensor": torch.full((2,), value)}
        made["list"] = [made]
        return made

    await aiostage.save(circular(2), tmp_path / "checkpoint")
    live = circular(1)
    await aiostage.load(tmp_path / "checkpoint", into=live)
    assert_same(circular(2), live)


@pytest.mark.asyncio
async def test_cancelled_at_every_await(tmp_path: Path) -> None:
    await aiostage.save(tree(2), tmp_path / "checkpoint", max_shard_bytes=60)
    live = tree(1)

    async def load() -> None:
        await aiostage.load(tmp_path / "checkpoint", into=live)

    changed = []
    with nothing_left():
        async for _ in at_every_await(load):
            with nothing_left():
                assert live["step"] in (1, 2)
                changed.append(live["step"] == 2)
                # All of it, or nothing.
                assert_same(tree(live["step"]), live)
    assert len(changed) > 8
    assert not changed[0]
    assert changed == sorted(changed)


@pytest.mark.asyncio
async def test_while_it_is_replaced_again_and_again(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    await aiostage.save({"a": torch.zeros(3000), "b": torch.zeros(3000)}, target)
    done = False

    async def replace() -> None:
        nonlocal done
        for step in range(1, 31):
            made = torch.full((3000,), float(step))
            await aiostage.save({"a": made, "b": made.clone()}, target, overwrite=True, max_shard_bytes=12_000)
        done = True

    async def read() -> int:
        count, last = 0, 0.0
        while not done or not count:
            found = await aiostage.load(target)
            assert data_of(found["a"]) == data_of(found["b"])
            assert found["a"][0] >= last
            last, count = float(found["a"][0]), count + 1
        return count

    with nothing_left():
        counts = await asyncio.gather(read(), replace(), read())
    assert counts[0]
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    await aiostage.save(tree(2), tmp_path / "checkpoint")
    live = tree(1)
    with nothing_left():
        await aiostage.load(tmp_path / "checkpoint", into=live)
        with pytest.raises(CheckpointNotFoundError):
            await aiostage.load(tmp_path / "elsewhere")
    assert_same(tree(2), live)


@pytest.mark.asyncio
async def test_through_links_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await aiostage.save({"a": 1}, tmp_path / "checkpoint")
    (tmp_path / "latest").symlink_to("checkpoint")
    monkeypatch.chdir(tmp_path)
    for source in ("checkpoint", "./latest/", Path("latest"), tmp_path / "latest"):
        assert await aiostage.load(source) == {"a": 1}


def with_attributes(value: int) -> OrderedDict[str, Any]:
    state: OrderedDict[str, Any] = OrderedDict(weight=torch.full((2,), float(value)))
    state._metadata = OrderedDict(version=value)  # type: ignore[attr-defined]
    state.shadow = {"weight": torch.full((3,), float(value)), "inside": [value]}  # type: ignore[attr-defined]
    state["weight"].scale = torch.full((1,), float(value))
    state["weight"].note = value
    return state


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
async def test_into_takes_what_hangs_on_mappings_and_tensors(in_place: bool, tmp_path: Path) -> None:
    await aiostage.save({"state": with_attributes(2)}, tmp_path / "checkpoint")
    live: dict[str, Any] = {"state": with_attributes(1)}
    shadow, scale = live["state"].shadow["weight"], live["state"]["weight"].scale
    await aiostage.load(tmp_path / "checkpoint", into=live, in_place=in_place)
    assert_same({"state": with_attributes(2)}, live)
    assert_same(vars(with_attributes(2)), vars(live["state"]))
    assert live["state"].shadow["weight"] is shadow
    assert live["state"]["weight"].scale is scale


@pytest.mark.asyncio
async def test_into_adds_attributes_and_refuses_what_has_none(tmp_path: Path) -> None:
    await aiostage.save({"state": with_attributes(2)}, tmp_path / "checkpoint")
    live: dict[str, Any] = {"state": OrderedDict(weight=torch.zeros(2))}
    live["state"].own = 5
    await aiostage.load(tmp_path / "checkpoint", into=live)
    assert live["state"].own == 5
    del live["state"].own
    assert_same(vars(with_attributes(2)), vars(live["state"]))
    with pytest.raises(aiostage.CheckpointMismatchError, match=r"\['state'\]\.shadow .a dict has no attributes"):
        await aiostage.load(tmp_path / "checkpoint", into={"state": {"weight": torch.zeros(2)}})


@pytest.mark.asyncio
async def test_into_leaves_attributes_alone_that_were_not_asked_for(tmp_path: Path) -> None:
    await aiostage.save({"state": with_attributes(2)}, tmp_path / "checkpoint")
    live = {"state": with_attributes(1)}
    await aiostage.load(tmp_path / "checkpoint", into=live, only="state.weight")
    assert live["state"]["weight"].tolist() == [2, 2]
    assert live["state"]["weight"].note == 2
    assert live["state"]._metadata == {"version": 1}  # type: ignore[attr-defined]
    assert live["state"].shadow["weight"].tolist() == [1, 1, 1]  # type: ignore[attr-defined]


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
async def test_a_gradient_in_the_checkpoint_is_no_obstacle_for_a_live_tree(in_place: bool, tmp_path: Path) -> None:
    saved = torch.full((3,), 2.0, requires_grad=True)
    saved.grad = torch.full((3,), 0.5)
    await aiostage.save({"a": saved, "b": torch.ones(2)}, tmp_path / "a")
    live = {"a": torch.zeros(3, requires_grad=True), "b": torch.zeros(2)}
    target = live["a"]
    await aiostage.load(tmp_path / "a", into=live, in_place=in_place)
    assert live["a"] is target
    assert target.tolist() == [2.0, 2.0, 2.0]
    assert live["b"].tolist() == [1.0, 1.0]


class Noted:
    """Saved by functions of its own, which note where they are called."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
async def test_functions_of_the_caller_run_beside_the_loop_as_if_in_its_thread(
    mode: Callable[[], AbstractContextManager[object]], tmp_path: Path
) -> None:
    calls: list[tuple[str, bool, tuple[bool, bool]]] = []

    def modes() -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def note(name: str) -> None:
        calls.append((name, threading.current_thread() is loop_thread, modes()))

    def flatten(noted: Noted) -> tuple[list[torch.Tensor], None]:
        note("flatten")
        return [noted.tensor.mul_(1)], None

    def unflatten(children: list[torch.Tensor], context: object) -> Noted:
        note("unflatten")
        return Noted(torch.nn.Parameter(children[0]) * 2)

    def wanted(path: tuple[object, ...]) -> bool:
        note("only")
        return path == ("a",)

    loop_thread = threading.current_thread()
    register(Noted, flatten, unflatten)
    with mode():
        expected = modes()
        await aiostage.save({"a": Noted(torch.ones(3)), "b": 1}, tmp_path / "a")
        tree = await aiostage.load(tmp_path / "a", only=wanted)
    assert tree.keys() == {"a"}
    assert tree["a"].tensor.tolist() == [2.0, 2.0, 2.0]
    assert tree["a"].tensor.is_inference() is expected[0]
    assert tree["a"].tensor.requires_grad is expected[1]
    assert [name for name, _, _ in calls] == ["flatten", "only", "only", "unflatten"]
    assert not any(on_loop for _, on_loop, _ in calls)
    assert {found for _, _, found in calls} == {expected}
