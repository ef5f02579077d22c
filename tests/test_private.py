"""Private names of PyTorch, CPython and anyio: each one can be gone, and no byte is wrong for it."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import AsyncStager, StagingOptions, UnsupportedLeafError, _private
from aiostage._capture import faithful
from aiostage.format.composites import assemble, take_apart

ROOT = Path(aiostage.__file__).parent


def test_a_name_that_is_gone_is_none() -> None:
    assert _private.find("torch._C.no_such_name") is None
    assert _private.find("no_such_module.at.all") is None
    assert _private.find("torch._foreach_copy_") is torch._foreach_copy_


def test_each_name_says_what_happens_without_it() -> None:
    source = inspect.getsource(_private)
    looked_up = set(re.findall(r"^(\w+): .* = find\(", source, re.M))
    assert looked_up | set(_private.DISTRIBUTED) | set(_private.ACCELERATE) == set(_private.CONSEQUENCES)


def test_what_is_required_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_private.DISTRIBUTED, "storage_setup", "torch.no_such_name")
    with pytest.raises(RuntimeError, match="lacks storage_setup"):
        _private.require("storage_setup")


def test_a_part_is_found_without_the_private_function(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.arange(12.0).reshape(3, 4)
    known = _private.narrow_by_index(source, (1, 2), (2, 1))
    monkeypatch.setitem(_private.DISTRIBUTED, "narrow_tensor_by_index", "torch.no_such_name")
    assert torch.equal(_private.narrow_by_index(source, (1, 2), (2, 1)), known)


class Slotted:
    __slots__ = ("__hidden", "plain")


class Below(Slotted):
    __slots__ = ("more",)


def test_slots_are_found_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    known = _private.slot_names(Below)
    monkeypatch.setattr(_private, "_slotnames", None)
    assert sorted(_private.slot_names(Below)) == sorted(known) == ["_Slotted__hidden", "more", "plain"]


def odd_leaves() -> dict[str, Any]:
    base = torch.arange(6.0)
    return {
        "plain": base,
        "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "view": base[2:4],
    }


def check_same(source: dict[str, Any], result: dict[str, Any]) -> None:
    for key, tensor in source.items():
        assert type(result[key]) is type(tensor)
        assert result[key].shape == tensor.shape
        assert torch.equal(result[key].to_dense(), tensor.to_dense()), key


def staged(tree: Any, options: StagingOptions | None = None) -> Any:
    async def run() -> Any:
        async with AsyncStager(options) as stager:
            for _ in range(3):
                result = await stager.stage(tree)
            return result

    return asyncio.run(run())


async def restored(copy: Any, live: Any) -> None:
    async with AsyncStager() as stager:
        await stager.restore(copy, into=live)


@pytest.mark.parametrize("name", sorted(_private.CONSEQUENCES))
def test_without_it_nothing_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in _private.DISTRIBUTED:
        monkeypatch.setitem(_private.DISTRIBUTED, name, "torch.no_such_name")
    elif name in _private.ACCELERATE:
        monkeypatch.setitem(_private.ACCELERATE, name, "_no_such_name")
        with pytest.raises(RuntimeError, match="lacks _no_such_name"):
            _private.prepared_by(object(), name.removeprefix("prepared_"))
    else:
        monkeypatch.setattr(_private, name, None)
    source = odd_leaves()
    if name == "version_of":
        with pytest.raises(UnsupportedLeafError, match="detect_torn=False"):
            staged(source)
        copy = staged(source, StagingOptions(detect_torn=False))
        check_same(source, copy)
        live = odd_leaves()
        live["parameter"].data.zero_()
        asyncio.run(restored(copy, live))
        check_same(source, live)
        return
    result = staged(source)
    check_same(source, result)
    assert result["parameter"].requires_grad


def broken(*args: object, **keywords: object) -> Any:
    raise RuntimeError("changed")


class Credulous:
    """A guard that takes anything for what it was made of."""

    def __init__(self, *tensors: torch.Tensor, **keywords: object) -> None:
        pass

    def check(self, *tensors: torch.Tensor) -> bool:
        return True


@pytest.mark.parametrize(
    ("name", "instead"),
    [("raw_repr", lambda keys: 7), ("raw_repr", broken), ("TensorGuards", broken), ("TensorGuards", Credulous)],
    ids=["keys that are all alike", "keys that cannot be read", "a guard that raises", "a guard that knows anything"],
)
def test_what_answers_otherwise_than_expected_is_not_believed(
    name: str, instead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_private, name, instead)
    monkeypatch.setattr(faithful, "_keys_are_proven", cache(faithful._keys_are_proven.__wrapped__))
    base = torch.arange(6.0)

    async def run() -> None:
        # Among odd leaves nothing is guarded; plain ones are from their third staging on.
        for source in (odd_leaves(), {"plain": base, "more": torch.ones(3)}):
            async with AsyncStager() as stager:
                for _ in range(5):
                    check_same(source, await stager.stage(source))
                # The same memory in another shape.
                source["plain"] = source["plain"].reshape(2, 3)
                check_same(source, await stager.stage(source))

    asyncio.run(run())


IMPORTED_IN_A_MODE = """
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode():
    import aiostage
