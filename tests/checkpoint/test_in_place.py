from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import AsyncStager, CheckpointCorruptError, CheckpointMismatchError, TornSnapshotError
from aiostage.storage import LocalStorage
from aiostage.testing import SimulatedAccelerator, at_every_await
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.counting import CountingStorage
from tests.checkpoint.leftovers import nothing_left
from tests.checkpoint.test_load import tree
from tests.patience import seconds
from tests.warm import PYTHON

PART = 8 << 20

# The package has a function of that name, too.
loading_module = importlib.import_module("aiostage.checkpoint.loading")


def large(value: float) -> dict[str, Any]:
    """Return a tree of several parts, some leaves across the borders of parts."""
    value = float(value)
    return {
        "step": int(value),
        "a": torch.full((3_000_001,), value),
        "b": torch.full((2000, 1500), value).t(),
        "c": [torch.nn.Parameter(torch.full((3,), value)), torch.full((5_000_001,), int(value), dtype=torch.int8)],
        "d": torch.full((1_000_003,), value, dtype=torch.bfloat16),
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", [tree, large])
async def test_every_kind_of_live_tensor(tmp_path: Path, in_place: bool, make: Callable[[int], Any]) -> None:
    await aiostage.save(make(2), tmp_path / "checkpoint")
    live = make(1)
    addresses = [value.data_ptr() for value in live.values() if isinstance(value, torch.Tensor)]
    assert await aiostage.load(tmp_path / "checkpoint", into=live, in_place=in_place) is live
    assert_same(make(2), live)
    assert addresses == [value.data_ptr() for value in live.values() if isinstance(value, torch.Tensor)]


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
async def test_live_tensors_that_are_laid_out_otherwise(tmp_path: Path, in_place: bool) -> None:
    saved: dict[str, Any] = {
        "plain": torch.arange(24.0).view(4, 6),
        "turned": torch.arange(24.0).view(4, 6).t(),
        "negative": torch.arange(3.0),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]),
        "every other": torch.arange(5, dtype=torch.int16),
        "tied": [torch.ones(7)] * 2,
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "scalar": torch.tensor(4.0),
    }
    await aiostage.save(saved, tmp_path / "checkpoint")
    live: dict[str, Any] = {
        "plain": torch.zeros(6, 4).t(),
        "turned": torch.zeros(6, 4),
        "negative": torch.zeros(3, dtype=torch.complex64).conj().imag,
        "conjugate": torch.zeros(2, dtype=torch.complex64).conj(),
        "every other": torch.zeros(10, dtype=torch.int16)[::2],
        "tied": [torch.zeros(7), torch.zeros(7)],
        "odd": torch.zeros(6, dtype=torch.uint8)[::2].view(torch.float8_e8m0fnu),
        "scalar": torch.zeros(()),
    }
    assert live["negative"].is_neg()
    await aiostage.load(tmp_path / "checkpoint", into=live, in_place=in_place)
    saved |= {"tied": saved["tied"][0], "tied too": saved["tied"][1]}
    live |= {"tied": live["tied"][0], "tied too": live["tied"][1]}
    for name, value in saved.items():
        assert live[name].shape == value.shape
        assert live[name].resolve_neg().resolve_conj().tolist() == value.tolist(), name


@pytest.mark.asyncio
async def test_what_does_not_fit_is_said_before_anything_is_read(tmp_path: Path) -> None:
    await aiostage.save(large(2), tmp_path / "checkpoint")
    storage = CountingStorage(LocalStorage(tmp_path))
    for in_place in (False, True):
        storage.read_bytes.clear()
        live = large(1) | {"a": torch.zeros(3)}
        with pytest.raises(CheckpointMismatchError, match="'a'"):
            await aiostage.load((storage, "checkpoint"), into=live, in_place=in_place)
        # The part that the header is in.
        assert storage.read_bytes.total() <= PART
        assert_same(large(1) | {"a": torch.zeros(3)}, live)


