"""Each hazard of staging from devices: it shows in a naive stager, and aiostage is right in every order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from aiostage import AsyncStager, StagingError, StagingOptions, TornSnapshotError
from aiostage.testing.simulator import SimulatedHazardError
from tests.device.accelerators import FAILURE, ON_A_DEVICE, Accelerator, DeviceError, seeds, simulator_only

SEEDS = seeds(200)
SIZE = 64


class NaiveStager:
    """What is written first: a side stream, a cached host buffer for each tensor, and no thought of anyone else."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._streams: dict[torch.device, Any] = {}
        self._cache: dict[str, torch.Tensor] = {}

    async def stage(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy, poll, return the cached buffers."""
        events, staged = [], {}
        for name, tensor in state_dict.items():
            device = self._accelerator.device_of(tensor)
            assert device is not None
            stream = self._streams.setdefault(device, self._accelerator.side_stream(device))
            self.order(stream)
            staged[name] = self.buffer(name, tensor)
            self._accelerator.copy([staged[name]], [tensor], stream)
            events.append(self._accelerator.record(stream))
        del tensor, state_dict
        for event in events:
            while not self.is_done(event):
                await asyncio.sleep(0)
        return staged

    def order(self, stream: Any) -> None:
        """Do nothing: what was enqueued before surely is done by now."""

    def buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the one of last time."""
        return self._cache.setdefault(name, torch.empty(tensor.shape))

    def is_done(self, event: Any) -> bool:
        """Ask."""
        return bool(event.query())


class WaitsOnTheFirstDevice(NaiveStager):
    """Waits, but for an event of the device that happens to be current."""

    def order(self, stream: Any) -> None:
        stream.wait_stream(self._accelerator.current_stream(self._accelerator.devices[0]))


class OwnBuffers(NaiveStager):
    """Has buffers of its own for each call, which go when the call does."""

    def buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape)


class Waits(NaiveStager):
    """Waits for the caller's stream at least."""

    def order(self, stream: Any) -> None:
        stream.wait_stream(self._accelerator.current_stream(stream.device))


class LogsErrors(Waits):
    """Takes an event that raises for one that is over."""

    def is_done(self, event: Any) -> bool:
        if ON_A_DEVICE:
            self._accelerator.release()
        try:
            return bool(event.query())
        except DeviceError:
            return True


def orders(**options: Any) -> Iterator[Accelerator]:
    """Yield an accelerator for each of some seeds."""
    for seed in seeds(60):
        with Accelerator(seed=seed, spontaneous=True, **options) as accelerator:
            yield accelerator


async def wrong(make: Callable[[Accelerator], Any], scene: Any, **options: Any) -> int:
    """Play a scene in every order, and count the orders in which it goes wrong."""
    return sum([not await plays(make, scene, seed, **options) for seed in SEEDS])


async def plays(make: Callable[[Accelerator], Any], scene: Any, seed: int, **options: Any) -> bool:
    """Return whether the staged bytes are right, and no memory was written to after it was released."""
    try:
        with Accelerator(devices=2, seed=seed, spontaneous=True, **options) as accelerator:
            stager = make(accelerator)
            right: bool = await scene(accelerator, stager)
            accelerator.synchronize()
            if isinstance(stager, AsyncStager):
                await stager.aclose()
            return right
    except SimulatedHazardError:
        return False


def ours(accelerator: Accelerator) -> AsyncStager:
    return AsyncStager(backend=accelerator)


def is_full_of(tensor: torch.Tensor, value: float) -> bool:
    return bool((tensor == value).all())


async def written_just_before(accelerator: Accelerator, stager: Any) -> bool:
    """A kernel writes the tensor, and staging is asked for behind it."""
    tensor = accelerator.to_device(torch.zeros(SIZE))
    accelerator.launch(lambda t: t.fill_(7), tensor, seconds=1e-3)
    staged = await stager.stage({"a": tensor})
    return is_full_of(staged["a"], 7)


