"""What tests of storages share: parts to write, and looking at what is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path

import numpy as np

from aiostage import CheckpointExistsError
from aiostage.abc import Buffer, PendingCheckpoint, Storage

PART = 8 << 20


def some_bytes(nbytes: int, seed: int = 0) -> memoryview:
    return memoryview(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8))


async def parts_of(data: memoryview, size: int = PART) -> AsyncGenerator[memoryview, None]:
    for start in range(0, data.nbytes, size):
        yield data[start : start + size]


async def write(pending: PendingCheckpoint, name: str, data: memoryview, size: int = PART) -> None:
    # What a cancelled write leaves of it would be for the collector, and trio warns of that.
    async with aclosing(parts_of(data, size)) as parts:
        await pending.write(name, data.nbytes, parts)


async def save(storage: Storage, name: str, data: memoryview, *, overwrite: bool = False) -> None:
    """Write a checkpoint with one file, whose first bytes are its manifest."""
    pending = await storage.open(name, overwrite=overwrite)
    await write(pending, "data", data)
    await pending.commit(data[:100])


async def content(storage: Storage, name: str) -> tuple[bytes, bytes]:
    """Return the manifest and the file of a checkpoint."""
    reader = await storage.read(name)
    manifest = bytes(await reader.manifest())
    data = bytearray(await reader.size("data"))
    await reader.read("data", 0, memoryview(data))
    await reader.aclose()
    return manifest, bytes(data)


def is_pointer(path: str) -> bool:
    return path.endswith("/checkpoint.json")


def strays(paths: Iterable[str], pointers: Mapping[str, bytes]) -> list[str]:
    """Return which paths are neither a pointer's nor in a folder that one names, given what the pointers say."""
    folders = [path.removesuffix("checkpoint.json") + json.loads(data)["data"] + "/" for path, data in pointers.items()]
    return [path for path in paths if not is_pointer(path) and not path.startswith(tuple(folders))]


async def race(storage: Storage, name: str) -> None:
    """Let several writers commit one checkpoint at once, and check that one succeeds and the others get an error."""

    async def commit(pending: PendingCheckpoint, mine: memoryview) -> bool:
        try:
            await pending.commit(mine[:100])
        except CheckpointExistsError:
            await pending.abort()
            return False
        return True

    writers = [await storage.open(name) for _ in range(4)]
    data = [some_bytes(1000, seed) for seed in range(4)]
    for pending, mine in zip(writers, data, strict=True):
        await write(pending, "data", mine)
    won = await asyncio.gather(*map(commit, writers, data))
    assert sum(won) == 1
    winner = data[won.index(True)]
    assert await content(storage, name) == (bytes(winner[:100]), bytes(winner))


async def five_bytes() -> AsyncIterator[Buffer]:
    """The one part of a small file."""
    yield memoryview(b"12345")


async def save_small(storage: Storage, *names: str) -> None:
    """Save checkpoints of one small file."""
    for name in names:
        pending = await storage.open(name)
        await pending.write("file.bin", 5, five_bytes())
        await pending.commit(memoryview(b"{}"))


def files_below(root: Path) -> list[str]:
    """Return the paths of all files in a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