@pytest.mark.asyncio
async def test_everything_is_read_once(tmp_path: Path) -> None:
    info = await aiostage.save(large(2), tmp_path / "checkpoint")
    size = (info.path / "model.safetensors").stat().st_size
    storage = CountingStorage(LocalStorage(tmp_path))
    for options in ({}, {"into": large(1)}, {"into": large(1), "in_place": True}):
        storage.read_bytes.clear()
        await aiostage.load((storage, "checkpoint"), **options)
        assert storage.read_bytes == {"model.safetensors": size}


@pytest.mark.asyncio
async def test_a_load_in_place_from_the_page_cache_makes_no_memory_for_a_part(tmp_path: Path) -> None:
    info = await aiostage.save(large(2), tmp_path / "checkpoint")
    # The save has written past the page cache. Read in pieces, since what is allocated is counted.
    with (info.path / "model.safetensors").open("rb") as file:
        while file.read(1 << 16):
            pass
    live = large(1)
    live["b"] = live["b"].contiguous()
    tracemalloc.start()
    try:
        await aiostage.load(info.path, into=live, in_place=True, only=["a", "c", "d"])
        await aiostage.load(info.path, into=live, in_place=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_same(large(2) | {"b": large(2)["b"].contiguous()}, live)
    assert peak < 3 << 20


@pytest.mark.asyncio
async def test_a_long_header_of_a_local_file(tmp_path: Path) -> None:
    # Longer than what is read of a file first, and followed by data in the same part.
    saved = {str(number): torch.tensor([float(number)]) for number in range(9000)}
    saved["large"] = torch.full((300_000,), 1.0)
    info = await aiostage.save(saved, tmp_path / "checkpoint")
    path = info.path / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert 512 << 10 < header < PART
    loaded = await aiostage.load(info.path)
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    for place in (7, header, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])
        with pytest.raises(CheckpointCorruptError, match="do not match their checksum"):
            await aiostage.load(info.path)


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
async def test_damage(tmp_path: Path, in_place: bool) -> None:
    info = await aiostage.save(large(2), tmp_path / "checkpoint")
    with (info.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    live = large(1)
    with pytest.raises(CheckpointCorruptError, match="do not match their checksum") as caught:
        await aiostage.load(info.path, into=live, in_place=in_place)
    assert caught.value.path == str(info.path / "model.safetensors")
    assert live["step"] == 1
    if in_place:
        assert "some have new values, some old ones" in caught.value.__notes__[0]
    else:
        assert not hasattr(caught.value, "__notes__")
        assert_same(large(1), live)


@pytest.mark.asyncio
async def test_nothing_to_be_in_place_in(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass into="):
        await aiostage.load(tmp_path / "checkpoint", in_place=True)


@pytest.mark.asyncio
async def test_cancelled_at_every_await(tmp_path: Path) -> None:
    await aiostage.save(tree(2), tmp_path / "checkpoint", max_shard_bytes=60)
    live = tree(1)

    async def load() -> None:
        await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)

    count = 0
    with nothing_left():
        async for _ in at_every_await(load):
            count += 1
            before = live["parameter"].tolist()
            await asyncio.sleep(0.002)
            assert live["parameter"].tolist() == before, "something still writes"
            assert live["step"] in (1, 2)
    assert count > 8
    await load()
    assert_same(tree(2), live)


@pytest.mark.asyncio
async def test_a_staging_meanwhile_notices(tmp_path: Path) -> None:
    await aiostage.save(large(2), tmp_path / "checkpoint")
    live = large(1)
    storage = CountingStorage(LocalStorage(tmp_path))
    async with AsyncStager() as stager, stager.snapshot(live) as snapshot:
        await aiostage.load((storage, "checkpoint"), into=live, in_place=True)
        with pytest.raises(TornSnapshotError, match=r"\['a'\]"):
            await snapshot.captured()
        # One that begins while parts are being read is torn too.
        reading, staged = asyncio.Event(), asyncio.Event()

        async def wait(name: str, offset: int) -> None:
            if offset:
                reading.set()
                await staged.wait()

        storage.before = wait
        load = asyncio.ensure_future(aiostage.load((storage, "checkpoint"), into=live, in_place=True))
        await reading.wait()
        async with stager.snapshot(live) as late:
            staged.set()
            await load
            with pytest.raises(TornSnapshotError):
                await late.captured()


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
async def test_devices(tmp_path: Path, in_place: bool) -> None:
    saved = large(2)
    await aiostage.save(saved, tmp_path / "checkpoint")
    for seed in range(5):
        with SimulatedAccelerator(2, seed=seed, spontaneous=True) as accelerator:
            first, second = accelerator.devices
            live = large(1)
            live["a"] = accelerator.to_device(live["a"], first)
            live["b"] = accelerator.to_device(large(1)["b"].contiguous(), second)
            live["d"] = accelerator.to_device(live["d"], second)
            # Work of the caller that is still under way when it calls, and more that comes afterwards.
            accelerator.launch(lambda t: t.fill_(9), live["a"], seconds=1e-3)
            await aiostage.load(tmp_path / "checkpoint", into=live, in_place=in_place, backend=accelerator)
            seen = accelerator.empty(live["a"].numel(), device=first)
            accelerator.launch(lambda to, source: to.copy_(source), seen, reads=[live["a"]])
            accelerator.synchronize()
            for name in ("a", "b", "d"):
                assert torch.equal(live[name], saved[name]), name
            assert torch.equal(seen, saved["a"])
            assert torch.equal(live["c"][1], saved["c"][1])
            assert live["step"] == 2


@pytest.mark.asyncio
async def test_a_device_that_fails(tmp_path: Path) -> None:
    await aiostage.save(large(2), tmp_path / "checkpoint")
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator:
        live = {name: accelerator.to_device(value) for name, value in large(1).items() if name in "abd"}
        accelerator.fail_next("copy", after=1)
        with pytest.raises(aiostage.StagingError) as caught:
            await aiostage.load(
                tmp_path / "checkpoint", into=live, only=["a", "b", "d"], in_place=True, backend=accelerator
            )
        assert caught.value.__notes__
        accelerator.recover()


MEMORY = """
import asyncio, resource, sys
import torch
import aiostage
from aiostage.testing import SimulatedAccelerator

where, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

accelerator = SimulatedAccelerator(memory_bytes=size + (64 << 20)) if where != "host" else None
live = {n: torch.ones(size // 16 // 4) for n in "0123456789abcdef"}
if accelerator:
    live = {n: accelerator.to_device(live.pop(n)) for n in list(live)}
    accelerator.synchronize()
if where == "anew":
    # Memory of the device, which the new tree gets and which is in the memory of this process already.
    live.clear()
options = {"device": accelerator.devices[0]} if where == "anew" else {"into": live, "in_place": True}

async def main():
    # Once, for memory that is allocated only once.
    await aiostage.load(path + "-small", only="0")
    before = peak()
    loaded = await aiostage.load(path, **options, **({"backend": accelerator} if accelerator else {}))
    print(peak() - before)
    assert len(loaded) == 16
    assert all(float(value.min()) == 2 == float(value.max()) for value in loaded.values())

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["host", "device", "anew"])
def test_host_memory_is_bounded(tmp_path: Path, where: str) -> None:
    size = 256 << 20
    saved = {n: torch.full((size // 64,), 2.0) for n in "0123456789abcdef"}
    asyncio.run(aiostage.save(saved, tmp_path / "checkpoint"))  # type: ignore[arg-type]
    asyncio.run(aiostage.save({"0": torch.zeros(3)}, tmp_path / "checkpoint-small"))  # type: ignore[arg-type]
    outcome = subprocess.run(
        [*PYTHON, "-c", MEMORY, where, str(tmp_path / "checkpoint"), str(size)],
        capture_output=True,
        text=True,
        timeout=seconds(60),
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert int(outcome.stdout) < 96 << 20, where


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    await aiostage.save(tree(2), tmp_path / "checkpoint")
    live = tree(1)
    with nothing_left():
        await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)
    assert_same(tree(2), live)


def before_the_plan(change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something done after the live tree was compared, and before the reads are planned."""
    planned = loading_module.plan_reads

    def change_first(*args: Any, **options: Any) -> Any:
        change()
        return planned(*args, **options)

    monkeypatch.setattr(loading_module, "plan_reads", change_first)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [2, 100])
