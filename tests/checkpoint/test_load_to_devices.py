from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

import aiostage
from aiostage import AcceleratorUnavailableError, Checkpointer, StagingError, blocking
from aiostage.storage import LocalStorage
from aiostage.testing import SimulatedAccelerator, at_every_await
from tests.checkpoint.comparing import assert_same
from tests.checkpoint.counting import CountingStorage
from tests.checkpoint.leftovers import nothing_left
from tests.checkpoint.test_in_place import PART, large
from tests.checkpoint.test_load import tree
from tests.checkpoint.trees import trees
from tests.checkpoint.uncopied import Uncopied


def every_kind() -> dict[str, Any]:
    """Return a tree with every kind of tensor, some of which consist of others."""
    trained = torch.ones(3, requires_grad=True)
    trained.grad = torch.full((3,), 0.5)
    noted = torch.ones(2)
    noted.note = torch.zeros(1)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = tree() | {
            "sparse": torch.eye(3).to_sparse(),
            "compressed": torch.eye(3).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        }
    return made | {"trained": trained, "noted": noted, "set": {torch.ones(1)}, ("a", "key"): torch.ones(2)}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors that a tree consists of, without those inside others."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, (list, tuple, set)) else []


async def until_given_back(accelerator: SimulatedAccelerator) -> None:
    """Wait until nothing of a device's memory is in use: what was abandoned is watched over by a thread.

    The test's timeout is the limit.
    """
    while True:
        gc.collect()
        accelerator.synchronize()
        statistics = accelerator.statistics()
        if statistics.allocated_bytes == statistics.registered_bytes == 0:
            return
        await asyncio.sleep(0.005)


@pytest.mark.asyncio
@pytest.mark.parametrize("make", [every_kind, lambda: large(2)])
async def test_everything_on_a_device(tmp_path: Path, make: Callable[[], Any]) -> None:
    saved = make()
    await aiostage.save(saved, tmp_path / "checkpoint")
    for seed in range(5):
        with SimulatedAccelerator(2, seed=seed, spontaneous=True) as accelerator:
            device = accelerator.devices[seed % 2]
            accelerator.empty(1, device=device)
            loaded = await aiostage.load(tmp_path / "checkpoint", device=device, backend=accelerator)
            assert_same(saved, loaded)
            for tensor in tensors_in(loaded):
                if tensor.layout is torch.strided and tensor.numel():
                    assert accelerator.device_of(tensor) == device
            statistics = accelerator.statistics()
            assert statistics.copies == statistics.pinned_copies > 0
            assert statistics.registered_bytes == 0


@pytest.mark.one_loop
@pytest.mark.asyncio
@given(tree=trees())
async def test_any_tree(tree: Any, tmp_path: Path) -> None:
    await aiostage.save(tree, tmp_path / "checkpoint", overwrite=True)
    with SimulatedAccelerator(seed=1, spontaneous=True, memory_bytes=1 << 20) as accelerator:

        def choose(path: tuple[object, ...], like: torch.Tensor) -> torch.device:
            return accelerator.devices[0]

        try:
            loaded = await aiostage.load(tmp_path / "checkpoint", device=choose, backend=accelerator)
        except ValueError as error:
            # What a NumPy array looks at as well.
            if "NumPy arrays lie in host memory" not in str(error):
                raise
        else:
            assert_same(tree, loaded)


@pytest.mark.asyncio
async def test_memory_that_the_caller_still_uses(tmp_path: Path) -> None:
    saved = {"a": torch.full((300_000,), 2.0)}
    await aiostage.save(saved, tmp_path / "checkpoint")
    for seed in range(10):
        with SimulatedAccelerator(seed=seed, spontaneous=True) as accelerator:
            # Freed, but a kernel that writes to it is still to come: the next allocation gets this memory.
            before = accelerator.empty(300_000)
            address = before.data_ptr()
            accelerator.launch(lambda t: t.fill_(9), before, seconds=1e-3)
            del before
            loaded = await aiostage.load(tmp_path / "checkpoint", device=accelerator.devices[0], backend=accelerator)
            assert loaded["a"].data_ptr() == address
            seen = accelerator.empty(300_000)
            accelerator.launch(lambda to, source: to.copy_(source), seen, reads=[loaded["a"]])
            accelerator.synchronize()
            assert torch.equal(seen, saved["a"])
            assert torch.equal(loaded["a"], saved["a"])


