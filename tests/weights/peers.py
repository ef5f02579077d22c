"""What the other processes of the tests do."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection

from torch import nn

from aiostage.weights import WeightPublisher, WeightSubscriber
from tests.weights.trees import versions_in, weights


def subscribe(path: str, pipe: Connection) -> None:
    """Take versions, one for each word that comes in, and say of each what was found in it."""

    async def run() -> None:
        async with WeightSubscriber(path) as subscriber:
            held = []
            while (word := await asyncio.to_thread(pipe.recv)) != "end":
                version = await subscriber.get()
                pipe.send((version.version, versions_in(version.state_dict)))
                if word == "hold":
                    held.append(version)
                else:
                    version.acknowledge()

    asyncio.run(run())


def publish(path: str, pipe: Connection, first: int) -> None:
    """Publish one version after the other, until killed."""

    async def run() -> None:
        async with WeightPublisher(path) as publisher:
            version = first
            while True:
                await publisher.publish(weights(version), version=version)
                if version == first:
                    pipe.send("publishing")
                version += 1
                await asyncio.sleep(0.001)

    asyncio.run(run())


def module() -> nn.Module:
    """Return a module that takes the weights."""
    made = nn.Module()
    for name, tensor in weights(-1).items():
        made.register_buffer(name, tensor)
    return made
