"""Uploading a state while it is still being copied, while training goes on, and while the next one begins.

Each leaf is sent as soon as it has landed. Training waits only until everything is captured; the upload takes longer,
so the next snapshot begins before it is over. `max_host_bytes` has room for two of them: a third waits until the first
has been sent, and training with it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from torch import nn

from aiostage import AsyncStager, Snapshot, StagedLeaf, StagerStatistics, StagingOptions

STEPS = 12
STEPS_BETWEEN_SNAPSHOTS = 2
HOST_BYTES = 20_000_000


class Store:
    """A server that takes some time over what it is sent, and counts it."""

    def __init__(self) -> None:
        self.nbytes = 0

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 18):
            self.nbytes += len(chunk)
            await asyncio.sleep(0.004)
        writer.write(b"stored")
        writer.close()


def as_bytes(leaf: StagedLeaf) -> memoryview:
    """Return the memory of a staged leaf; nothing is copied if it is contiguous."""
    return memoryview(leaf.tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


class Uploader:
    """Sends snapshots, each over a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.in_flight = 0
        self.most_in_flight = 0

    async def upload(self, snapshot: Snapshot[Any], captured: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        # A snapshot ends with its block, and with it the hold on the memory, unless somebody took result().
        async with snapshot, asyncio.TaskGroup() as tasks:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            tasks.create_task(self.tell(snapshot, captured))
            async for leaf in snapshot:
                writer.write(as_bytes(leaf))
                await writer.drain()
            writer.write_eof()
            await reader.read()
            self.in_flight -= 1
        writer.close()

    async def tell(self, snapshot: Snapshot[Any], captured: asyncio.Event) -> None:
        await snapshot.captured()
        captured.set()
        print(f"    captured: {snapshot.leaves} leaves, {snapshot.nbytes:,} bytes")


def show(statistics: StagerStatistics) -> None:
    print(f"{statistics.stagings} stagings, {statistics.leaves} leaves, {statistics.nbytes:,} bytes")
    print(f"plans: {statistics.plans_compiled} compiled, {statistics.plans_replayed} replayed")
    print(f"arenas: {statistics.arenas}, leased: {statistics.leases}, pageable bytes: {statistics.pageable_bytes:,}")
    held, elapsed = statistics.longest_loop_hold * 1e3, statistics.longest_loop_hold_elapsed * 1e3
    print(f"longest hold of the event loop: {held:.2f} ms of CPU time, {elapsed:.2f} ms by the clock")


async def main() -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(torch.randn(64, 512)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    store = Store()
    server = await asyncio.start_server(store.receive, "127.0.0.1", 0)
    uploader = Uploader(server.sockets[0].getsockname()[1])
    async with server, AsyncStager(StagingOptions(max_host_bytes=HOST_BYTES)) as stager:
        async with asyncio.TaskGroup() as uploads:
            for number in range(1, STEPS + 1):
                await asyncio.to_thread(step)
                print(f"step {number}, snapshots in flight: {uploader.in_flight}")
                if number % STEPS_BETWEEN_SNAPSHOTS == 0:
                    captured = asyncio.Event()
                    uploads.create_task(uploader.upload(stager.snapshot(model.state_dict()), captured))
                    await captured.wait()  # the next step changes the weights
        print(f"\nstored {store.nbytes:,} bytes; most snapshots in flight at once: {uploader.most_in_flight}")
        show(stager.statistics())


asyncio.run(main())
