"""What staging does with a device: copies beside training, and a trainer that never waits for them on the CPU.

It runs without one: a simulated accelerator is a `Backend` like the GPU's, which `AsyncStager()` uses by itself.
"""

from __future__ import annotations

import asyncio
import tempfile

import torch

from aiostage import AsyncStager, Backend, SupportsQuery, load, save, wait_event
from aiostage.testing import SimulatedAccelerator


async def main() -> None:
    with SimulatedAccelerator() as accelerator:
        backend: Backend = accelerator
        weights = accelerator.to_device(torch.zeros(1_000_000))
        (device,) = backend.active_devices()
        optimizer_step = torch.Tensor.add_

        async with AsyncStager(backend=backend) as stager:
            async with stager.snapshot({"weights": weights}) as snapshot:
                # From here on work on the current stream waits, on the device, for the copies. Nothing is awaited.
                snapshot.order_before()
                accelerator.launch(lambda live: optimizer_step(live, 1.0), weights)
                staged = await snapshot.result()
            statistics = stager.statistics()

        done: SupportsQuery = backend.record(backend.current_stream(device))
        await wait_event(done)
        print(f"staged before the step: {staged['weights'].unique().tolist()}")
        print(f"live after the step: {weights.unique().tolist()}")
        print(f"{statistics.launches} device operations for {statistics.nbytes:,} bytes", end="")
        print(f", {statistics.pinned_bytes:,} bytes pinned" if statistics.pinned_bytes else ", pageable memory")

        # Back to the device, through a few pinned buffers and never as a whole through host memory.
        with tempfile.TemporaryDirectory() as directory:
            await save(staged, f"{directory}/checkpoint")
            loaded = await load(f"{directory}/checkpoint", device=device, backend=backend)
        print(f"loaded onto {backend.device_of(loaded['weights'])}: {loaded['weights'].unique().tolist()}")


asyncio.run(main())
