"""A trainer publishes its weights, and a server in another process swaps them between requests.

The trainer is killed in the middle and started again. The server goes on with what it has, and takes the weights of the
next trainer when they come.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from aiostage.weights import WeightPublisher, WeightSubscriber


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


async def train(path: str) -> None:
    """What the trainer does: a step, then new weights for everybody, until it is killed."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    async with WeightPublisher(path) as publisher:
        step = 0
        while True:
            loss = (model(torch.randn(32, 64)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            await publisher.publish(model.state_dict(), version=step)
            await asyncio.sleep(0.01)


class Server:
    """Answers requests with one version of the weights each."""

    def __init__(self) -> None:
        self.model = network()
        self.version: tuple[str, int] | None = None
        self.swaps = 0
        self.lock = asyncio.Lock()

    async def follow(self, weights: WeightSubscriber) -> None:
        async for version in weights:
            async with self.lock:
                # The parameters lie in shared memory: a swap copies nothing.
                self.model.load_state_dict(version.state_dict, assign=True)
                self.version = (version.epoch, version.version)
            self.swaps += 1

    async def answer(self) -> float:
        async with self.lock:
            with torch.no_grad():
                return float(self.model(torch.ones(1, 64)))


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.sock")
        server = Server()
        async with WeightSubscriber(path) as weights:
            following = asyncio.create_task(server.follow(weights))
            for life in (1, 2):
                trainer = await asyncio.create_subprocess_exec(sys.executable, __file__, "--train", path)
                before = server.swaps
                while server.swaps < before + 10:
                    await server.answer()
                    await asyncio.sleep(0.01)
                assert server.version is not None
                print(f"trainer {life}: {server.swaps - before} swaps, the last of version {server.version[1]}")
                trainer.send_signal(signal.SIGKILL)
                await trainer.wait()
                print(f"trainer {life} is killed, and the server answers {await server.answer():.3f}")
            following.cancel()
            await asyncio.wait([following])


if __name__ == "__main__":
    if "--train" in sys.argv:
        asyncio.run(train(sys.argv[-1]))
    elif sys.platform == "linux":
        asyncio.run(main())
    else:
        print("Sharing staged memory needs Linux.")
