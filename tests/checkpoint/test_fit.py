"""Loads into live trees that are not quite alike, and into objects that take a state dict."""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import aiostage
from aiostage import CheckpointMismatchError
from aiostage.checkpoint import register

pytestmark = pytest.mark.asyncio


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


async def test_objects_with_a_state(tmp_path: Path) -> None:
    model, optimizer = trained()
    counter, extra = Counter(), torch.arange(3.0)
    counter.count = 7
    saving = aiostage.save(
        {"model": model, "optimizer": optimizer, "counter": counter, "extra": extra, "step": 2}, tmp_path / "a"
    )
    # The moment is that of the call.
    counter.count = 8
    await saving
    # A fresh Adam has no state yet.
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    fresh = torch.optim.Adam(other.parameters(), lr=0.5)
    live = {"model": other, "optimizer": fresh, "counter": Counter(), "extra": torch.zeros(3), "step": 0}
    kept = live["extra"]
    assert await aiostage.load(tmp_path / "a", into=live) is live
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(fresh.state_dict()["state"][number][key], value)
    assert (live["counter"].count, live["step"]) == (7, 2)
    assert live["extra"] is kept
    assert torch.equal(kept, extra)
    with pytest.raises(ValueError, match="whole state dicts"):
        await aiostage.load(tmp_path / "a", into=live, in_place=True)
    with pytest.raises(CheckpointMismatchError, match="only a part"):
        await aiostage.load(tmp_path / "a", into=live, only=["model.0.weight"])
    live["counter"].count = 0
    await aiostage.load(tmp_path / "a", into=live, only=["step", "extra"])
    assert live["counter"].count == 0


class Registered(Counter):
    """Stands for itself, because it is registered."""


class Raising:
    """Has whatever is asked for, and raises for what it does not know, as PyG's HeteroData does."""

    def __init__(self) -> None:
        self.x = torch.ones(2)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else KeyError(f"there is no {name}")


async def test_objects_that_stand_for_themselves(tmp_path: Path) -> None:
    register(Registered)
    value = Registered()
    value.count = 7
    await aiostage.save({"a": value, "b": [value]}, tmp_path / "a")
    loaded = await aiostage.load(tmp_path / "a")
    assert type(loaded["a"]) is Registered
    assert loaded["a"] is loaded["b"][0]
    assert loaded["a"].count == 7
    live = {"a": Registered(), "b": [0]}
    await aiostage.load(tmp_path / "a", into=live, only="a")
    assert live["a"].count == 7  # type: ignore[attr-defined]


class Unready:
    """Has a state that cannot be had yet."""

    @property
    def state_dict(self) -> Any:
        raise RuntimeError("not built yet")

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("top", [False, True])
async def test_what_the_property_of_a_state_raises_is_raised(tmp_path: Path, top: bool) -> None:
    with pytest.raises(RuntimeError, match="not built yet"):
        await aiostage.save(Unready() if top else {"a": Unready()}, tmp_path / "a")
    await aiostage.save({"a": 1}, tmp_path / "a")
    with pytest.raises(RuntimeError, match="not built yet"):
        await aiostage.load(tmp_path / "a", into=Unready() if top else {"a": Unready()})


async def test_a_registered_object_is_not_asked_for_a_state(tmp_path: Path) -> None:
    class Whole(Unready):
        pass

    register(Whole, lambda value: ([], None), lambda children, _: Whole())
    await aiostage.save({"a": Whole()}, tmp_path / "a")
    assert type((await aiostage.load(tmp_path / "a"))["a"]) is Whole


async def test_objects_that_raise_when_asked_for_a_state(tmp_path: Path) -> None:
    register(Raising, lambda value: ([value.x], None), lambda children, _: Raising())
    await aiostage.save({"a": Raising()}, tmp_path / "a")
    assert (await aiostage.load(tmp_path / "a"))["a"].x.tolist() == [1, 1]
    with pytest.raises(aiostage.UnsupportedLeafError, match=r"state_dict\['a'\]"):
        await aiostage.save({"a": Unregistered()}, tmp_path / "b")


class Unregistered(Raising):
    """Like that, and of no kind that can be saved."""


