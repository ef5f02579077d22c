"""Every error of aiostage, provoked and printed: each says what was wrong, where, and what to do.

All are `StagingError`, and each also is the standard exception that it is a case of, so that code which catches
`MemoryError` or `FileNotFoundError` keeps working.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch
from obstore.store import S3Store

import aiostage
from aiostage import AsyncStager, StagingOptions
from aiostage.testing import SimulatedAccelerator
from aiostage.weights import WeightPublisher

STATE = {"weight": torch.ones(4, 4), "bias": torch.zeros(4)}


async def closed(folder: Path) -> None:
    stager = AsyncStager()
    await stager.aclose()
    await stager.stage(STATE)


async def torn(folder: Path) -> None:
    state = {"weight": torch.ones(4, 4)}
    async with AsyncStager() as stager, stager.snapshot(state) as snapshot:
        state["weight"].add_(1)  # before it is captured
        await snapshot.captured()


async def unsupported(folder: Path) -> None:
    async with AsyncStager() as stager:
        await stager.stage({"model": {"weight": torch.empty(4, device="meta")}})


async def over_budget(folder: Path) -> None:
    async with AsyncStager(StagingOptions(max_host_bytes=4096)) as stager:
        await stager.stage({"weight": torch.ones(10_000)})


async def not_pinned(folder: Path) -> None:
    with SimulatedAccelerator() as accelerator:
        accelerator.fail_next("registration")
        async with AsyncStager(StagingOptions(use_pinned_memory=True), backend=accelerator) as stager:
            await stager.stage({"weight": accelerator.to_device(torch.ones(4))})


async def exists(folder: Path) -> None:
    await aiostage.save(STATE, folder / "checkpoint")
    await aiostage.save(STATE, folder / "checkpoint")


async def not_found(folder: Path) -> None:
    await aiostage.load(folder / "elsewhere")


async def mismatch(folder: Path) -> None:
    await aiostage.load(folder / "checkpoint", into={"weight": torch.ones(2), "scale": torch.ones(1)})


async def corrupt(folder: Path) -> None:
    path = folder / "checkpoint" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    await aiostage.load(folder / "checkpoint")


async def not_open(folder: Path) -> None:
    await WeightPublisher(folder / "weights.sock").publish(STATE)


async def unreachable(folder: Path) -> None:
    no_server = "http://127.0.0.1:9"
    store = S3Store(
        "bucket",
        endpoint=no_server,
        skip_signature=True,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    await aiostage.load((store, "checkpoint"))


PROVOKED: dict[type[aiostage.StagingError], Callable[[Path], Awaitable[None]]] = {
    aiostage.StagerClosedError: closed,
    aiostage.TornSnapshotError: torn,
    aiostage.UnsupportedLeafError: unsupported,
    aiostage.HostMemoryError: over_budget,
    aiostage.AcceleratorUnavailableError: not_pinned,
    aiostage.CheckpointExistsError: exists,
    aiostage.CheckpointNotFoundError: not_found,
    aiostage.CheckpointMismatchError: mismatch,
    aiostage.CheckpointCorruptError: corrupt,
    aiostage.StorageError: unreachable,
    aiostage.WeightsError: not_open,
}


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        for kind, provoke in PROVOKED.items():
            try:
                await provoke(Path(name))
            except kind as error:
                family = "a CheckpointError, " if isinstance(error, aiostage.CheckpointError) else ""
                standard = next(base.__name__ for base in kind.__mro__ if base.__module__ == "builtins")
                article = "an" if standard[0] in "AEIOU" else "a"
                print(f"{kind.__name__}, {family}{article} {standard}\n    {str(error).replace(name, '.')}\n")
            else:
                raise AssertionError(f"{kind.__name__} was not raised")


asyncio.run(main())