@pytest.mark.asyncio
async def test_a_function_is_asked_once_for_each_tensor(tmp_path: Path) -> None:
    saved = every_kind()
    await aiostage.save(saved, tmp_path / "checkpoint")
    with SimulatedAccelerator(2, seed=1, spontaneous=True) as accelerator:
        first, second = accelerator.devices
        asked: dict[tuple[object, ...], torch.Tensor] = {}

        def choose(path: tuple[object, ...], like: torch.Tensor) -> torch.device | str | None:
            assert path not in asked
            asked[path] = like
            return {"parameter": second, "turned": str(second), "complex": "cpu", "none": None}.get(str(path[0]), first)

        loaded = await aiostage.load(tmp_path / "checkpoint", device=choose, backend=accelerator)
        assert_same(saved, loaded)
        assert accelerator.device_of(loaded["turned"]) == accelerator.device_of(loaded["parameter"]) == second
        assert accelerator.device_of(loaded["complex"]) is None
        assert accelerator.device_of(loaded["trained"]) == accelerator.device_of(loaded["trained"].grad) == first
    assert len(asked) == len(tensors_in(saved)) - 1 + 1, "one tensor is there twice, and one is an attribute of another"
    for path, like in asked.items():
        assert like.is_meta
        if len(path) == 1 and isinstance(saved.get(path[0]), torch.Tensor):
            value = saved[path[0]]
            assert like.shape == value.shape, path
            assert like.dtype is value.dtype, path
            if value.layout is torch.strided:
                assert like.stride() == value.stride()
    assert ("noted", "note") in asked
    assert ("nested", 0, "inside") in asked


@pytest.mark.asyncio
async def test_nothing_is_read_for_the_meta_device(tmp_path: Path) -> None:
    saved = large(2)
    saved["array"] = np.ones(3)
    await aiostage.save(saved, tmp_path / "checkpoint")
    storage = CountingStorage(LocalStorage(tmp_path))
    loaded = await aiostage.load((storage, "checkpoint"), device="meta", only=lambda path: path[0] != "array")
    # The part that the header is in.
    assert storage.read_bytes.total() <= PART
    assert loaded["step"] == 2
    for name in "abd":
        assert loaded[name].is_meta
        assert (loaded[name].shape, loaded[name].dtype) == (saved[name].shape, saved[name].dtype)
        assert loaded[name].stride() == saved[name].stride()
    assert isinstance(loaded["c"][0], torch.nn.Parameter)
    # What is not a tensor is as it was.
    assert (await aiostage.load((storage, "checkpoint"), device="meta"))["array"].tolist() == [1, 1, 1]
    half = await aiostage.load(
        (storage, "checkpoint"), device=lambda path, like: "meta" if like.nbytes > 1_000_000 else None
    )
    assert [half[name].is_meta for name in "abd"] == [True] * 3
    assert half["c"][0].tolist() == [2, 2, 2]


@pytest.mark.asyncio
async def test_what_cannot_be_is_said_before_anything_is_read(tmp_path: Path) -> None:
    shared = torch.zeros(8)
    saved = {
        "tied": [shared, shared[2:]],
        "array": shared.numpy(),
        "sparse": torch.eye(3).to_sparse(),
        "large": torch.zeros(5_000_000),
    }
    # A copy of the array would not share memory with the tensors.
    await aiostage.save(saved, tmp_path / "checkpoint", stager=Uncopied())
    storage = CountingStorage(LocalStorage(tmp_path))

    def apart(path: tuple[object, ...], like: torch.Tensor) -> torch.device | None:
        return accelerator.devices[path[1]] if path[0] == "tied" else None  # type: ignore[index]

    def broken(path: tuple[object, ...], like: torch.Tensor) -> str:
        raise KeyError("of the function")

    with SimulatedAccelerator(2, seed=1, spontaneous=True) as accelerator:
        device = accelerator.devices[0]
        for options, error, text in [
            ({"device": "nowhere"}, ValueError, "device='nowhere' is not a device"),
            ({"device": "xpu:1"}, ValueError, "which is called 'privateuseone'"),
            ({"device": 1.5}, TypeError, r"not 1\.5"),
            ({"device": True}, TypeError, "not True"),
            ({"device": device, "into": saved}, ValueError, "device= is for a new tree"),
            ({"device": "privateuseone:7", "only": "large"}, StagingError, "there are 2 simulated devices"),
            ({"device": apart}, ValueError, r"\['tied'\]\[0\] and state_dict\['tied'\]\[1\] share memory"),
            ({"device": device, "only": ["tied", "array"]}, ValueError, r"\['array'\] share memory.*NumPy arrays lie"),
            ({"device": "meta", "only": "sparse"}, ValueError, r"\['sparse'\] is a sparse tensor, .* none on the meta"),
            ({"device": lambda path, like: 1.5}, TypeError, r"not 1\.5"),
            ({"device": broken}, KeyError, "of the function"),
        ]:
            with pytest.raises(error, match=text) as caught:
                await aiostage.load((storage, "checkpoint"), **options, backend=accelerator)  # type: ignore[arg-type]
            if text == r"not 1\.5" and callable(options["device"]):
                assert "for state_dict['tied'][0]" in caught.value.__notes__[0]
        assert accelerator.statistics().copies == 0
    assert max(storage.read_bytes.values()) <= 11 * PART
    with pytest.raises(AcceleratorUnavailableError, match=r"device=.cuda. is not available: .*Leave device= out"):
        await aiostage.load((storage, "checkpoint"), device="cuda")