async def test_a_model_itself(tmp_path: Path) -> None:
    model, _ = trained()
    await aiostage.save(model, tmp_path / "a")
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert await aiostage.load(tmp_path / "a", into=other) is other
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())
    async with aiostage.Checkpointer(tmp_path / "run") as checkpointer:
        handle = await checkpointer.save(1, {"model": model})
        await handle.committed()
        third = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        await checkpointer.restore({"model": third})
    assert torch.equal(third[0].weight, model[0].weight)


async def test_nothing_is_changed_when_an_object_has_no_state_there(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.ones(2)}, tmp_path / "a")
    live = {"a": torch.zeros(2), "counter": Counter()}
    with pytest.raises(CheckpointMismatchError, match="counter"):
        await aiostage.load(tmp_path / "a", into=live)
    assert not live["a"].any()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
async def test_casts(tmp_path: Path, dtype: torch.dtype, in_place: bool) -> None:
    saved = {"a": torch.randn(1000, 7), "t": torch.randn(4, 6).t(), "n": torch.arange(5), "b": torch.ones(3)}
    saved["tied"] = saved["a"]
    await aiostage.save(saved, tmp_path / "a")
    live = {"a": torch.zeros(1000, 7, dtype=dtype), "t": torch.zeros(6, 4, dtype=dtype), "n": torch.zeros(5).long()}
    live |= {"b": torch.zeros(3), "tied": live["a"]}
    with pytest.raises(CheckpointMismatchError, match="cast=True"):
        await aiostage.load(tmp_path / "a", into=live, in_place=in_place)
    assert not live["b"].any()
    await aiostage.load(tmp_path / "a", into=live, in_place=in_place, cast=True)
    for key, tensor in live.items():
        assert torch.equal(tensor.double(), saved[key].to(tensor.dtype).double()), key


async def test_only_numbers_that_round_are_cast(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64), "c": torch.ones(2)}, tmp_path / "a")
    live = {"a": torch.zeros(2).long(), "b": torch.zeros(2), "c": torch.zeros(3, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointMismatchError) as caught:
        await aiostage.load(tmp_path / "a", into=live, cast=True)
    assert len(caught.value.mismatched) == 3


async def test_views_that_overlap_by_bytes_only_are_not_cast(tmp_path: Path) -> None:
    # The distance in bytes is the same in both, that in elements is not.
    base, narrow = torch.arange(8.0), torch.zeros(8, dtype=torch.bfloat16)
    await aiostage.save({"a": base[0:4], "b": base[1:5]}, tmp_path / "a")
    with pytest.raises(CheckpointMismatchError, match="shares memory"):
        await aiostage.load(tmp_path / "a", into={"a": narrow[0:4], "b": narrow[2:6]}, cast=True)
    assert not narrow.any()


@pytest.mark.parametrize("in_place", [False, True])
async def test_not_strict(tmp_path: Path, caplog: pytest.LogCaptureFixture, in_place: bool) -> None:
    await aiostage.save({"a": torch.ones(2), "gone": {"x": torch.ones(3)}, "list": [1, 2]}, tmp_path / "a")
    live: dict[str, Any] = {"a": torch.zeros(2), "new": torch.full((2,), 5.0), "list": [0]}
    with pytest.raises(CheckpointMismatchError):
        await aiostage.load(tmp_path / "a", into=live, in_place=in_place)
    told: list[tuple[list[str], list[str]]] = []
    await aiostage.load(tmp_path / "a", into=live, in_place=in_place, strict=lambda *paths: told.append(paths))
    assert [(len(missing), len(unexpected)) for missing, unexpected in told] == [(1, 2)]
    assert "new" in told[0][0][0]
    assert live["a"].tolist() == [1, 1]
    assert live["new"].tolist() == [5, 5]
    assert live["list"] == [1]
    assert "gone" not in live
    with caplog.at_level(logging.WARNING, "aiostage"):
        await aiostage.load(tmp_path / "a", into=live, in_place=in_place, strict=False)
    assert "missing from" in caplog.text
    assert "gone" in caplog.text

    def refuse(missing: list[str], unexpected: list[str]) -> None:
        raise KeyError(unexpected[0])

    live["a"].zero_()
    with pytest.raises(KeyError, match="gone"):
        await aiostage.load(tmp_path / "a", into=live, in_place=in_place, strict=refuse)
    assert not live["a"].any()
    live["a"] = torch.zeros(3)
    with pytest.raises(CheckpointMismatchError):
        await aiostage.load(tmp_path / "a", into=live, in_place=in_place, strict=False)


async def test_arguments(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.ones(2)}, tmp_path / "a")
    for options in ({"cast": True}, {"strict": False}):
        with pytest.raises(ValueError, match="pass into="):
            await aiostage.load(tmp_path / "a", **options)
    with pytest.raises(TypeError, match="strict must be"):
        await aiostage.load(tmp_path / "a", into={}, strict="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cast must be"):
        await aiostage.load(tmp_path / "a", into={}, cast=1)  # type: ignore[arg-type]


