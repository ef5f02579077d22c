"""Objects of users' classes: what comes back with their class, without it, and what is refused."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import aiostage
from aiostage.checkpoint import PlainObject, register


class Color(enum.Enum):
    RED = "r"
    BLUE = ("b", 2)


class Level(enum.IntEnum):
    LOW = 1


class Name(enum.StrEnum):
    A = "a"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Config:
    lr: float
    weight: torch.Tensor
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: int
    y: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    x: int
    color: Color = Color.RED


class Pair(NamedTuple):
    left: Any
    right: Any


Old = namedtuple("Old", "a b")


class Labelled(torch.Tensor):
    pass


class Special(torch.nn.Parameter):
    pass


class Stack:
    """A class that says how it is flattened."""

    def __init__(self, items: Iterable[Any], depth: int) -> None:
        self.items = list(items)
        self.depth = depth


class State:
    """A plain class that is made of its attributes."""

    def __init__(self, absmax: torch.Tensor) -> None:
        self.absmax = absmax
        self.shape = torch.Size([2])


register(
    Stack, lambda stack: (stack.items, {"depth": stack.depth}), lambda items, context: Stack(items, context["depth"])
)
register(State)

CLASSES = [Color, Level, Name, Right, Config, Frozen, Slots, Pair, Old, Labelled, Special, TwoTensor]


async def load_both(tree: Any, tmp_path: Path, **options: Any) -> Any:
    """Save a tree, with a stager's copy and without; and load both."""
    await aiostage.save(tree, tmp_path / "plain", overwrite=True)
    await aiostage.save(tree, tmp_path / "staged", overwrite=True)
    plain = await aiostage.load(tmp_path / "plain", **options)
    staged = await aiostage.load(tmp_path / "staged", **options)
    assert re.sub("0x[0-9a-f]+", "", repr(plain)) == re.sub("0x[0-9a-f]+", "", repr(staged))
    return plain


@pytest.mark.asyncio
async def test_enumerations(tmp_path: Path) -> None:
    tree = {"all": [Color.RED, Color.BLUE, Level.LOW, Name.A, Right.READ | Right.WRITE, Right(0)], Color.RED: 1}
    loaded = await load_both(tree, tmp_path, classes=CLASSES)
    assert loaded == tree
    assert loaded["all"][0] is Color.RED
    plain = (await load_both(tree, tmp_path))["all"]
    assert [type(item) for item in plain] == [PlainObject] * 6
    assert plain[1].class_name == f"{__name__}.Color"
    assert plain[1].fields == {"name": "BLUE", "value": ("b", 2)}
    assert plain[4].fields == {"name": None, "value": 3}


@pytest.mark.asyncio
async def test_dataclasses(tmp_path: Path) -> None:
    config = Config(0.1, torch.arange(3.0), ["a"])
    config.extra = [config]  # type: ignore[attr-defined]
    tree = {"config": config, "frozen": Frozen(1, (2, 3)), "slots": Slots(2, Color.BLUE), Frozen(4): 5}
    loaded = await load_both(tree, tmp_path, classes=CLASSES)
    assert loaded["config"].weight.tolist() == [0, 1, 2]
    assert loaded["config"].extra[0] is loaded["config"]
    assert loaded["config"].names == ["a"]
    assert (loaded["frozen"], loaded["slots"]) == (tree["frozen"], tree["slots"])
    assert loaded[Frozen(4)] == 5
    plain = await load_both(tree, tmp_path)
    assert plain["config"].kind == "dataclass"
    assert plain["config"].fields["lr"] == 0.1
    assert plain["config"].fields["extra"] == [plain["config"]]
    assert plain["slots"].fields["color"].fields["name"] == "BLUE"


@pytest.mark.asyncio
async def test_named_tuples(tmp_path: Path) -> None:
    tree = [Pair(1, torch.ones(2)), Old([1], None)]
    loaded = await load_both(tree, tmp_path, classes=CLASSES)
    assert type(loaded[0]) is Pair
    assert loaded[0].right.tolist() == [1, 1]
    assert loaded[1] == tree[1]
    assert type(loaded[1]) is Old
    assert (await load_both(tree, tmp_path))[1].fields == {"a": [1], "b": None}


@pytest.mark.asyncio
async def test_registered_classes(tmp_path: Path) -> None:
    tree = {"stack": Stack([torch.ones(2), {"a": 1}], 3), "state": State(torch.ones(1))}
    loaded = await load_both(tree, tmp_path)
    assert type(loaded["stack"]) is Stack
    assert loaded["stack"].depth == 3
    assert loaded["stack"].items[1] == {"a": 1}
    assert type(loaded["state"]) is State
    assert loaded["state"].shape == torch.Size([2])