from aiostage._capture.faithful import keys_tell_leaves_apart
print(keys_tell_leaves_apart())
"""


def test_a_mode_that_is_active_at_the_import_decides_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED_IN_A_MODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{faithful.keys_tell_leaves_apart()}\n"), done.stderr


@pytest.mark.filterwarnings("ignore")
def test_without_its_rebuilder_a_quantized_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8)
    monkeypatch.setattr(_private, "rebuild_qtensor", None)
    with pytest.raises(UnsupportedLeafError, match="quantized"):
        staged([source])


@pytest.mark.filterwarnings("ignore")
def test_where_it_cannot_be_told_whether_it_has_a_quantizer_a_tensor_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8)
    monkeypatch.setattr(_private, "cdata", None)
    with pytest.raises(UnsupportedLeafError, match="does not tell whether it has a quantizer"):
        staged([source])
    with pytest.raises(ValueError, match="no quantizer"):
        take_apart(source)


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_quantizer_is_not_taken_apart() -> None:
    """Asking for the scheme would end the process, or be an internal error of PyTorch's."""
    quantized = torch.quantize_per_tensor(torch.ones(8), 0.5, 3, torch.quint8)
    for without in (quantized.view(torch.quint8), torch.empty(4, dtype=torch.quint8)):
        with pytest.raises(ValueError, match="no quantizer"):
            take_apart(without)
    assert take_apart(quantized) is not None


@pytest.mark.parametrize("name", ["sparse_indices", "sparse_values"])
def test_without_its_readers_a_file_takes_coalesced_sparse_tensors_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (3,), check_invariants=True)
    monkeypatch.setattr(_private, name, None)
    with pytest.raises(ValueError, match="not coalesced"):
        take_apart(source)
    taken = take_apart(source.coalesce())
    assert taken is not None
    kind, parts, form = taken
    assert assemble(kind, list(parts.values()), form).to_dense().tolist() == [0.0, 5.0, 0.0]


def test_no_other_module_uses_private_names() -> None:
    pattern = re.compile(
        r"torch\._[a-zA-Z]|torch\.Tensor\._[a-z]|torch\.[a-z_.]+\._[a-z]|copyreg\._|anyio\._|sys\._current|\._cdata"
        r"|\._extra_reducers|accelerator\._[a-z]"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "_private.py" and path.relative_to(ROOT).parts[0] != "testing"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line.split("#")[0]) and "``" not in line and "full_name(" not in line
    ]
    assert found == []


def deepcopied(count: int) -> list[torch.Tensor]:
    tensors = [torch.zeros(1) for _ in range(count)]
    # It leaves an empty dictionary of attributes on each tensor that it copies.
    copy.deepcopy(tensors)
    return tensors


def test_attributes_are_looked_for_in_many_tensors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    find = gc.get_referents

    def counting(*tensors: object) -> list[Any]:
        asked.append(len(tensors))
        return find(*tensors)

    tensors = deepcopied(256)
    tensors[5] = torch.nn.Parameter(tensors[5])
    monkeypatch.setattr(gc, "get_referents", counting)
    assert not _private.have_attributes(tensors)
    assert asked == [256] or sys.version_info >= (3, 14)


@pytest.mark.parametrize("value", [None, 0, "", {}, [], ()])
def test_an_attribute_of_any_value_is_found(value: object) -> None:
    tensors = deepcopied(3)
    tensors[1].attribute = value  # type: ignore[attr-defined]
    assert _private.have_attributes(tensors)
    fresh = torch.zeros(1)
    fresh.attribute = value  # type: ignore[attr-defined]
    assert _private.have_attributes((fresh,))


def test_what_else_a_tensor_refers_to_is_no_attribute() -> None:
    tensors = deepcopied(3)
    tensors[1].requires_grad_().register_hook(lambda gradient: None)
    assert not _private.have_attributes(tensors)


def test_no_code_of_objects_in_slots_is_called() -> None:
    class Unasked:
        def __bool__(self) -> bool:
            raise AssertionError("asked whether it is true")

    class WithSlot(torch.Tensor):
        __slots__ = ("kept",)

    tensor = torch.zeros(1).as_subclass(WithSlot)
    tensor.kept = Unasked()
    assert not _private.have_attributes((*deepcopied(3), tensor))