# Objects with tensors in them: another object in their place would leave the live tensors as they were


@dataclass
class State:
    weight: Any
    step: int = 0


@dataclass(frozen=True)
class Frozen:
    weight: Any
    step: int = 0


@dataclass(slots=True)
class Slots:
    weight: Any
    step: int = 0


class Flat:
    def __init__(self, weight: Any, context: Any) -> None:
        self.weight = weight
        self.context = context


class Copied(Flat):
    pass


class Attributes:
    def __init__(self, weight: Any) -> None:
        self.weight = weight


register(Flat, lambda flat: ([flat.weight], [flat.context]), lambda parts, context: Flat(parts[0], context[0]))
register(Copied, lambda flat: ([flat.weight.clone()], None), lambda parts, context: Copied(parts[0], context))
register(Attributes)

CLASSES = [State, Frozen, Slots]


def objects(value: float, number: int) -> dict[str, Any]:
    def made() -> torch.Tensor:
        return torch.full((2,), value)

    return {
        "dataclass": State(made(), number),
        "in one another": State(State([made()], number), number),
        "slots": Slots({"a": made()}, number),
        "frozen": Frozen(made(), 7),
        "namespace": SimpleNamespace(a=made(), b=number),
        "arguments": argparse.Namespace(a=(made(),)),
        "registered": Flat(made(), 7),
        "attributes": Attributes(made()),
        "deque": deque([made(), number]),
    }


def tensors_of(tree: dict[str, Any]) -> list[torch.Tensor]:
    inner = tree["in one another"].weight.weight
    found = [tree[key].weight for key in ("dataclass", "frozen", "registered", "attributes")]
    return [*found, *inner, tree["slots"].weight["a"], tree["namespace"].a, *tree["arguments"].a, tree["deque"][0]]


@pytest.mark.parametrize("in_place", [False, True])
async def test_tensors_in_objects_take_values(tmp_path: Path, in_place: bool) -> None:
    await aiostage.save(objects(1.0, 5) | {"plain": State(1, 2), "rewards": deque([1, 2, 3])}, tmp_path / "a")
    live = objects(0.0, 2) | {"plain": State(3, 4), "rewards": deque([0.5], maxlen=3)}
    before, tensors = dict(live), tensors_of(live)
    await aiostage.load(tmp_path / "a", into=live, in_place=in_place, classes=CLASSES)
    assert [tensor.tolist() for tensor in tensors] == [[1.0, 1.0]] * len(tensors)
    assert all(tensor is now for tensor, now in zip(tensors, tensors_of(live), strict=True))
    assert [key for key in live if live[key] is not before[key]] == ["plain", "rewards"]
    assert (live["dataclass"].step, live["in one another"].weight.step, live["slots"].step) == (5, 5, 5)
    assert (live["namespace"].b, live["deque"][1]) == (5, 5)
    # What has no tensors in it is a value, and takes the live one's place.
    assert (live["plain"], list(live["rewards"])) == (State(1, 2), [1, 2, 3])


