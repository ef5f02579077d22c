"""Loading beside what else loads, from the page cache or the disk, and over a network that takes its time.

    python benchmarks/loading.py [--mib 512] [--latency 0.05] [--rounds 5] [--cold] [--local | --only-remote]

Each row is measured in a process of its own, in turns. Some ways map the file, and read nothing before it is asked for:
*returned* is when a way says that it is done, *looked at* when one byte of every page has been looked at, too. Ratios
are medians over the rounds. With ``--cold`` no file is in the page cache, which otherwise all are. *In place* is into
tensors that are there; what it cannot do without is beside it: reading as many bytes into memory that is there, with
``preadv`` in one thread, and past the page cache in two. *CPU* is the CPU time of the process until a way returned.
Beside loads over the network are ranged gets by obstore alone, 16 at once: whose bytes are dropped, and whose bytes are
copied to new memory and digested in a thread, which is what a load cannot do without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import obstore
import torch
import torch.distributed.checkpoint as dcp
from delays import LoopDelay
from obstore.store import LocalStore, S3Store
from safetensors.torch import load_file
from xxhash import xxh3_64_hexdigest

import aiostage
from aiostage.storage import objects
from aiostage.storage.objects import ObjectStorage

TENSORS = 32
PIECE_BYTES = 8 << 20
BUCKET = "bucket"
OURS = "`aiostage.load`"
LOCAL = {
    OURS: "load",
    "`aiostage.load(verify=False)`": "load_unverified",
    "safetensors `load_file`, maps": "load_file",
    "`torch.load(mmap=True)`, maps": "torch_mapped",
    "`torch.load`": "torch",
    "`dcp.load`": "dcp",
    **({"RunAI's streamer, copied": "runai"} if find_spec("runai_model_streamer") else {}),
    **({"fastsafetensors": "fast"} if find_spec("fastsafetensors") else {}),
    "`aiostage.load(in_place=True)`": "in_place",
    "`aiostage.load(in_place=True, verify=False)`": "in_place_unverified",
    "`dcp.load` in place": "dcp_in_place",
    "`preadv` alone": "preadv",
    "direct reads alone": "direct",
}
"""Ways to load from a local disk, by the names of their rows."""

RIVALS: dict[str, Callable[[str], dict[str, torch.Tensor]]] = {
    "load_file": lambda path: load_file(f"{path}/model.safetensors"),
    "torch_mapped": lambda path: torch.load(f"{path}.pt", mmap=True),
    "torch": lambda path: torch.load(f"{path}.pt"),
    "dcp": lambda path: load_distributed(f"{path}-dcp", empty_like(f"{path}-dcp")),
    "runai": lambda path: streamed(f"{path}/model.safetensors"),
    "fast": lambda path: fast(f"{path}/model.safetensors"),
}
"""Each runs in a thread, with the path of aiostage's checkpoint, beside which their own are."""

AT_ONCE = (4, 8, 16)

REMOTE: dict[str, tuple[str, int]] = {
    **{f"{number} requests at once": ("remote", number) for number in AT_ONCE},
    "obstore's ranged gets alone": ("gets", AT_ONCE[-1]),
    "the same, copied and digested": ("gets_copied", AT_ONCE[-1]),
}
"""Ways to load over a network, and how many requests each has under way."""

IN_PLACE = ("in_place", "in_place_unverified", "dcp_in_place", "preadv", "direct")
"""These are given memory that was written to before."""


def streamed(path: str) -> dict[str, torch.Tensor]:
    """Load with RunAI's streamer, whose tensors have to be copied to be kept."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


def fast(path: str) -> dict[str, torch.Tensor]:
    """Load with fastsafetensors."""
    from fastsafetensors import fastsafe_open

    with fastsafe_open([path], device="cpu", nogds=True) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def read_all(path: str, tree: dict[str, torch.Tensor]) -> None:
    """Read the bytes of a file into tensors, in one thread."""
    with open(path, "rb") as file:
        offset = os.fstat(file.fileno()).st_size - sum(tensor.nbytes for tensor in tree.values())
        for tensor in tree.values():
            memory = tensor.view(torch.uint8).numpy().data
            while memory:
                count = os.preadv(file.fileno(), [memory[:PIECE_BYTES]], offset)
                memory, offset = memory[count:], offset + count


def read_direct(path: str, memory: np.ndarray[Any, Any]) -> None:
    """Read a file past the page cache into memory that is aligned, in two threads."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECT)
    offsets = iter(range(0, os.fstat(number).st_size, PIECE_BYTES))

    def read() -> None:
        for offset in offsets:
            os.preadv(number, [memory[offset : offset + PIECE_BYTES].data], offset)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(number)


