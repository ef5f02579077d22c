"""Loading beside what else loads, from the page cache or the disk, and over a network that takes its time.

    python benchmarks/loading.py [--mib 512] [--latency 0.05] [--rounds 5] [--cold] [--local | --only-remote]

Each row is measured in a process of its own, in turns. Some ways map the file, and read nothing before it is asked for:
*returned* is when a way says that it is done, *looked at* when one byte of every page has been looked at, too. Ratios
are medians over the rounds. *With a core* is the worst delay of the loop less the time in which its thread was ready to
run and had no core, which is the kernel's and other programs' doing. *CPU* is the CPU time of the process until a way
returned. With ``--cold`` no file is in the page cache, which otherwise all are: each process sees to that itself, right
before it measures, because a kernel may take files out of its cache within seconds. How much of them was there is said
below the table.

*In place* is into tensors that are there. What it cannot do without is beside it: reading as many bytes into memory
that is there, with ``preadv`` in one thread, or past the page cache in two. And the floor, the least that checks allow:
reads and digests in two threads; or reads past the cache, digests and copies, in as many threads as are best. Beside
loads over the network are ranged gets by obstore alone, 16 at once: whose bytes are dropped, and whose bytes are copied
to new memory and digested in two threads, which is the floor there.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
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
from report import Check
from safetensors.torch import load_file
from xxhash import xxh3_64, xxh3_64_hexdigest

import aiostage
from aiostage._platform.memory import PAGE_BYTES, populate
from aiostage._platform.page_cache import _cached_pages
from aiostage.storage import objects
from aiostage.storage.objects import ObjectStorage

TENSORS = 32
PIECE_BYTES = 8 << 20
BLOCK_BYTES = 256 << 10
BUCKET = "bucket"
RUNAI, FAST = find_spec("runai_model_streamer"), find_spec("fastsafetensors")
OURS = "`aiostage.load`"
OURS_IN_PLACE = "`aiostage.load(in_place=True)`"
PREADV = "`preadv` alone"
DIGESTED = "`preadv` and digests alone, 2 threads"
DIRECT = "direct reads alone"
GETS = "obstore's ranged gets alone"
GETS_COPIED = "the same, copied and digested"
LOCAL = {
    OURS: "load",
    "`aiostage.load(verify=False)`": "load_unverified",
    "safetensors `load_file`, maps": "load_file",
    "`torch.load(mmap=True)`, maps": "torch_mapped",
    "`torch.load`": "torch",
    "`dcp.load`": "dcp",
    **({"RunAI's streamer, copied": "runai"} if RUNAI else {}),
    **({"fastsafetensors": "fast"} if FAST else {}),
    OURS_IN_PLACE: "in_place",
    "`aiostage.load(in_place=True, verify=False)`": "in_place_unverified",
    "`dcp.load` in place": "dcp_in_place",
    "safetensors `load_file`, then `copy_`": "load_file_in_place",
    "`torch.load(mmap=True)`, then `copy_`": "torch_mapped_in_place",
    **({"RunAI's streamer, then `copy_`": "runai_in_place"} if RUNAI else {}),
    **({"fastsafetensors, then `copy_`": "fast_in_place"} if FAST else {}),
    PREADV: "preadv",
    DIGESTED: "digested",
    DIRECT: "direct",
    **{f"{DIRECT}, digested and copied, {threads} threads": f"direct_copied-{threads}" for threads in (2, 3, 4)},
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
    GETS: ("gets", AT_ONCE[-1]),
    GETS_COPIED: ("gets_copied", AT_ONCE[-1]),
}
"""Ways to load over a network, and how many requests each has under way."""

IN_PLACE = frozenset(list(LOCAL.values())[list(LOCAL).index(OURS_IN_PLACE) :])
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

    run_threads(read, 2)
    os.close(number)


def run_threads(work: Callable[[], object], number: int) -> None:
    """Run a function in several threads."""
    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_and_digest(path: str, tree: dict[str, torch.Tensor]) -> None:
    """Read the bytes of a file into tensors, half a mebibyte at a time, and compute digests, in two threads."""
    number = os.open(path, os.O_RDONLY)
    start, pieces = os.fstat(number).st_size - sum(tensor.nbytes for tensor in tree.values()), []
    for tensor in tree.values():
        memory = tensor.view(torch.uint8).numpy().data
        pieces += [(start + at, memory[at : at + PIECE_BYTES]) for at in range(0, len(memory), PIECE_BYTES)]
        start += len(memory)
    queue = iter(pieces)

    def read() -> None:
        for offset, memory in queue:
            digest = xxh3_64()
            for at in range(0, len(memory), 512 << 10):
                piece = memory[at : at + (512 << 10)]
                os.preadv(number, [piece], offset + at)
                digest.update(piece)
            digest.hexdigest()

    run_threads(read, 2)
    os.close(number)


def read_direct_and_copy(path: str, tree: dict[str, torch.Tensor], threads: int) -> None:
    """Read a file past the page cache into buffers, compute digests, and copy to tensors, each thread all of it."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(number).st_size
    start, places = size - sum(tensor.nbytes for tensor in tree.values()), []
    for tensor in tree.values():
        places.append((start, start + tensor.nbytes, tensor.view(torch.uint8)))
        start += tensor.nbytes
    offsets = iter(range(0, size, PIECE_BYTES))

    def work() -> None:
        memory = np.empty(PIECE_BYTES + 4096, np.uint8)
        buffer = memory[-memory.ctypes.data % 4096 :][:PIECE_BYTES]
        # A read that faults it in keeps the address space locked, and the loop waits for that in its next mmap.
        buffer[::4096] = 0
        bytes_read = torch.from_numpy(buffer)
        for offset in offsets:
            count = os.preadv(number, [buffer.data], offset)
            xxh3_64_hexdigest(buffer.data[:count])
            for begin, end, tensor in places:
                first, last = max(begin, offset), min(end, offset + count)
                if first < last:
                    tensor[first - begin : last - begin].copy_(bytes_read[first - offset : last - offset])

    torch.set_num_threads(1)
    run_threads(work, threads)
    os.close(number)


