"""A device that fails at any one of the calls that reach it: what is awaited then is right, or our error."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import AsyncStager, StagingError, StagingOptions
from aiostage._copy.pending import in_flight
from aiostage.testing.simulator import SimulatedAccelerator
from tests.device.accelerators import simulator_only
from tests.staging.holding import until

# The device of PyTorch fails by its own clock, and these tests count calls.
pytestmark = [simulator_only, pytest.mark.asyncio, pytest.mark.one_loop]

CALLS = (
    "active_devices",
    "allocate",
    "copy",
    "current_device",
    "current_stream",
    "is_capturing",
    "keep",
    "pack",
    "record",
    "side_stream",
    "wait",
)
"""What PyTorch does on a device by order of a backend. Asking where a tensor is does nothing there, and registering
memory fails in a way of its own."""

SIZE = 20_000
CHUNK_BYTES = 250_000
"""The least for tensors of that size: two chunks of them."""

STEP_SECONDS = 1e-9
"""So short that a walk has many steps."""


class KernelFailedError(RuntimeError):
    """What PyTorch raises at the next call."""


class FailsAtACall(SimulatedAccelerator):
    """Raises at one of the calls, and at all that follow, as a device does whose kernel has failed, or at that only.

    Attributes:
        healthy: How many calls succeed before; None for all.
        recovers: Whether the calls that follow succeed again.
        called: The names of those that were made, also of those that raised.
    """

    healthy: int | None = None
    recovers = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.called: list[str] = []

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        if self.healthy is not None:
            self.called.append(name)
            if len(self.called) == self.healthy + 1 or (len(self.called) > self.healthy and not self.recovers):
                if not self.recovers:
                    self.fail_device()
                raise KernelFailedError(f"unspecified launch failure, noticed by {name}")
        return getattr(super(), name)(*arguments, **options)

    def fail_after(self, healthy: int) -> None:
        """Let so many calls succeed from now on."""
        self.healthy, self.called = healthy, []


def _call(name: str) -> Any:
    return lambda self, *arguments, **options: self._call(name, *arguments, **options)


for _name in CALLS:
    setattr(FailsAtACall, _name, _call(_name))


Live = dict[str, torch.Tensor]
Entry = Callable[[FailsAtACall, AsyncStager, Live, Path], Awaitable[Live | None]]


async def stage(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    return await stager.stage(live)


async def stage_in_steps(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    """The walk ends after the call, and the streams are recorded again."""
    async with AsyncStager(StagingOptions(max_loop_hold=STEP_SECONDS), backend=accelerator) as stepping:
        return await stepping.stage(live)


async def stage_cast(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    async with AsyncStager(StagingOptions(dtype=torch.float64), backend=accelerator) as casting:
        return await casting.stage(live)


async def go_on_at_once(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    async with stager.snapshot(live) as snapshot:
        snapshot.order_before()
        return await snapshot.result()


async def save_streamed(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    small = StagingOptions(max_host_bytes=CHUNK_BYTES, max_loop_hold=STEP_SECONDS)
    streaming = AsyncStager(small, backend=accelerator)
    async with streaming, streaming.snapshot(live, streamed=True) as snapshot:
        assert snapshot.window is not None
        await snapshot.fill()
        await snapshot.captured()
    return None


async def restore(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    await stager.restore({name: torch.full((SIZE,), 7.0) for name in live}, into=live)
    return None


async def restore_from_devices(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    await stager.restore(live, into={name: torch.zeros(SIZE) for name in live})
    return None


async def load_into(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    await aiostage.load(path, into=live, backend=accelerator)
    return None


async def load_in_place(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    await aiostage.load(path, into=live, in_place=True, backend=accelerator)
    return None


async def load_onto(accelerator: FailsAtACall, stager: AsyncStager, live: Live, path: Path) -> Live | None:
    await aiostage.load(path, device=accelerator.devices[0], backend=accelerator)
    return None


@pytest.mark.parametrize("recovers", [False, True], ids=["for good", "once"])
@pytest.mark.parametrize(
    "entry",
    [
        stage,
        stage_in_steps,
        stage_cast,
        go_on_at_once,
        save_streamed,
        restore,
        restore_from_devices,
        load_into,
        load_in_place,
        load_onto,
    ],
    ids=lambda entry: entry.__name__,
)
async def test_is_a_staging_error_at_every_call(entry: Entry, recovers: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    await aiostage.save({f"t{n}": torch.full((SIZE,), 7.0) for n in range(3)}, path)

    async def play(healthy: int) -> tuple[FailsAtACall, StagingError | None]:
        with FailsAtACall(seed=1, spontaneous=True) as accelerator:
            live = {f"t{n}": accelerator.to_device(torch.full((SIZE,), 7.0)) for n in range(3)}
            async with AsyncStager(backend=accelerator) as stager:
                accelerator.recovers = recovers
                accelerator.fail_after(healthy)
                raised: StagingError | None = None
                try:
                    staged = await entry(accelerator, stager, live, path)
                    assert all(bool((tensor == 7).all()) for tensor in (staged or {}).values())
                except StagingError as error:
                    raised = error
                accelerator.healthy = None
                # Leaving the block would raise if a copy met memory that is gone.
                accelerator.synchronize()
                await until(lambda: len(in_flight) == 0)
                # The error keeps no memory. That of the snapshot it would: its traceback has the frame that entered it.
                if raised is not None and entry is not go_on_at_once:
                    await until(lambda: stager.statistics().leases == 0)
                return accelerator, raised

    accelerator, error = await play(sys.maxsize)
    assert error is None
    assert {"record", "wait", "copy"} <= set(accelerator.called)
    for healthy in range(len(accelerator.called)):
        accelerator, error = await play(healthy)
        # A walk of fewer steps makes fewer calls.
        if len(accelerator.called) > healthy:
            assert error is not None, f"{accelerator.called[healthy]} failed, and nothing was said of it"
            assert isinstance(error.__cause__, KernelFailedError)