@pytest.mark.asyncio
async def test_the_current_device_is_taken_if_none_is_named(tmp_path: Path) -> None:
    await aiostage.save({"a": torch.ones(3)}, tmp_path / "checkpoint")
    with SimulatedAccelerator(2, seed=1, spontaneous=True) as accelerator:
        second = accelerator.devices[1]
        with accelerator.guard(second):
            loaded = await aiostage.load(tmp_path / "checkpoint", device="privateuseone", backend=accelerator)
        assert accelerator.device_of(loaded["a"]) == second
        assert accelerator.active_devices() == [second]


@pytest.mark.asyncio
async def test_devices_that_fail_or_are_full(tmp_path: Path) -> None:
    await aiostage.save(large(2), tmp_path / "checkpoint")
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator:
        device = accelerator.devices[0]

        async def load() -> Any:
            return await aiostage.load(tmp_path / "checkpoint", device=device, backend=accelerator)

        with nothing_left():
            accelerator.fail_next("allocation", after=1)
            with pytest.raises(torch.OutOfMemoryError) as caught:
                await load()
            assert "more of the checkpoint" in caught.value.__notes__[0]
            accelerator.fail_next("copy", after=2)
            with pytest.raises(StagingError):
                await load()
            accelerator.recover()
            del caught
        await until_given_back(accelerator)
        # Only slower.
        accelerator.fail_next("registration")
        assert_same(large(2), await load())


@pytest.mark.asyncio
async def test_cancelled_at_every_await(tmp_path: Path) -> None:
    await aiostage.save(tree(2), tmp_path / "checkpoint", max_shard_bytes=60)
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator:

        async def load() -> Any:
            return await aiostage.load(tmp_path / "checkpoint", device=accelerator.devices[0], backend=accelerator)

        count = 0
        with nothing_left():
            async for _ in at_every_await(load):
                count += 1
        await until_given_back(accelerator)
        assert count > 8
        assert_same(tree(2), await load())


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_host_memory_on_the_way_is_bounded_and_pinned_once(tmp_path: Path) -> None:
    await aiostage.save({str(n): torch.full((3_000_000,), float(n)) for n in range(20)}, tmp_path / "checkpoint")
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator:
        device = accelerator.devices[0]
        registered: list[int] = []
        live = {str(n): accelerator.to_device(torch.zeros(3_000_000), device) for n in range(20)}
        for options in ({"device": device}, {"into": live, "in_place": True}):
            loaded = await aiostage.load(
                tmp_path / "checkpoint",
                backend=accelerator,
                progress=lambda _: registered.append(accelerator.statistics().registered_bytes),
                **options,  # type: ignore[arg-type]
            )
            assert all(float(loaded[str(n)].max()) == n == float(loaded[str(n)].min()) for n in range(20))
        assert 0 < max(registered) <= 6 * PART
        statistics = accelerator.statistics()
        assert statistics.pinned_copies == statistics.copies
        assert statistics.registered_bytes == 0


@pytest.mark.asyncio
async def test_by_way_of_a_checkpointer(tmp_path: Path) -> None:
    async with Checkpointer(tmp_path) as checkpoints:
        await checkpoints.save(1, {"a": torch.ones(3)})
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator:
        (device,) = accelerator.devices
        loaded = await checkpoints.restore(device=device, backend=accelerator)
        assert accelerator.device_of(loaded["a"]) == device


def test_by_way_of_a_blocking_checkpointer(tmp_path: Path) -> None:
    with blocking.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": torch.ones(3)}).committed()
        assert checkpoints.restore(device="meta")["a"].is_meta


@pytest.mark.anyio
async def test_on_trio(tmp_path: Path) -> None:
    await aiostage.save(tree(2), tmp_path / "checkpoint")
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator, nothing_left():
        loaded = await aiostage.load(tmp_path / "checkpoint", device=accelerator.devices[0], backend=accelerator)
        assert_same(tree(2), loaded)
        del loaded
