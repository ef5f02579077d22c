"""Saves to a local disk, beside what others need for the same, and beside the disk itself.

Every way runs in a process of its own, one after the other: a few saves of the same state dict, each next to a raw
write of as many bytes (two threads, direct I/O, parts of 8 MiB, fsync), so that a slow moment of the disk counts for
both. Medians of all saves but the first, which pays for cold memory.

    python benchmarks/pipeline.py --gib 2 --saves 4 --directory /fast/disk
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeAlias

import torch
from delays import LoopDelay

import aiostage

GIB = 1 << 30
MIB = 1 << 20
PART = 8 * MIB
TENSORS = 64

Save: TypeAlias = Callable[[dict[str, Any], str], Any]
"""A coroutine function of state dict and path that yields control's return and then ends when all is on the disk."""


@asynccontextmanager
async def way_aiostage(nbytes: int, *, share: float | None = None) -> AsyncIterator[Save]:
    """This library; with a budget for host memory that is a share of the state dict."""
    budget = int(nbytes * share) if share is not None else None
    async with aiostage.AsyncStager(aiostage.StagingOptions(max_host_bytes=budget)) as stager:

        async def save(tree: dict[str, Any], path: str) -> float:
            info = await aiostage.save(tree, path, stager=stager)
            return info.captured

        yield save


@asynccontextmanager
async def way_torch_save(nbytes: int) -> AsyncIterator[Save]:
    """What most people do: torch.save in a thread. The source may change when it is done."""

    def write(tree: dict[str, Any], path: str) -> None:
        with open(path, "wb") as file:
            torch.save(tree, file)
            file.flush()
            os.fsync(file.fileno())

    async def save(tree: dict[str, Any], path: str) -> float:
        begin = perf_counter()
        await asyncio.to_thread(write, tree, path)
        return perf_counter() - begin

    yield save