def warm_memory(how: str, path: str) -> Any:
    """Return what is read into in place, each page of it written to."""
    if how == "direct":
        size = os.stat(f"{path}/model.safetensors").st_size + 2 * PIECE_BYTES
        memory = np.zeros(size, np.uint8)
        memory[::4096] = 1
        return memory[-memory.ctypes.data % 4096 :]
    return {name: tensor.fill_(1) for name, tensor in empty_like(f"{path}-dcp").items()}


async def load_in_place(how: str, path: str, memory: Any) -> dict[str, torch.Tensor]:
    """Load into memory of :func:`warm_memory`."""
    if how in ("in_place", "in_place_unverified"):
        await aiostage.load(path, into=memory, in_place=True, verify=how == "in_place")
    elif how == "dcp_in_place":
        await asyncio.to_thread(load_distributed, f"{path}-dcp", memory)
    elif how == "preadv":
        await asyncio.to_thread(read_all, f"{path}/model.safetensors", memory)
    else:
        await asyncio.to_thread(read_direct, f"{path}/model.safetensors", memory)
        return {}
    return dict(memory)


async def gets(path: str, port: int, at_once: int, *, copied: bool) -> dict[str, torch.Tensor]:
    """Get the file of tensors in ranges, with obstore alone."""
    bucket = Path(path).with_name("bucket")
    (file,) = bucket.rglob("model.safetensors")
    size, connected = file.stat().st_size, store(port)
    memory = np.empty(size if copied else 0, np.uint8)
    offsets = iter(range(0, size, PIECE_BYTES))

    def use(offset: int, data: Any) -> None:
        memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        xxh3_64_hexdigest(data)

    async def get() -> None:
        for offset in offsets:
            length = min(PIECE_BYTES, size - offset)
            data = await obstore.get_range_async(connected, str(file.relative_to(bucket)), start=offset, length=length)
            if copied:
                await asyncio.to_thread(use, offset, memoryview(data))

    await asyncio.gather(*[get() for _ in range(at_once)])
    return {"": torch.from_numpy(memory)} if copied else {}


def touch(tree: dict[str, torch.Tensor]) -> None:
    """Look at every page."""
    for tensor in tree.values():
        tensor.view(torch.uint8).view(-1)[::4096].max()


async def measured(path: str, how: str, port: int, at_once: int) -> dict[str, float]:
    """Load once; return seconds, peak memory beyond what there was before, and the loop's worst delay."""
    await aiostage.load(f"{path}-small")
    memory = warm_memory(how, path) if how in IN_PLACE else None
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    async with LoopDelay() as delay:
        begin, used = perf_counter(), process_time()
        if how in IN_PLACE:
            tree = await load_in_place(how, path, memory)
        elif how in RIVALS:
            tree = await asyncio.to_thread(RIVALS[how], path)
        elif how == "remote":
            objects._READS_AT_ONCE = at_once
            tree = await aiostage.load((ObjectStorage(store(port), "run"), "checkpoint"))
        elif how in ("gets", "gets_copied"):
            tree = await gets(path, port, at_once, copied=how == "gets_copied")
        else:
            tree = await aiostage.load(path, verify=how == "load")
        returned, used = perf_counter() - begin, process_time() - used
    # By all cores, which is no delay of anybody's making.
    touch(tree)
    seconds = perf_counter() - begin
    return {
        "returned": returned,
        "seconds": seconds,
        "cpu": used,
        "peak": resident("VmHWM") - before,
        "delay": max(delay.delays, default=0.0),
    }


def empty_like(path: str) -> dict[str, torch.Tensor]:
    """Return new memory for a checkpoint of DCP's."""
    return {
        key: torch.empty(entry.size)
        for key, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()
    }