async def freed_at_once(accelerator: Accelerator, stager: Any) -> bool:
    """The caller drops the model as soon as it has called, and the allocator gives its memory to others."""
    tensor = accelerator.to_device(torch.full((SIZE,), 7.0))
    state = {"a": tensor}
    del tensor
    task = asyncio.ensure_future(stager.stage(state))
    await asyncio.sleep(0)
    state.clear() if not isinstance(stager, AsyncStager) else None
    del state
    other = accelerator.empty(SIZE)
    accelerator.launch(lambda t: t.fill_(-1), other)
    staged = await task
    return is_full_of(staged["a"], 7)


async def staged_again_while_in_use(accelerator: Accelerator, stager: Any) -> bool:
    """An upload still reads the first copy when the second is made."""
    tensor = accelerator.to_device(torch.full((SIZE,), 1.0))
    first = await stager.stage({"a": tensor})
    accelerator.launch(lambda t: t.fill_(2), tensor)
    second = await stager.stage({"a": tensor})
    return is_full_of(first["a"], 1) and is_full_of(second["a"], 2)


async def changed_on_the_way(accelerator: Accelerator, stager: Any) -> bool:
    """The next step is enqueued before the copy was made: right is the old value, or an error that says so."""
    tensor = accelerator.to_device(torch.full((SIZE,), 1.0))
    task = asyncio.ensure_future(stager.stage({"a": tensor}))
    await asyncio.sleep(0)
    if task.done():
        return is_full_of(task.result()["a"], 1)
    accelerator.launch(lambda t: t.fill_(2), tensor)
    try:
        return is_full_of((await task)["a"], 1)
    except TornSnapshotError:
        return True


async def on_another_stream(accelerator: Accelerator, stager: Any) -> bool:
    """The caller works on a stream of its own and has left it when the task starts."""
    device = accelerator.devices[0]
    tensor = accelerator.to_device(torch.zeros(SIZE))
    stream = accelerator.side_stream(device)
    stream.wait_stream(accelerator.current_stream(device))
    with stream:
        accelerator.launch(lambda t: t.fill_(7), tensor, seconds=1e-3)
        coroutine = stager.stage({"a": tensor})
    staged = await asyncio.ensure_future(coroutine)
    return is_full_of(staged["a"], 7)


async def two_at_once(accelerator: Accelerator, stager: Any) -> bool:
    """Two tasks stage different models under the same names."""
    states = [{"a": accelerator.to_device(torch.full((SIZE,), value))} for value in (1.0, 2.0)]
    first, second = await asyncio.gather(*map(stager.stage, states))
    return is_full_of(first["a"], 1) and is_full_of(second["a"], 2)


async def forward_changes_state(accelerator: Accelerator, stager: Any) -> bool:
    """The forward pass writes statistics, without counting a version, beside copies that the optimizer waits for."""
    weight = accelerator.to_device(torch.full((SIZE,), 1.0))
    mean = accelerator.to_device(torch.full((SIZE,), 1.0))
    state = {"weight": weight, "mean": mean}

    def forward() -> None:
        accelerator.launch(lambda statistics: statistics.fill_(2), reads=[mean])

    if isinstance(stager, AsyncStager):
        async with stager.snapshot(state) as snapshot:
            snapshot.order_before(parts=[("mean",)])
            forward()
            snapshot.order_before()
            accelerator.launch(lambda t: t.fill_(2), weight)
            staged = await snapshot.result()
    else:
        task = asyncio.ensure_future(stager.stage(state))
        await asyncio.sleep(0)
        forward()
        staged = await task
    return is_full_of(staged["mean"], 1) and is_full_of(staged["weight"], 1)


