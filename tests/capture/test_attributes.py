"""What hangs on tensors, on their gradients, and on the tensors that they are made of."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict, deque
from typing import Any

import pytest
import torch

from aiostage import AsyncStager, StagingOptions, TornSnapshotError
from tests.fuzz.classes import DictKind, ListKind, Marked, OwnCopy, Plain, Slotted, SlotTensor, Wrapper
from tests.fuzz.describing import describe, difference

pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("ignore::UserWarning")]


class Other(torch.Tensor):
    """Another subclass with memory of its own."""


class Line(deque[int]):
    """A deque that may have attributes."""


def with_gradient(tensor: Any, gradient: Any) -> Any:
    tensor.grad = gradient
    return tensor


def marked(tensor: Any, /, **attributes: Any) -> Any:
    vars(tensor).update(attributes)
    return tensor


def jagged() -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def gradient_of_gradient() -> Any:
    inner = marked(torch.full((2,), 3.0), note=["inner"])
    return with_gradient(torch.ones(2), with_gradient(torch.full((2,), 2.0), inner))


def shared_by_gradients() -> Any:
    shared = [torch.ones(1)]
    one = with_gradient(torch.ones(2), marked(torch.zeros(2), shared=shared))
    return {"shared": shared, "one": one, "again": one.grad, "two": with_gradient(torch.ones(2), marked(one.grad * 2))}


def sparse_gradient() -> Any:
    leaf = torch.eye(2).to_sparse().requires_grad_()
    return with_gradient(leaf, marked(torch.eye(2).to_sparse(), note=[1], tensor=torch.ones(2)))


def parts() -> Any:
    left, right = marked(torch.ones(2), note=[1, torch.ones(1)]), with_gradient(torch.zeros(2), torch.ones(2))
    return [left.note, Wrapper(left, right)]


def nested_parts() -> Any:
    inner = Wrapper(torch.ones(2), marked(torch.zeros(2), note={"deep": torch.ones(3)}))
    return Wrapper(inner, torch.ones(2))


def jagged_parts() -> Any:
    nested = jagged()
    marked(nested._values, note=[torch.ones(1)])
    return nested


TREES = {
    "gradient": lambda: with_gradient(torch.ones(2), marked(torch.zeros(2), note="text", tensor=torch.ones(2))),
    "gradient of a gradient": gradient_of_gradient,
    "gradient with what the tree has": shared_by_gradients,
    "gradient with many": lambda: with_gradient(
        torch.ones(2), marked(torch.zeros(2), **{f"n{n}": [n] for n in range(900)})
    ),
    "gradient with an object": lambda: with_gradient(
        torch.ones(2), marked(torch.zeros(2), own=OwnCopy([torch.ones(1)]))
    ),
    "gradient of a subclass": lambda: with_gradient(
        torch.ones(2).as_subclass(Marked), marked(torch.zeros(2).as_subclass(Marked), note=[1])
    ),
    "gradient inside an object": lambda: OwnCopy(
        with_gradient(torch.ones(2), marked(torch.zeros(2), own=OwnCopy([1])))
    ),
    "sparse gradient": sparse_gradient,
    "parts": parts,
    "parts of parts": nested_parts,
}


@pytest.mark.parametrize(
    "options", [StagingOptions(), StagingOptions(max_loop_hold=1e-9)], ids=["large", "small steps"]
)
@pytest.mark.parametrize("name", TREES)
async def test_come_out_as_deepcopy_copies_them(name: str, options: StagingOptions) -> None:
    tree = {"here": TREES[name](), "before": torch.ones(1)}
    try:
        with torch.no_grad():
            expected = copy.deepcopy(tree)
    except RuntimeError:
        # PyTorch copies no subclass without a clone() and new_empty() of its own, nor sparse gradients.
        expected = tree
    async with AsyncStager(options) as stager:
        for _ in range(3):
            assert difference(describe(expected), describe(await stager.stage(tree))) is None


async def test_those_of_parts_are_there() -> None:
    async with AsyncStager() as stager:
        staged = await stager.stage({"parts": parts(), "jagged": jagged_parts()})
    note, wrapper = staged["parts"]
    assert wrapper.left.note is note
    assert wrapper.right.grad.tolist() == [1, 1]
    assert staged["jagged"]._values.note[0].tolist() == [1]


CHANGED = {
    "new on a tensor": (lambda: torch.ones(2), lambda tensor: marked(tensor, new=1)),
    "new on a gradient": (
        lambda: with_gradient(torch.ones(2), torch.zeros(2)),
        lambda tensor: marked(tensor.grad, new=1),
    ),
    "changed on a gradient": (
        lambda: with_gradient(torch.ones(2), marked(torch.zeros(2), note=1)),
        lambda tensor: marked(tensor.grad, note=2),
    ),
    "new on a subclass": (lambda: torch.ones(2).as_subclass(Marked), lambda tensor: marked(tensor, new=1)),
    "removed from a subclass": (
        lambda: marked(torch.ones(2).as_subclass(Marked), note=1),
        lambda tensor: vars(tensor).clear(),
    ),
    "changed on a subclass": (
        lambda: marked(torch.ones(2).as_subclass(Marked), note=1),
        lambda tensor: marked(tensor, note=2),
    ),
    "new in a slot": (lambda: torch.ones(2).as_subclass(SlotTensor), lambda tensor: setattr(tensor, "value", 1)),
    "new on a wrapper": (lambda: Wrapper(torch.ones(2), torch.ones(2)), lambda tensor: marked(tensor, new=1)),
    "another part of a wrapper": (
        lambda: Wrapper(torch.ones(2), torch.ones(2)),
        lambda tensor: setattr(tensor, "left", torch.zeros(2)),
    ),
    "another sparse tensor": (
        lambda: torch.eye(2).to_sparse(),
        lambda tensor: setattr(tensor, "data", torch.eye(2).to_sparse() * 3),
    ),
    "another quantized tensor": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.quint8),
        lambda tensor: setattr(tensor, "data", torch.quantize_per_tensor(torch.ones(2), 0.2, 0, torch.quint8)),
    ),
    "requires a gradient": (lambda: torch.ones(2), lambda tensor: tensor.requires_grad_()),
    "requires none": (lambda: torch.nn.Parameter(torch.ones(2)), lambda tensor: tensor.requires_grad_(False)),
    "sparse, requires a gradient": (lambda: torch.eye(2).to_sparse(), lambda tensor: tensor.requires_grad_()),
    "another class": (lambda: torch.ones(2).as_subclass(Marked), lambda tensor: setattr(tensor, "__class__", Other)),
    "materialized": (
        lambda: torch.nn.parameter.UninitializedParameter(),
        lambda tensor: tensor.materialize((2,)),
    ),
    "new on a part": (lambda: Wrapper(torch.ones(2), torch.ones(2)), lambda tensor: marked(tensor.left, new=1)),
}


@pytest.mark.parametrize("name", CHANGED)
async def test_changes_during_a_staging_are_torn(name: str) -> None:
    make, change = CHANGED[name]
    tensor = make()
    async with AsyncStager(StagingOptions(max_loop_hold=1e-9)) as stager:
        await stager.stage([tensor])
        async with stager.snapshot({"here": tensor, "more": [torch.ones(1) for _ in range(20)]}) as snapshot:
            change(tensor)
            with pytest.raises(TornSnapshotError) as caught:
                await snapshot.result()
            assert "['here']" in caught.value.paths[0]
            assert (await stager.stage([tensor])) is not None


class Bare:
    """Has no attributes at first."""


ADDED = {
    "an object": (lambda: Plain(1), lambda owner: vars(owner).update(new=1)),
    "an object without attributes": (Bare, lambda owner: vars(owner).update(new=1)),
    "an object with a slot": (lambda: Slotted(1), lambda owner: setattr(owner, "absent", 1)),
    "a list of its own class": (lambda: ListKind([1]), lambda owner: vars(owner).update(new=1)),
    "a dict of its own class": (lambda: DictKind(a=1), lambda owner: vars(owner).update(new=1)),
    "an ordered dict": (OrderedDict, lambda owner: vars(owner).update(new=1)),
    "an ordered dict with attributes": (
        lambda: marked(OrderedDict(a=1), old=1),
        lambda owner: vars(owner).update(new=1),
    ),
    "a deque of its own class": (lambda: Line([1]), lambda owner: vars(owner).update(new=1)),
}


@pytest.mark.parametrize("name", ADDED)
async def test_an_attribute_that_an_object_is_given_during_a_staging_is_torn(name: str) -> None:
    make, add = ADDED[name]
    owner = make()
    async with AsyncStager(StagingOptions(max_loop_hold=1e-9)) as stager:
        # All is met within the first steps; the tensor is there for something to be copied.
        async with stager.snapshot({"here": owner, "tensor": torch.ones(1)}) as snapshot:
            await snapshot.source_free()
            add(owner)
            with pytest.raises(TornSnapshotError) as caught:
                await snapshot.result()
        assert "['here']" in caught.value.paths[0]
        await stager.stage(owner)


async def test_a_cache_of_a_wrappers_class_is_no_change() -> None:
    wrapper = Wrapper(torch.ones(2), torch.ones(2))
    async with AsyncStager(StagingOptions(max_loop_hold=1e-9)) as stager, stager.snapshot([wrapper]) as snapshot:
        wrapper._cache = 1  # type: ignore[attr-defined]
        await snapshot.result()


class TestWithoutADictionary:
    """From Python 3.14 on, a tensor refers to its attributes themselves, until something asks for their dictionary."""

    @pytest.fixture(autouse=True)
    def _as_of_python_3_14(self, monkeypatch: pytest.MonkeyPatch) -> None:
        referents_of = gc.get_referents

        def get_referents(*items: Any) -> list[Any]:
            found = []
            for item in items:
                for referent in referents_of(item):
                    found += referent.values() if isinstance(referent, dict) else [referent]
            return found

        monkeypatch.setattr(gc, "get_referents", get_referents)

    async def test_come_out(self) -> None:
        tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
        tensor.note = 3  # type: ignore[attr-defined]
        parameter.twin = [parameter]  # type: ignore[attr-defined]
        async with AsyncStager() as stager:
            staged = await stager.stage({"plain": torch.ones(2), "t": tensor, "p": parameter})
            alone = await stager.stage(tensor)
        assert vars(staged["plain"]) == {}
        assert vars(staged["t"]) == vars(alone) == {"note": 3}
        assert staged["p"].twin[0] is staged["p"]

    async def test_those_that_are_new_at_the_capture_are_a_change(self) -> None:
        tree = {"a": torch.ones(1), "wide": [torch.ones(1) for _ in range(20_000)]}
        async with AsyncStager(StagingOptions(max_loop_hold=1e-6)) as stager:
            coroutine = stager.stage(tree)
            tree["a"].late = 1  # type: ignore[union-attr]
            with pytest.raises(TornSnapshotError, match=r"\['a'\]"):
                await coroutine


class Watching(torch.Tensor):
    """Has a property by the name of an attribute, and code that sees attributes being set."""

    seen: list[str] = []

    @property
    def shown(self) -> str:
        return "property"

    def __setattr__(self, name: str, value: Any) -> None:
        self.seen.append(name)
        super().__setattr__(name, value)


async def test_attributes_are_put_where_they_were_without_code_of_the_class() -> None:
    watching = marked(torch.ones(2).as_subclass(Watching), shown=[1], other=2)
    plain = marked(torch.ones(2))
    vars(plain)[5] = [torch.zeros(1)]  # type: ignore[index]
    async with AsyncStager() as stager:
        staged = await stager.stage([watching, plain])
    assert vars(staged[0]) == {"shown": [1], "other": 2}
    assert not Watching.seen
    assert torch.equal(vars(staged[1])[5][0], torch.zeros(1))