def load_distributed(path: str, tree: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load into tensors."""
    dcp.load(tree, checkpoint_id=path, no_dist=True)
    return tree


def files_below(directory: Path) -> Iterable[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def cache(directory: Path) -> None:
    for path in files_below(directory):
        path.read_bytes()


def evict(directory: Path) -> None:
    for path in files_below(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(field: str) -> int:
    """Return a figure of the kernel's about this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def store(port: int) -> S3Store:
    return S3Store(
        BUCKET,
        endpoint=f"http://127.0.0.1:{port}",
        access_key_id="a",
        secret_access_key="b",
        region="us-east-1",
        client_options={"allow_http": True},
    )


def serve(root: Path, latency: float) -> int:
    """Serve the files below a directory as a bucket, each request after a while. Returns the port."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)

    def accept() -> None:
        while True:
            connection, _ = listening.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer_all, args=(connection, root, latency), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listening.getsockname()[1])


def answer_all(connection: socket.socket, root: Path, latency: float) -> None:
    received = b""
    with connection, suppress(OSError):
        while True:
            while b"\r\n\r\n" not in received:
                data = connection.recv(1 << 16)
                if not data:
                    return
                received += data
            head, _, received = received.partition(b"\r\n\r\n")
            time.sleep(latency)
            answer(connection, head.decode(), root)


def answer(connection: socket.socket, head: str, root: Path) -> None:
    method, target, _ = head.split(" ", 2)
    file = root / target.split("?", 1)[0].removeprefix(f"/{BUCKET}/")
    if not file.is_file():
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    size = file.stat().st_size
    wanted = re.search(r"(?i)\r\nrange: *bytes=(\d+)-(\d+)", head)
    start, stop = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
    status = f"206 Partial Content\r\nContent-Range: bytes {start}-{stop - 1}/{size}" if wanted else "200 OK"
    connection.sendall(
        f'HTTP/1.1 {status}\r\nETag: "1"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
        f"Content-Length: {stop - start}\r\n\r\n".encode()
    )
    if method == "GET":
        with file.open("rb") as opened:
            connection.sendfile(opened, start, stop - start)


def fresh(path: str, how: str, port: int = 0, at_once: int = 0) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", path, how, str(port), str(at_once)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def row(name: str, found: list[dict[str, float]], beside: list[dict[str, float]], nbytes: int) -> str:
    returned = statistics.median(each["returned"] for each in found)
    ratios = [each["seconds"] / ours["seconds"] for each, ours in zip(found, beside, strict=True)]
    seconds = statistics.median(each["seconds"] for each in found)
    cpu = statistics.median(each["cpu"] for each in found)
    peak, delay = max(each["peak"] for each in found), max(each["delay"] for each in found)
    rate, ratio = nbytes / seconds / 1e6, statistics.median(ratios)
    return (
        f"| {name} | {returned:.3f} s | {seconds:.3f} s | {ratio:.2f} | {cpu:.3f} s | {rate:.0f} MB/s "
        f"| {peak / 2**20:.0f} MiB | {1e3 * delay:.1f} ms |"
    )


async def prepare(
    directory: Path, tree: dict[str, torch.Tensor], *, only_in_place: bool = False, only_remote: bool = False
) -> None:
    (directory / "bucket").mkdir()
    await aiostage.save({"a": torch.zeros(1)}, directory / "local-small")
    if not only_remote:
        await aiostage.save(tree, directory / "local")
        dcp.save(tree, checkpoint_id=directory / "local-dcp", no_dist=True)
        if only_in_place:
            return
        torch.save(tree, directory / "local.pt")
    remote = ObjectStorage(LocalStore(directory / "bucket"), "run")
    await aiostage.save(tree, (remote, "checkpoint"))


def main(
    mib: int, latency: float, rounds: int, cold: bool, local: bool, only_in_place: bool, only_remote: bool
) -> None:
    tree = {f"{number:02}": torch.randn(mib * 2**18 // TENSORS) for number in range(TENSORS)}
    nbytes = sum(tensor.nbytes for tensor in tree.values())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        asyncio.run(prepare(directory, tree, only_in_place=only_in_place, only_remote=only_remote))
        tree.clear()
        port = serve(directory / "bucket", latency)
        path = str(directory / "local")
        rows: dict[str, tuple[Any, ...]] = {} if only_remote else {name: (how,) for name, how in LOCAL.items()}
        if not local:
            rows |= {name: (how, port, number) for name, (how, number) in REMOTE.items()}
        if only_in_place:
            rows = {name: (how,) for name, how in LOCAL.items() if how in IN_PLACE}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
        for _ in range(rounds):
            for each, arguments in rows.items():
                (evict if cold else cache)(directory)
                found[each].append(fresh(path, *arguments))
    print(
        f"{mib} MiB in {TENSORS} tensors, {'on the disk' if cold else 'in the page cache'}; "
        f"requests take {1e3 * latency:.0f} ms before the first byte\n"
    )
    print(
        "| way | returned | looked at | by ours | CPU | rate | memory at most | worst loop delay |\n| --- |"
        + " ---: |" * 7
    )
    ours = "`aiostage.load(in_place=True)`" if only_in_place else f"{AT_ONCE[-1]} requests at once"
    for each in rows:
        print(row(each, found[each], found[ours if only_in_place or only_remote else OURS], nbytes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        where, how, port, at_once = sys.argv[2:]
        print(json.dumps(asyncio.run(measured(where, how, int(port), int(at_once)))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--local", action="store_true", help="without the network")
    parser.add_argument("--only-in-place", action="store_true", help="only into tensors that are there")
    parser.add_argument("--only-remote", action="store_true", help="only over the network")
    main(**vars(parser.parse_args()))