async def on_the_second_device(accelerator: Accelerator, stager: Any) -> bool:
    """A kernel writes the tensor on a device that is not the current one."""
    device = accelerator.devices[1]
    tensor = accelerator.to_device(torch.zeros(SIZE), device)
    accelerator.launch(lambda t: t.fill_(7), tensor, seconds=1e-3)
    staged = await stager.stage({"a": tensor})
    return is_full_of(staged["a"], 7)


async def cancelled_under_way(accelerator: Accelerator, stager: Any) -> bool:
    """The staging is cancelled while the device copies, and everything is dropped."""
    tensor = accelerator.to_device(torch.full((SIZE,), 1.0))
    task = asyncio.ensure_future(stager.stage({"a": tensor}))
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    del task, tensor
    other = accelerator.to_device(torch.full((SIZE,), 2.0))
    staged = await stager.stage({"a": other})
    return is_full_of(staged["a"], 2)


async def behind_a_kernel_that_fails(accelerator: Accelerator, stager: Any) -> bool:
    """The kernel that writes the tensor fails, which shows only later: right is an error."""
    tensor = accelerator.to_device(torch.full((SIZE,), 1.0))
    accelerator.launch(lambda t: t / "none", tensor)
    try:
        await stager.stage({"a": tensor})
    except (StagingError, DeviceError):
        return True
    return False


LATE = {
    written_just_before: "kernels",
    on_another_stream: "kernels",
    on_the_second_device: "kernels",
    behind_a_kernel_that_fails: "kernels",
    freed_at_once: "copies",
    changed_on_the_way: "copies",
    forward_changes_state: "copies",
}
"""What has to be late on the device for a naive stager to go wrong in every order, and not by chance."""

SCENES = [
    (NaiveStager, written_just_before),
    (NaiveStager, on_another_stream),
    (Waits, freed_at_once),
    (Waits, staged_again_while_in_use),
    (Waits, two_at_once),
    (Waits, changed_on_the_way),
    (Waits, forward_changes_state),
    (WaitsOnTheFirstDevice, on_the_second_device),
    (OwnBuffers, cancelled_under_way),
    (LogsErrors, behind_a_kernel_that_fails),
]


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize(("naive", "scene"), SCENES, ids=lambda it: it.__name__)
class TestHazard:
    async def test_shows_in_a_naive_stager(self, naive: type[NaiveStager], scene: Any):
        if ON_A_DEVICE and naive is OwnBuffers:
            pytest.skip("the device would write into freed memory of this process, as a GPU does")
        if ON_A_DEVICE:
            assert await wrong(naive, scene, late=LATE.get(scene)) == len(SEEDS)
        else:
            assert await wrong(naive, scene) > 0

    async def test_is_closed(self, naive: type[NaiveStager], scene: Any):
        assert await wrong(ours, scene) == 0


@pytest.mark.asyncio
async def test_on_a_backend_that_does_not_wait_aiostage_would_be_wrong_too() -> None:
    def unordered(accelerator: Accelerator) -> AsyncStager:
        accelerator.wait = lambda stream, event: None
        return ours(accelerator)

    if ON_A_DEVICE:
        assert await wrong(unordered, written_just_before, late="kernels") == len(SEEDS)
    else:
        assert await wrong(unordered, written_just_before) > 0


@pytest.mark.asyncio
class TestSeveralDevices:
    async def test_each_is_ordered_by_its_own_stream(self):
        for accelerator in orders(devices=3):
            state = {}
            for number, device in enumerate(accelerator.devices):
                tensor = accelerator.to_device(torch.zeros(SIZE), device)
                accelerator.launch(lambda t, n=number: t.fill_(n + 1), tensor, seconds=1e-3)
                state[str(number)] = tensor
            async with AsyncStager(backend=accelerator) as stager:
                staged = await stager.stage(state | {"host": torch.ones(3)})
            assert [float(staged[str(n)].mean()) for n, _ in enumerate(accelerator.devices)] == [1, 2, 3][: len(state)]

    @simulator_only
    async def test_devices_that_are_not_used_are_left_alone(self):
        with Accelerator(devices=2, seed=1, spontaneous=True) as accelerator:
            tensor = accelerator.to_device(torch.ones(SIZE), accelerator.devices[1])
            async with AsyncStager(backend=accelerator) as stager:
                await stager.stage({"a": tensor})
            assert list(accelerator.active_devices()) == [accelerator.devices[1]]