def labelled() -> torch.Tensor:
    made = torch.arange(3.0).as_subclass(Labelled)
    made.label = "x"  # type: ignore[attr-defined]
    return made


def special() -> Special:
    made = Special(torch.arange(2.0))
    made.state = State(torch.ones(1))  # type: ignore[attr-defined]
    return made


@pytest.mark.asyncio
async def test_tensor_subclasses(tmp_path: Path) -> None:
    wrapper = TwoTensor(torch.ones(2, 2), torch.zeros(2, 2))
    tree = {"a": labelled(), "b": special(), "c": wrapper, "d": torch.nn.Parameter(wrapper), "tied": torch.ones(1)}
    tree["e"] = tree["tied"].as_subclass(Labelled)
    loaded = await load_both(tree, tmp_path, classes=CLASSES)
    assert type(loaded["a"]) is Labelled
    assert loaded["a"].label == "x"
    assert type(loaded["b"]) is Special
    assert loaded["b"].requires_grad
    assert loaded["b"].state.absmax.tolist() == [1]
    assert type(loaded["c"]) is TwoTensor
    assert loaded["c"].b.tolist() == [[0, 0], [0, 0]]
    assert isinstance(loaded["d"], torch.nn.Parameter)
    assert type(loaded["d"]) is TwoTensor
    assert loaded["d"].requires_grad
    assert loaded["e"].data_ptr() == loaded["tied"].data_ptr()
    plain = await load_both(tree, tmp_path)
    assert plain["a"].fields["attributes"] == {"label": "x"}
    assert plain["a"].fields["data"].tolist() == [0, 1, 2]
    assert plain["c"].fields["inner"]["a"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.asyncio
async def test_what_was_loaded_without_its_class_is_saved_as_it_was(tmp_path: Path) -> None:
    tree = [Color.RED, Config(1, torch.ones(1)), Slots(1), Pair(1, 2), labelled(), Stack([1], 2)]
    tree.append(TwoTensor(torch.ones(2), torch.zeros(2)))
    await aiostage.save(tree, tmp_path / "first")
    await aiostage.save(await aiostage.load(tmp_path / "first"), tmp_path / "second")
    first = (tmp_path / "first" / "manifest.json").read_bytes().splitlines()
    second = (tmp_path / "second" / "manifest.json").read_bytes().splitlines()
    assert first[3:-1] == second[3:-1]
    loaded = await aiostage.load(tmp_path / "second", classes=CLASSES)
    assert [type(item) for item in loaded] == [type(item) for item in tree]


@pytest.mark.asyncio
async def test_classes_declared_to_torch_count_as_passed(tmp_path: Path) -> None:
    await aiostage.save([Level.LOW], tmp_path / "checkpoint")
    with torch.serialization.safe_globals([Level]):
        assert (await aiostage.load(tmp_path / "checkpoint"))[0] is Level.LOW
    assert type((await aiostage.load(tmp_path / "checkpoint"))[0]) is PlainObject


def renamed(cls: type, **changes: Any) -> Any:
    """Return a class of the same name that has changed since."""
    made = dataclasses.make_dataclass(cls.__name__, [(name, Any, value) for name, value in changes.items()])
    made.__module__, made.__qualname__ = cls.__module__, cls.__qualname__
    return made


@pytest.mark.asyncio
async def test_classes_that_have_changed_since(tmp_path: Path) -> None:
    await aiostage.save({"frozen": Frozen(1), "level": Level.LOW, "pair": Pair(1, 2)}, tmp_path / "checkpoint")
    loaded = await aiostage.load(
        tmp_path / "checkpoint", classes=[renamed(Frozen, x=0, new=dataclasses.field(default_factory=list))]
    )
    assert vars(loaded["frozen"]) == {"x": 1, "y": (), "new": []}
    with pytest.raises(aiostage.CheckpointError, match="field 'new' without a default") as caught:
        await aiostage.load(tmp_path / "checkpoint", classes=[renamed(Frozen, new=dataclasses.field())])
    assert caught.value.remedy is not None
    moved = enum.IntEnum("Level", {"LOW": 7})
    moved.__module__, moved.__qualname__ = __name__, "Level"
    with pytest.raises(aiostage.CheckpointError, match="has the value 7 for LOW, and the checkpoint 1"):
        await aiostage.load(tmp_path / "checkpoint", classes=[moved])
    other = namedtuple("Pair", "left")
    other.__module__, other.__qualname__ = __name__, "Pair"
    with pytest.raises(aiostage.CheckpointError, match="does not have the fields left, right"):
        await aiostage.load(tmp_path / "checkpoint", classes=[other])


@pytest.mark.asyncio
async def test_into_a_live_tree(tmp_path: Path) -> None:
    await aiostage.save({"level": Level.LOW, "t": torch.ones(1)}, tmp_path / "checkpoint")
    live = {"level": Level.LOW, "t": torch.zeros(1)}
    with pytest.raises(aiostage.CheckpointMismatchError, match=r"pass classes=\[Level\]"):
        await aiostage.load(tmp_path / "checkpoint", into=live)
    assert live["t"].tolist() == [0]
    await aiostage.load(tmp_path / "checkpoint", into=live, classes=[Level])
    assert live == {"level": Level.LOW, "t": torch.ones(1)}


@pytest.mark.asyncio
async def test_into_live_wrappers(tmp_path: Path) -> None:
    saved = TwoTensor(torch.ones(2), torch.full((2,), 2.0))
    await aiostage.save({"w": saved}, tmp_path / "checkpoint")
    live = TwoTensor(torch.zeros(2), torch.zeros(2))
    inner = live.a
    await aiostage.load(tmp_path / "checkpoint", into={"w": live}, classes=[TwoTensor])
    assert live.a is inner
    assert (live.a.tolist(), live.b.tolist()) == ([1, 1], [2, 2])


@pytest.mark.asyncio
async def test_a_registered_object_that_contains_itself_is_refused(tmp_path: Path) -> None:
    stack = Stack([], 1)
    inside: list[Any] = [stack]
    stack.items.append({"again": inside})
    with pytest.raises(aiostage.UnsupportedLeafError, match="contains itself"):
        await aiostage.save({"stack": stack}, tmp_path / "checkpoint")
    # Twice in one tree is no circle.
    twice = Stack([1], 1)
    loaded = await load_both([Stack([twice, [twice]], 2), twice], tmp_path)
    assert loaded[0].items[0] is loaded[0].items[1][0] is loaded[1]


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="takes a class"):
        register(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="or none of the two"):
        register(Pair, lambda pair: (list(pair), None))
    with pytest.raises(TypeError, match="hold more than attributes"):
        register(type("Mine", (dict,), {}))


