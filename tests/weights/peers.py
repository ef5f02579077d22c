"""What the other processes of the tests do."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from typing import Any

from obstore.store import S3Store
from torch import nn

from aiostage.storage import ObjectStorage
from aiostage.weights import WeightPublisher, WeightSubscriber
from tests.servers.weed import BUCKET
from tests.weights.trees import versions_in, weights


def storage_of(where: str | dict[str, Any]) -> Any:
    """Return a path as it is, and an object storage for the options of a store."""
    return where if isinstance(where, str) else ObjectStorage(S3Store(BUCKET, **where))


def subscribe(where: str | dict[str, Any], pipe: Connection) -> None:
    """Take versions, one for each word that comes in, and say of each what was found in it."""

    async def run() -> None:
        async with WeightSubscriber(storage_of(where), interval=0.01) as subscriber:
            held = []
            while (word := await asyncio.to_thread(pipe.recv)) != "end":
                version = await subscriber.get()
                pipe.send((version.version, versions_in(version.state_dict)))
                if word == "hold":
                    held.append(version)
                else:
                    version.acknowledge()

    asyncio.run(run())


def publish(where: str | dict[str, Any], pipe: Connection, first: int) -> None:
    """Publish one version after the other, until killed."""

    async def run() -> None:
        async with WeightPublisher(storage_of(where)) as publisher:
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