def warm_memory(how: str, path: str) -> Any:
    """Return what is read into in place, each page of it written to."""
    if how == "direct":
        size = os.stat(f"{path}/model.safetensors").st_size + 2 * PIECE_BYTES
        memory = np.zeros(size, np.uint8)
        memory[::4096] = 1
        return memory[-memory.ctypes.data % 4096 :]
    return {name: tensor.fill_(1) for name, tensor in empty_like(f"{path}-dcp").items()}


def copied(load: Callable[[str], dict[str, torch.Tensor]], path: str, memory: dict[str, torch.Tensor]) -> None:
    """Load, and copy into tensors that are there."""
    for name, tensor in load(path).items():
        memory[name].copy_(tensor)


class Delay(LoopDelay):
    """Also knows how late the loop was while its thread had a core, or did not want one."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[float] = []
        self._kernel = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        self._waited = self._waited_ns()

    def _waited_ns(self) -> int:
        """How long this thread has been ready to run and had no core, since it was started."""
        return int(os.pread(self._kernel, 64, 0).split()[1])

    def _note(self, now: int, count: int) -> None:
        waited = self._waited_ns()
        if count:
            self.held.append(max(0, now - self._next - (waited - self._waited)) / 1e9)
        self._waited = waited
        super()._note(now, count)


async def load_in_place(how: str, path: str, memory: Any) -> dict[str, torch.Tensor]:
    """Load into memory of :func:`warm_memory`."""
    if how in ("in_place", "in_place_unverified"):
        await aiostage.load(path, into=memory, in_place=True, verify=how == "in_place")
    elif how == "dcp_in_place":
        await asyncio.to_thread(load_distributed, f"{path}-dcp", memory)
    elif how == "preadv":
        await asyncio.to_thread(read_all, f"{path}/model.safetensors", memory)
    elif how == "digested":
        await asyncio.to_thread(read_and_digest, f"{path}/model.safetensors", memory)
    elif how.startswith("direct_copied"):
        threads = int(how.rpartition("-")[2])
        await asyncio.to_thread(read_direct_and_copy, f"{path}/model.safetensors", memory, threads)
    elif how.endswith("_in_place"):
        await asyncio.to_thread(copied, RIVALS[how.removesuffix("_in_place")], path, memory)
    else:
        await asyncio.to_thread(read_direct, f"{path}/model.safetensors", memory)
        return {}
    return dict(memory)


async def gets(path: str, port: int, at_once: int, *, copied: bool) -> dict[str, torch.Tensor]:
    """Get the file of tensors in ranges, with obstore alone."""
    bucket = Path(path).with_name("bucket")
    (file,) = bucket.rglob("model.safetensors")
    size, connected = file.stat().st_size, store(port)
    # PyTorch's memory has ordinary pages. NumPy asks for huge ones, which a hypervisor may have to find first.
    memory = torch.empty(size if copied else 0, dtype=torch.uint8).numpy()
    offsets, threads = iter(range(0, size, PIECE_BYTES)), ThreadPoolExecutor(2)

    def use(offset: int, data: Any) -> None:
        # A little at a time, so that it is copied out of the cache, and to pages that are there.
        digest = xxh3_64()
        for at in range(0, len(data), BLOCK_BYTES):
            block = np.frombuffer(data[at : at + BLOCK_BYTES], np.uint8)
            target = memory[offset + at : offset + at + len(block)]
            digest.update(block)
            first = target.ctypes.data // PAGE_BYTES * PAGE_BYTES
            populate(first, -(-(target.ctypes.data + len(block) - first) // PAGE_BYTES) * PAGE_BYTES)
            target[:] = block
        digest.hexdigest()

    async def get() -> None:
        for offset in offsets:
            length = min(PIECE_BYTES, size - offset)
            data = await obstore.get_range_async(connected, str(file.relative_to(bucket)), start=offset, length=length)
            if copied:
                await asyncio.get_running_loop().run_in_executor(threads, use, offset, memoryview(data))

    await asyncio.gather(*[get() for _ in range(at_once)])
    return {"": torch.from_numpy(memory)} if copied else {}


def touch(tree: dict[str, torch.Tensor]) -> None:
    """Look at every page."""
    for tensor in tree.values():
        tensor.view(torch.uint8).view(-1)[::4096].max()


async def measured(path: str, how: str, port: int, at_once: int, cold: bool) -> dict[str, float]:
    """Load once; return seconds, peak memory beyond what there was before, and the loop's worst delay."""
    await aiostage.load(f"{path}-small")
    for name in ("runai_model_streamer", "fastsafetensors"):
        # As the others are imported above. In its own row only, since it may change what others take.
        if how.startswith(name[:4]):
            import_module(name)
    memory = warm_memory(how, path) if how in IN_PLACE else None
    (evict if cold else cache)(Path(path).parent)
    cached = cached_share(Path(path).parent)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    async with Delay() as delay:
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
        "held": max(delay.held, default=0.0),
        "cached": cached,
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
    # Into memory that is used again: what is freed may go back to a hypervisor, which takes a core meanwhile.
    memory = bytearray(PIECE_BYTES)
    for path in files_below(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def evict(directory: Path) -> None:
    for path in files_below(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(directory: Path) -> float:
    """Return how much of the files is in the page cache, of 1; NaN where the kernel does not say."""
    pages, cached = 0, 0.0
    for path in files_below(directory):
        size = path.stat().st_size
        pages += -(-size // PAGE_BYTES)
        # Linux says it of files that the caller may write to.
        with path.open("rb+") as file:
            counted = _cached_pages(file.fileno(), 0, size) if size else 0
            cached += float("nan") if counted is None else counted
    return cached / pages


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


def fresh(path: str, how: str, port: int = 0, at_once: int = 0, *, cold: bool) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", path, how, str(port), str(at_once), "cold" if cold else "cached"]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer


def row(name: str, found: list[dict[str, float]], beside: list[dict[str, float]], nbytes: int) -> str:
    returned = statistics.median(each["returned"] for each in found)
    # Rivals may have taken part in the first rounds only.
    ratios = [each["seconds"] / ours["seconds"] for each, ours in zip(found, beside, strict=False)]
    seconds = statistics.median(each["seconds"] for each in found)
    cpu = statistics.median(each["cpu"] for each in found)
    peak, delay, held = (max(each[key] for each in found) for key in ("peak", "delay", "held"))
    rate, ratio = nbytes / seconds / 1e6, statistics.median(ratios)
    return (
        f"| {name} | {returned:.3f} s | {seconds:.3f} s | {ratio:.2f} | {cpu:.3f} s | {rate:.0f} MB/s "
        f"| {peak / 2**20:.0f} MiB | {1e3 * delay:.1f} ms | {1e3 * held:.1f} ms |"
    )


def ratio(found: dict[str, list[dict[str, float]]], first: str, second: str) -> float:
    """Return the median over the rounds of one way's time until it returned by another's."""
    pairs = zip(found[first], found[second], strict=True)
    return statistics.median(mine["returned"] / theirs["returned"] for mine, theirs in pairs)


def targets(found: dict[str, list[dict[str, float]]], ours: str, bare: str, limit: float, floors: list[str]) -> str:
    """Return a table of what a load should take, each figure beside the best floor that was measured in its rounds."""
    floor = min(floors, key=lambda each: ratio(found, each, bare))
    floor_ratio, ours_floor = ratio(found, floor, bare), ratio(found, ours, floor)
    checks = [(Check(f"{ours} / {bare}", ratio(found, ours, bare), limit), floor_ratio, ours_floor)]
    for key, what in (("delay", "worst loop delay, ms"), ("held", "worst loop delay with a core, ms")):
        mine, theirs = (1e3 * max(each[key] for each in found[way]) for way in (ours, floor))
        checks.append((Check(f"{ours}, {what}", mine, 5), theirs, mine / theirs if theirs else float("inf")))
    lines = [
        f"| target | figure | limit | | floor: {floor} | figure / floor |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    return "\n".join([*lines, *(f"{check.as_row()} {least:.3g} | {times:.2f} |" for check, least, times in checks)])


async def prepare(
    directory: Path, tree: dict[str, torch.Tensor], *, only_in_place: bool = False, only_remote: bool = False
) -> None:
    (directory / "bucket").mkdir()
    await aiostage.save({"a": torch.zeros(1)}, directory / "local-small")
    if not only_remote:
        await aiostage.save(tree, directory / "local")
        dcp.save(tree, checkpoint_id=directory / "local-dcp", no_dist=True)
        torch.save(tree, directory / "local.pt")
        if only_in_place:
            return
    remote = ObjectStorage(LocalStore(directory / "bucket"), "run")
    await aiostage.save(tree, (remote, "checkpoint"))


def main(
    mib: int, latency: float, rounds: int, rivals: int, cold: bool, local: bool, only_in_place: bool, only_remote: bool
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
        # A floor for each state: what is not in the page cache is not read through it, and the other way round.
        other = "digested" if cold else "direct_copied"
        rows = {name: each for name, each in rows.items() if not each[0].startswith(other)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
        # One that is not counted. In some runs all code of the first load was slow, the interpreter's too, and of a
        # second one in the same process it was not: 2 GiB took 0.39 and 0.47 s, and then 0.17 and 0.19.
        fresh(path, *next(iter(rows.values())), cold=cold)
        for number in range(rounds):
            for each, arguments in rows.items():
                if number >= rivals and arguments[0].removesuffix("_in_place") in RIVALS:
                    continue
                found[each].append(fresh(path, *arguments, cold=cold))
    print(
        f"{mib} MiB in {TENSORS} tensors, {'on the disk' if cold else 'in the page cache'}; "
        f"requests take {1e3 * latency:.0f} ms before the first byte\n"
    )
    print(
        "| way | returned | looked at | by ours | CPU | rate | memory at most | worst loop delay | with a core |\n"
        + "| --- |"
        + " ---: |" * 8
    )
    remote = f"{AT_ONCE[-1]} requests at once"
    ours = OURS_IN_PLACE if only_in_place else remote if only_remote else OURS
    for each in rows:
        if found[each]:
            print(row(each, found[each], found[ours], nbytes))
    for missing, installed in (("RunAI's streamer", RUNAI), ("fastsafetensors", FAST)):
        if not installed and not only_remote:
            print(f"| {missing} | is not installed |" + " |" * 7)
    shares = sorted(100 * one["cached"] for each in found.values() for one in each)
    print(f"\nOf the files, {shares[0]:.1f} to {shares[-1]:.1f} % were in the page cache when measurements began.")
    copied_directly = [each for each in rows if each.startswith(f"{DIRECT}, ")]
    if not only_remote:
        bare, limit, floors = (DIRECT, 1.1, copied_directly) if cold else (PREADV, 1.2, [DIGESTED])
        print("\n" + targets(found, OURS_IN_PLACE, bare, limit, floors))
    if not local:
        print("\n" + targets(found, remote, GETS, 1.1, [GETS_COPIED]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        where, how, port, at_once, state = sys.argv[2:]
        print(json.dumps(asyncio.run(measured(where, how, int(port), int(at_once), state == "cold"))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rivals", type=int, default=sys.maxsize, help="rounds in which other libraries are measured")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--local", action="store_true", help="without the network")
    parser.add_argument("--only-in-place", action="store_true", help="only into tensors that are there")
    parser.add_argument("--only-remote", action="store_true", help="only over the network")
    main(**vars(parser.parse_args()))
