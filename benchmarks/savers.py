"""Ways to save a state dict, each as its users call it in a coroutine."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from places import Place, Server
from plain_threads import PlainCopies

import aiostage

__all__ = ["RIVALS", "SAVERS", "Save"]

Save: TypeAlias = Callable[[dict[str, Any], str], Awaitable[float]]
"""Saves a state dict under a name; returns, once it is complete, after how many seconds the source was free."""


@asynccontextmanager
async def with_aiostage(place: Place, nbytes: int, *, share: float | None = None) -> AsyncIterator[Save]:
    """This library; with a budget for host memory that is a share of the state dict."""
    options = aiostage.StagingOptions(max_host_bytes=int(nbytes * share) if share is not None else None)
    async with aiostage.AsyncStager(options) as stager, aiostage.Checkpointer(place.storage, stager) as checkpoints:

        async def save(tree: dict[str, Any], name: str) -> float:
            begin = perf_counter()
            handle = await checkpoints.save(int(name.removeprefix("step-")), tree)
            captured = perf_counter() - begin
            await handle.committed()
            return captured

        yield save


@asynccontextmanager
async def with_storage(place: Place, nbytes: int) -> AsyncIterator[Save]:
    """This library's storage alone: the bytes of the limit, in parts, and the commit."""
    assert isinstance(place, Server)

    async def save(tree: dict[str, Any], name: str) -> float:
        begin = perf_counter()
        pending = await place.storage.open(name)
        await pending.write("data", nbytes, place.parts())
        await pending.commit(memoryview(b"{}"))
        return perf_counter() - begin

    yield save


@asynccontextmanager
async def with_writer(place: Place, nbytes: int) -> AsyncIterator[Save]:
    """obstore's writer alone: the bytes of the limit, in an upload that a cancellation can abort. No commit."""
    assert isinstance(place, Server)

    async def save(tree: dict[str, Any], name: str) -> float:
        begin = perf_counter()
        await place.write(name, place.parts())
        return perf_counter() - begin

    yield save


@asynccontextmanager
async def with_plain_threads(place: Place, nbytes: int) -> AsyncIterator[Save]:
    """What every save has to do, and nothing else: copy in threads, digests, and the least way to write."""
    copies = PlainCopies(nbytes)

    async def save(tree: dict[str, Any], name: str) -> float:
        begin = perf_counter()
        captured: list[float] = []
        await place.write(name, copies.parts(tree, captured))
        return captured[0] - begin

    yield save


@asynccontextmanager
async def with_torch_save(place: Place, nbytes: int) -> AsyncIterator[Save]:
    """What most people do: torch.save in a thread. The source may change when it is done."""

    def write(tree: dict[str, Any], path: str) -> None:
        with open(path, "wb") as file:
            torch.save(tree, file)
            file.flush()
            if not isinstance(place, Server):
                os.fsync(file.fileno())

    async def save(tree: dict[str, Any], name: str) -> float:
        begin = perf_counter()
        path = os.path.join(place.scratch, name)
        await asyncio.to_thread(write, tree, path)
        captured = perf_counter() - begin
        await _send_on(place, path, name)
        return captured

    yield save


@asynccontextmanager
async def with_dcp(place: Place, nbytes: int, *, process: bool) -> AsyncIterator[Save]:
    """torch.distributed.checkpoint.async_save, called as its users do, from a coroutine; to S3 through fsspec."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    # The process that writes makes a group of its own, where these say.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD

    async def save(tree: dict[str, Any], name: str) -> float:
        begin = perf_counter()
        where = place.where(name)
        writer = FsspecWriter(where) if isinstance(place, Server) else None
        future: Any = dcp.async_save(tree, checkpoint_id=where, storage_writer=writer, async_checkpointer_type=kind)
        returned = perf_counter() - begin
        await asyncio.wrap_future(future)
        return returned

    with _process_group():
        yield save


@asynccontextmanager
async def with_torch_checkpointing(place: Place, nbytes: int) -> AsyncIterator[Save]:
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

    async def save(tree: dict[str, Any], name: str) -> float:
        begin = perf_counter()
        path = os.path.join(place.scratch, name)
        staged, written = saver.save(path, Checkpoint(tree))
        await asyncio.wrap_future(staged)
        returned = perf_counter() - begin
        await asyncio.wrap_future(written)
        await _send_on(place, path, name)
        return returned

    try:
        yield save
    finally:
        saver.close()


@asynccontextmanager
async def with_torchsnapshot(place: Place, nbytes: int) -> AsyncIterator[Save]:
    """torchsnapshot, archived in 2024. It starts event loops of its own, so it has to be called in a thread.

    Without a process group it makes a store for itself and fails where its socket's address is not IPv6's; with one it
    uses that group's.
    """
    import torchsnapshot

    async def save(tree: dict[str, Any], name: str) -> float:
        begin = perf_counter()
        state = {"state": torchsnapshot.StateDict(**tree)}
        pending = await asyncio.to_thread(torchsnapshot.Snapshot.async_take, place.where(name), state)
        returned = perf_counter() - begin
        await asyncio.to_thread(pending.wait)
        return returned

    with _process_group():
        yield save


@contextmanager
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


async def _send_on(place: Place, path: str, name: str) -> None:
    """Upload what could only be written to a disk, and remove it there."""
    if isinstance(place, Server):
        await place.upload(path, name)
        await asyncio.to_thread(shutil.rmtree if os.path.isdir(path) else os.unlink, path)


SAVERS: dict[str, Callable[[Place, int], Any]] = {
    "aiostage": with_aiostage,
    "aiostage, a quarter of the memory": partial(with_aiostage, share=0.25),
    "its storage alone": with_storage,
    "obstore's writer alone": with_writer,
    "plain threads": with_plain_threads,
    "torch.save in a thread": with_torch_save,
    "dcp.async_save, thread": partial(with_dcp, process=False),
    "dcp.async_save, process": partial(with_dcp, process=True),
    "torch_checkpointing": with_torch_checkpointing,
    "torchsnapshot": with_torchsnapshot,
}
"""Add a way here: a context manager that takes a place and the size of a state dict and gives a coroutine function."""

RIVALS = [
    "torch.save in a thread",
    "dcp.async_save, thread",
    "dcp.async_save, process",
    "torch_checkpointing",
    "torchsnapshot",
]