async def test_a_live_tensor_that_is_resized_while_the_reads_are_planned(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await aiostage.save({"a": torch.arange(4.0), "b": torch.ones(3)}, tmp_path / "a")
    live = {"a": torch.zeros(4), "b": torch.zeros(3)}
    before_the_plan(lambda: live["a"].resize_(size), monkeypatch)
    with pytest.raises(CheckpointMismatchError, match=f"'a'.* now has {4 * size} bytes instead of 16.*resize"):
        await aiostage.load(tmp_path / "a", into=live, in_place=True)
    assert live["b"].tolist() == [0.0, 0.0, 0.0]


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "smaller": lambda live: live.resize_(2),
    # Four elements would be broadcast to eight.
    "more rows": lambda live: live.resize_(2, 4).zero_(),
    "another dtype": lambda live: setattr(live, "data", torch.zeros(4, dtype=torch.int32)),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("change", CHANGES)
async def test_a_live_tensor_that_is_replaced_while_its_values_are_read(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await aiostage.save({"a": torch.arange(4.0), "b": torch.ones(3)}, tmp_path / "a")
    live = {"a": torch.zeros(4), "b": torch.zeros(3)}
    before_the_plan(lambda: CHANGES[change](live["a"]), monkeypatch)
    with pytest.raises(CheckpointMismatchError, match=r"'a'.*torch\.float32 \(4,\) into torch\..*during the load"):
        await aiostage.load(tmp_path / "a", into=live)
    assert live["a"].count_nonzero() == live["b"].count_nonzero() == 0


class Slotted(torch.Tensor):
    __slots__ = ("scale",)


def slotted(value: float) -> Slotted:
    found = torch.full((2,), value).as_subclass(Slotted)
    found.scale = torch.full((1,), value)
    found.note = value
    return found


def with_gradient(value: float, gradient: float | None) -> torch.Tensor:
    found = torch.full((4,), float(value), requires_grad=True)
    found.grad = None if gradient is None else torch.full((4,), float(gradient))
    return found


def replaceable(value: float) -> dict[str, Any]:
    """Return a tree with live tensors in every place from which they can be taken."""
    found: dict[str, Any] = {
        "dict": {"a": torch.full((4,), value)},
        "list": [torch.full((4,), value), 1],
        "tuple": ({"a": torch.full((4,), value)}, [torch.full((2,), value)]),
        "gradient": with_gradient(value, value),
        "attribute": torch.full((4,), value),
        "slot": slotted(value),
    }
    found["attribute"].note = torch.full((4,), value)
    return found


REPLACEMENTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "in a dict": (lambda live: live["dict"].update(a=torch.zeros(4)), r"\['dict'\]\['a'\]"),
    "in a list": (lambda live: live["list"].__setitem__(0, torch.zeros(4)), r"\['list'\]\[0\]"),
    "by a number": (lambda live: live["dict"].update(a=1), r"\['dict'\]\['a'\]"),
    "of a dict": (lambda live: live["dict"].pop("a"), r"\['dict'\]\['a'\] \(it was removed"),
    "of a list": (lambda live: live["list"].clear(), r"\['list'\]\[0\] \(it was removed"),
    "with its dict": (lambda live: live.update(dict={"a": torch.zeros(4)}), r"\['dict'\]"),
    "with its tuple": (lambda live: live.update(tuple=({"a": torch.zeros(4)}, [])), r"\['tuple'\]"),
    "in a list of a tuple": (lambda live: live["tuple"][1].__setitem__(0, torch.zeros(2)), r"\['tuple'\]\[1\]\[0\]"),
    "a gradient": (lambda live: setattr(live["gradient"], "grad", None), r"\['gradient'\]\.grad"),
    "an attribute": (lambda live: setattr(live["attribute"], "note", torch.zeros(4)), r"\['attribute'\]\.note"),
    "a slot": (lambda live: setattr(live["slot"], "scale", torch.zeros(1)), r"\['slot'\]\.scale"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("change", REPLACEMENTS)
async def test_a_live_tensor_that_others_take_the_place_of_during_a_load(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one would keep its value, and the old one's is in no tree."""
    await aiostage.save(replaceable(1.0), tmp_path / "a")
    live = replaceable(0.0)
    before = [live["dict"]["a"], live["gradient"], live["gradient"].grad, live["attribute"].note, live["slot"].scale]
    replace, path = REPLACEMENTS[change]
    before_the_plan(lambda: replace(live), monkeypatch)
    with pytest.raises(CheckpointMismatchError, match=f"{path}.*during the load.*Do not put other tensors"):
        await aiostage.load(tmp_path / "a", into=live, classes=[Slotted])
    assert not any(tensor.any() for tensor in before)


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [False, True])
async def test_gradients_and_slots(tmp_path: Path, in_place: bool) -> None:
    """One that only the live tensor has is left alone, as an attribute is."""
    saved = {"both": with_gradient(1, 2), "new": with_gradient(1, 2), "old": with_gradient(1, None)}
    await aiostage.save(saved | {"slot": slotted(3.0)}, tmp_path / "a")
    live = {"both": with_gradient(0, 0), "new": with_gradient(0, None), "old": with_gradient(0, 5)}
    kept, scale = live["both"].grad, (slot := slotted(0.0)).scale
    await aiostage.load(tmp_path / "a", into=live | {"slot": slot}, in_place=in_place, classes=[Slotted])
    for name, gradient in (("both", 2.0), ("new", 2.0), ("old", 5.0)):
        assert live[name].tolist() == [1.0] * 4
        assert live[name].grad.tolist() == [gradient] * 4  # type: ignore[union-attr]
    assert live["both"].grad is kept
    assert slot.scale is scale
    assert (scale.tolist(), slot.note) == ([3.0], 3.0)
    # Only a part of a tensor is not the whole of it.
    for tensor in live.values():
        tensor.grad = None
    await aiostage.load(tmp_path / "a", into=live | {"slot": slot}, only="both", classes=[Slotted])
    assert live["both"].grad is not None
    assert live["new"].grad is None


@pytest.mark.asyncio
async def test_gradients_that_do_not_fit(tmp_path: Path) -> None:
    await aiostage.save({"a": with_gradient(1, 2)}, tmp_path / "a")
    sparse = torch.zeros(4, requires_grad=True)
    sparse.grad = torch.zeros(4).to_sparse()
    computed = torch.zeros(4, requires_grad=True) * 2
    for live, reason in ((sparse, "torch.sparse_coo"), (computed, "not a leaf of the autograd graph")):
        with pytest.raises(CheckpointMismatchError, match=rf"\['a'\]\.grad \(the live tensor is {reason}"):
            await aiostage.load(tmp_path / "a", into={"a": live})
        assert not live.any()
    # One live tensor in several places has one gradient, and two tensors of the checkpoint have two.
    for second, fits in ((2, True), (3, False)):
        source = with_gradient(1, 2)
        await aiostage.save({"a": source, "b": source if fits else with_gradient(1, second)}, tmp_path / str(second))
        shared = with_gradient(0, None)
        loading = aiostage.load(tmp_path / str(second), into={"a": shared, "b": shared})
        if fits:
            await loading
            assert shared.grad is not None
            assert shared.grad.tolist() == [2.0] * 4
        else:
            with pytest.raises(CheckpointMismatchError, match="shares memory with"):
                await loading
            assert shared.grad is None
    # Parameters keep theirs in a file no more than in a copy, and take those of tensors; a cast is one of both.
    live = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    await aiostage.load(tmp_path / "a", into={"a": live}, cast=True)
    assert live.grad is not None
    assert (live.tolist(), live.grad.tolist(), live.grad.dtype) == ([1.0] * 4, [2.0] * 4, torch.bfloat16)


@pytest.mark.asyncio
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
async def test_a_live_tensor_that_is_nested(layout: torch.layout, tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout)
    await aiostage.save({"a": torch.ones(2, 3)}, tmp_path / "plain")
    with pytest.raises(CheckpointMismatchError, match=r"\['a'\] \(the live tensor is nested\)"):
        await aiostage.load(tmp_path / "plain", into={"a": nested})
    if layout is torch.jagged:
        await aiostage.save({"a": nested}, tmp_path / "nested")
        for live, which in ((nested, "live"), (torch.zeros(2, 3), "loaded")):
            with pytest.raises(CheckpointMismatchError, match=rf"\['a'\] \(the {which} tensor is nested\)"):
                await aiostage.load(tmp_path / "nested", into={"a": live})