@pytest.mark.asyncio
@pytest.mark.parametrize("classes", [Color, "Color", 5, ["Color"]])
async def test_classes_that_are_none(classes: Any, tmp_path: Path) -> None:
    await aiostage.save([Color.RED], tmp_path / "checkpoint")
    with pytest.raises(TypeError, match="classes must be"):
        await aiostage.load(tmp_path / "checkpoint", classes=classes)


@pytest.mark.asyncio
async def test_an_unflatten_that_fails_is_reported(tmp_path: Path) -> None:
    class Odd:
        pass

    def fail(children: list[Any], context: Any) -> Odd:
        raise KeyError("gone")

    register(Odd, lambda odd: ([], None), fail)
    await aiostage.save([Odd()], tmp_path / "checkpoint")
    with pytest.raises(aiostage.CheckpointError, match=r"Odd could not be made again: KeyError: 'gone'"):
        await aiostage.load(tmp_path / "checkpoint")


class Packed:
    """A class whose flatten function looks at the values of its tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors


def pack(packed: Packed) -> tuple[list[Any], Any]:
    return [torch.cat([tensor + 1 for tensor in packed.tensors.values()])], list(packed.tensors)


register(Packed, pack, lambda children, names: (children[0], names))


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_functions_see_values_and_not_memory_that_is_being_filled(tmp_path: Path) -> None:
    for step in range(5):
        tensors = {str(number): torch.full((1 << 20,), float(number + step)) for number in range(8)}
        state = {"before": torch.full((4 << 20,), float(step)), "packed": Packed(tensors)}
        expected = pack(state["packed"])[0][0]  # type: ignore[arg-type]
        await aiostage.save(state, tmp_path / f"saved-{step}")
        async with aiostage.Checkpointer(tmp_path / "run") as checkpoints:
            await checkpoints.save(step, state)
        for place in (tmp_path / f"saved-{step}", tmp_path / "run" / f"step-{step:08}"):
            data, names = (await aiostage.load(place))["packed"]
            assert torch.equal(data, expected)
            assert names == list(tensors)


@pytest.mark.asyncio
async def test_functions_need_room_for_all_that_they_look_at(tmp_path: Path) -> None:
    state = {"packed": Packed({str(number): torch.full((1 << 20,), float(number)) for number in range(4)})}
    async with aiostage.AsyncStager(aiostage.StagingOptions(max_host_bytes=24 << 20)) as stager:
        with pytest.raises(aiostage.HostMemoryError, match="Raise max_host_bytes"):
            await aiostage.save(state, tmp_path / "checkpoint", stager=stager)
    async with aiostage.AsyncStager() as stager:
        await aiostage.save(state, tmp_path / "checkpoint", stager=stager)