@pytest.mark.asyncio
class TestFailures:
    async def test_a_failed_copy_raises_in_the_awaiting_task_and_the_stager_works_on(self):
        for accelerator in orders():
            tensor = accelerator.to_device(torch.ones(SIZE))
            async with AsyncStager(backend=accelerator) as stager:
                accelerator.fail_next("copy")
                with pytest.raises(Exception, match=FAILURE) as caught:
                    await stager.stage({"a": tensor})
                assert any(isinstance(error, DeviceError) for error in (caught.value, caught.value.__cause__))
                accelerator.recover()
                assert is_full_of((await stager.stage({"a": tensor}))["a"], 1)

    async def test_a_full_device_is_staged_without_packing(self):
        for accelerator in orders():
            state = {str(n): accelerator.to_device(torch.full((SIZE,), float(n))) for n in range(20)}
            async with AsyncStager(backend=accelerator) as stager:
                accelerator.fail_next("allocation")
                staged = await stager.stage(state)
            assert [float(staged[str(n)].mean()) for n in range(20)] == [float(n) for n in range(20)]

    @simulator_only
    async def test_registration_that_fails_is_a_warning(self, caplog: pytest.LogCaptureFixture):
        with Accelerator(seed=1, spontaneous=True, max_registered_bytes=0) as accelerator:
            tensor = accelerator.to_device(torch.ones(SIZE))
            async with AsyncStager(backend=accelerator) as stager:
                for _ in range(3):
                    assert is_full_of((await stager.stage({"a": tensor}))["a"], 1)
                assert stager.statistics().pinned_bytes == 0
        assert len([record for record in caplog.records if "ulimit -l" in record.message]) == 1

    @simulator_only
    async def test_registration_that_fails_is_an_error_where_it_is_demanded(self):
        with Accelerator(seed=1, spontaneous=True, max_registered_bytes=0) as accelerator:
            tensor = accelerator.to_device(torch.ones(SIZE))
            async with AsyncStager(StagingOptions(use_pinned_memory=True), backend=accelerator) as stager:
                with pytest.raises(Exception, match="ulimit -l"):
                    await stager.stage({"a": tensor})
                assert stager.statistics().leases == 0


@pytest.mark.asyncio
class TestPinned:
    @simulator_only
    async def test_memory_is_registered_once_and_unregistered_in_the_end(self):
        with Accelerator(seed=1, spontaneous=True) as accelerator:
            tensor = accelerator.to_device(torch.ones(SIZE))
            stager = AsyncStager(StagingOptions(use_shared_memory=True), backend=accelerator)
            for _ in range(5):
                await stager.stage({"a": tensor})
            statistics = stager.statistics()
            assert statistics.pinned_bytes == statistics.shared_bytes > 0
            assert accelerator.statistics().registered_bytes == statistics.pinned_bytes
            await stager.aclose()
            while stager.statistics().arenas:
                await asyncio.sleep(0)
            assert accelerator.statistics().registered_bytes == 0

    async def test_not_when_it_is_not_wanted_or_needed(self):
        with Accelerator(seed=1, spontaneous=True) as accelerator:
            tensor = accelerator.to_device(torch.ones(SIZE))
            async with AsyncStager(StagingOptions(use_pinned_memory=False), backend=accelerator) as stager:
                await stager.stage({"a": tensor})
                assert stager.statistics().pinned_bytes == 0
            async with AsyncStager(backend=accelerator) as stager:
                await stager.stage({"a": torch.ones(SIZE)})
                assert stager.statistics().pinned_bytes == 0