ONE, TWO = torch.ones(1), torch.ones(2)
UNFIT: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "frozen": (lambda: Frozen(ONE * 0, 3), Frozen(ONE, 4), r"\['a'\]\.step \(4 instead of 3 in what cannot be changed"),
    "copies": (lambda: Copied(ONE * 0, 1), Copied(ONE, 1), r"\['a'\]\.0 \(the Copied is taken apart into copies"),
    "context": (lambda: Flat(ONE * 0, 1), Flat(ONE, 2), r"\['a'\]\.context \(another list of 1 in a Flat"),
    "another class": (lambda: State(ONE * 0), Slots(ONE), r"\['a'\] \(a Slots into a State that has tensors in it"),
    "a number": (lambda: State(ONE * 0), 3, r"\['a'\] \(a int into a State that has tensors in it"),
    "a set": (lambda: {ONE * 0}, {ONE}, r"\['a'\] \(a set has tensors in it that cannot be told"),
    "a shape": (lambda: State(TWO * 0), State(ONE), r"\['a'\]\.weight \(torch\.float32 \(1,\) into"),
    "attributes": (
        lambda: SimpleNamespace(a=ONE * 0, b=1),
        SimpleNamespace(a=ONE, c=1),
        r"missing from the checkpoint: state_dict\['a'\]\.b; unexpected in the checkpoint: state_dict\['a'\]\.c",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
async def test_objects_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    make, saved, reason = UNFIT[kind]
    await aiostage.save({"a": saved, "b": ONE}, tmp_path / "a")
    live = {"a": make(), "b": ONE * 0}
    before = dict(live)
    with pytest.raises(CheckpointMismatchError, match=reason):
        await aiostage.load(tmp_path / "a", into=live, classes=CLASSES)
    assert all(live[key] is before[key] for key in live)
    assert live["b"].tolist() == [0.0]


@pytest.mark.parametrize("second", [1, 2])
async def test_one_live_container_in_several_places(tmp_path: Path, second: int) -> None:
    """It can have one value for a key, not two."""
    await aiostage.save({"a": {"x": 1}, "b": {"x": second}, "c": [Slots(1), ONE]}, tmp_path / "a")
    shared = {"x": 0}
    live = {"a": shared, "b": shared, "c": [Slots(0), ONE * 0]}
    if second == 1:
        await aiostage.load(tmp_path / "a", into=live, classes=CLASSES)
        assert (shared, live["c"]) == ({"x": 1}, [Slots(1), ONE])
        return
    with pytest.raises(
        CheckpointMismatchError, match=r"\['b'\]\['x'\] \(what it is in is one object in several places"
    ):
        await aiostage.load(tmp_path / "a", into=live, classes=CLASSES)
    assert (shared, live["c"]) == ({"x": 0}, [Slots(0), ONE * 0])


def lazy() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d())


async def test_lazy_parameters(tmp_path: Path) -> None:
    saved = lazy().state_dict()
    saved["0.weight"].tag = "a"
    await aiostage.save(saved, tmp_path / "a")
    loaded = await aiostage.load(tmp_path / "a")
    assert {key: type(value) for key, value in loaded.items()} == {key: type(value) for key, value in saved.items()}
    assert [value.requires_grad for value in loaded.values()] == [value.requires_grad for value in saved.values()]
    assert loaded["0.weight"].tag == "a"
    lazy().load_state_dict(loaded)
    live = lazy().state_dict()
    weight = live["0.weight"]
    await aiostage.load(tmp_path / "a", into=live)
    assert live["0.weight"] is weight
    assert weight.tag == "a"


async def test_lazy_parameters_and_others(tmp_path: Path) -> None:
    model = lazy()
    await aiostage.save(model.state_dict(), tmp_path / "lazy")
    live = lazy().state_dict()
    model(torch.ones(2, 4))
    with pytest.raises(CheckpointMismatchError, match="the loaded tensor is a UninitializedParameter, which has no sh"):
        await aiostage.load(tmp_path / "lazy", into=model.state_dict())
    await aiostage.save(model.state_dict(), tmp_path / "initialized")
    with pytest.raises(
        CheckpointMismatchError, match="the live tensor is a UninitializedParameter, which has no shape"
    ):
        await aiostage.load(tmp_path / "initialized", into=live)
    into = lazy()
    await aiostage.load(tmp_path / "initialized", into=into)
    assert torch.equal(into[0].weight, model[0].weight)