@asynccontextmanager
async def way_dcp(nbytes: int, *, process: bool) -> AsyncIterator[Save]:
    """torch.distributed.checkpoint.async_save, called as its users do, from a coroutine."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    # The process that writes makes a group of its own, where these say.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD

    async def save(tree: dict[str, Any], path: str) -> float:
        begin = perf_counter()
        future: Any = dcp.async_save(tree, checkpoint_id=path, async_checkpointer_type=kind)
        returned = perf_counter() - begin
        await asyncio.wrap_future(future)
        return returned

    try:
        yield save
    finally:
        dist.destroy_process_group()


@asynccontextmanager
async def way_torch_checkpointing(nbytes: int) -> AsyncIterator[Save]:
    """torch_checkpointing's asynchronous saver; the source may change when its staging is done."""
    import torch_checkpointing as rival
    from torch_checkpointing.config import AsyncCheckpointSaverConfig
    from torch_checkpointing.staging import CheckpointStagerConfig
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    class Checkpoint(rival.CheckpointBase):  # type: ignore[misc]
        def __init__(self, tree: dict[str, Any]) -> None:
            super().__init__()
            self.tree = tree

        def get_items(self) -> dict[str, Any]:
            return {"state": rival.CheckpointItem(self.tree)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise NotImplementedError

    config = AsyncCheckpointSaverConfig(staging_config=CheckpointStagerConfig(use_pinned_memory=False))
    # With its default, direct I/O, it fails here: closing a file whose size is no multiple of a block is EINVAL.
    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    saver = rival.make_async_checkpoint_saver(config, storage_config=storage)

    async def save(tree: dict[str, Any], path: str) -> float:
        begin = perf_counter()
        staged, written = saver.save(path, Checkpoint(tree))
        await asyncio.wrap_future(staged)
        returned = perf_counter() - begin
        await asyncio.wrap_future(written)
        return returned

    try:
        yield save
    finally:
        saver.close()


@asynccontextmanager
async def way_torchsnapshot(nbytes: int) -> AsyncIterator[Save]:
    """torchsnapshot, archived in 2024. It starts event loops of its own, so it has to be called in a thread."""
    import torchsnapshot

    async def save(tree: dict[str, Any], path: str) -> float:
        begin = perf_counter()
        state = {"state": torchsnapshot.StateDict(**tree)}
        pending = await asyncio.to_thread(torchsnapshot.Snapshot.async_take, path, state)
        returned = perf_counter() - begin
        await asyncio.to_thread(pending.wait)
        return returned

    yield save


WAYS: dict[str, Callable[[int], Any]] = {
    "aiostage": way_aiostage,
    "aiostage, a quarter of the memory": partial(way_aiostage, share=0.25),
    "torch.save in a thread": way_torch_save,
    "dcp.async_save, thread": partial(way_dcp, process=False),
    "dcp.async_save, process": partial(way_dcp, process=True),
    "torch_checkpointing": way_torch_checkpointing,
    "torchsnapshot": way_torchsnapshot,
}
"""Add a way here: a context manager that takes the size of the state dict and gives a coroutine function."""


class Raw:
    """The limit: the same number of bytes from warm memory, past the page cache, from two threads."""

    def __init__(self, nbytes: int, path: str) -> None:
        self.path = path
        self.memory = mmap.mmap(-1, min(nbytes, 64 * MIB), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory[:] = os.urandom(MIB) * (len(self.memory) // MIB)
        self.parts = nbytes // PART

    def write(self) -> float:
        """Return the seconds that it takes until everything is on the disk."""
        begin = perf_counter()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        os.posix_fallocate(file, 0, self.parts * PART)
        view, numbers, lock = memoryview(self.memory), iter(range(self.parts)), threading.Lock()

        def some() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                start = number * PART % len(view)
                os.pwrite(file, view[start : start + PART], number * PART)

        threads = [threading.Thread(target=some) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(file)
        os.close(file)
        seconds = perf_counter() - begin
        os.unlink(self.path)
        return seconds


def resident(field: str) -> int:
    """Return a figure of the kernel's about this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


async def measure(name: str, nbytes: int, saves: int, directory: str) -> list[dict[str, float]]:
    """Save a few times in this process."""
    tree = {f"layer{n}": torch.rand(nbytes // TENSORS // 4) for n in range(TENSORS)}
    raw = Raw(nbytes, os.path.join(directory, "raw"))
    found = []
    before = resident("VmRSS")
    async with WAYS[name](nbytes) as save:
        for number in range(saves):
            limit = await asyncio.to_thread(raw.write)
            path = os.path.join(directory, f"checkpoint{number}")
            Path("/proc/self/clear_refs").write_text("5")
            begin = perf_counter()
            async with LoopDelay() as loop:
                captured = await save(tree, path)
            committed = perf_counter() - begin
            found.append(
                {
                    "raw": limit,
                    "captured": captured,
                    "committed": committed,
                    "peak": resident("VmHWM") - before,
                    "delay": max(loop.delays),
                }
            )
            await asyncio.to_thread(shutil.rmtree if os.path.isdir(path) else os.unlink, path)
    return found


def report(name: str, found: list[dict[str, float]]) -> str:
    later = found[1:] or found

    def middle(key: str) -> float:
        return median(entry[key] for entry in later)

    ratio = median(entry["committed"] / entry["raw"] for entry in later)
    return (
        f"| {name} | {middle('captured'):.2f} | {middle('committed'):.2f} | {ratio:.2f} | "
        f"{max(entry['peak'] for entry in found) / GIB:.2f} | {1e3 * middle('delay'):.1f} | "
        f"{found[0]['captured']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--directory", help="on the disk to measure", default=".")
    parser.add_argument("--ways", help="names, separated by ';'", default=";".join(WAYS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    nbytes = int(options.gib * GIB) // PART * PART
    if options.one:
        print(json.dumps(asyncio.run(measure(options.one, nbytes, options.saves, options.directory))))
        return
    print("| way | captured, s | committed, s | of the raw write | memory, GiB | worst delay, ms | first captured, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in options.ways.split(";"):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            command = [sys.executable, __file__, "--one", name, "--directory", directory]
            command += ["--gib", str(options.gib), "--saves", str(options.saves)]
            outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if outcome.returncode:
            lines = outcome.stderr.strip().splitlines() or [str(outcome.returncode)]
            # What follows the error itself are complaints of what was left behind.
            reason = next((line for line in reversed(lines) if line.partition(":")[0].endswith("Error")), lines[-1])
            print(f"| {name} | does not run here: {reason[:120]} | | | | | |", flush=True)
        else:
            print(report(name, json.loads(outcome.stdout.strip().splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
