from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aiostage._loop.workers import Workers
from aiostage._memory.arena import Arena
from aiostage._memory.pool import Lease, Pool
from aiostage._memory.shared import SharedFile, SharedHandle
from aiostage.errors import HostMemoryError
from tests.descriptors import SHARED_MEMORY, opened
from tests.memory import opening
from tests.warm import PYTHON

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create and /proc")


def descriptors() -> set[tuple[str, str]]:
    return opened(SHARED_MEMORY)


class Stranger:
    """A process that is not a child of this one's multiprocessing and knows nothing but a handle."""

    def __init__(self, handle: SharedHandle) -> None:
        self.process = subprocess.Popen(
            [*PYTHON, "-m", "tests.memory.opening"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.tell(pickle.dumps(handle).hex())

    def tell(self, line: str = "") -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def sum(self) -> int:
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.stderr.read())
        return int(line)

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.communicate()


class TestHandle:
    def test_is_small_and_picklable(self):
        handle = Arena.shared(MIB).share(MIB)
        assert pickle.loads(pickle.dumps(handle)) == handle
        assert len(pickle.dumps(handle)) < 300

    def test_opens_the_same_bytes_without_a_copy(self):
        arena = Arena.shared(64 * MIB)
        exporter = arena.exporter(MIB)
        exporter[:] = 7
        opened = arena.share(MIB).open()
        assert opened.nbytes == MIB
        assert opened.ctypes.data != exporter.ctypes.data
        assert (opened == 7).all()
        exporter[0] = 8
        assert opened[0] == 8, "it is the same memory"

    def test_writing_to_what_was_opened_changes_no_other_process(self):
        arena = Arena.shared(MIB)
        exporter = arena.exporter(MIB)
        handle = arena.share(MIB)
        first, second = handle.open(), handle.open()
        first[:] = 9
        assert not exporter.any()
        assert not second.any()
        assert (first == 9).all()

    def test_makes_writable_tensors(self):
        arena = Arena.shared(MIB)
        opened = arena.share(MIB).open()
        tensor = torch.from_numpy(opened)
        assert tensor.add_(1).sum() == MIB

    def test_costs_one_descriptor_while_it_is_open_and_none_afterwards(self):
        arena = Arena.shared(MIB)
        before = descriptors()
        opened = arena.share(MIB).open()
        assert len(descriptors() - before) == 1
        tensor = torch.from_numpy(opened)[5:]
        del opened
        assert len(descriptors() - before) == 1
        del tensor
        assert not descriptors() - before

    def test_what_was_opened_outlives_its_owner(self):
        arena = Arena.shared(MIB)
        arena.exporter(MIB)[:] = 7
        opened = arena.share(MIB).open()
        arena.close()
        del arena
        assert (opened == 7).all()


class TestStaleHandles:
    def test_the_owner_is_gone(self):
        with subprocess.Popen(["true"]) as process:
            process.wait()
        handle = replace(Arena.shared(MIB).share(MIB), pid=process.pid)
        with pytest.raises(HostMemoryError, match=f"{MIB} bytes cannot be opened: process {process.pid} cannot"):
            handle.open()

    def test_the_descriptor_is_closed(self):
        arena = Arena.shared(MIB)
        handle = arena.share(MIB)
        arena.close()
        with pytest.raises(HostMemoryError, match="No such file"):
            handle.open()

    def test_the_descriptor_is_another_file_by_now(self):
        arena, other = Arena.shared(MIB), Arena.shared(MIB)
        before = descriptors()
        with pytest.raises(HostMemoryError, match=f"process {os.getpid()} has closed it"):
            replace(arena.share(MIB), descriptor=other.share(MIB).descriptor).open()
        assert not descriptors() - before

    def test_of_a_closed_file_whose_number_is_that_of_another(self):
        file, other = SharedFile(MIB), SharedFile(MIB)
        file.close()
        file._descriptor = other.handle(MIB).descriptor
        with pytest.raises(HostMemoryError, match=f"process {os.getpid()} has closed it"):
            file.handle(MIB).open()

    def test_the_memory_is_in_use_again(self):
        arena = Arena.shared(MIB)
        handle = arena.share(MIB)
        assert arena.claim()
        before = descriptors()
        with pytest.raises(HostMemoryError, match="used its memory again"):
            handle.open()
        assert not descriptors() - before
        arena.share(MIB).open()


class TestClaim:
    def test_not_while_somebody_has_it_open(self):
        arena = Arena.shared(MIB)
        first, second = arena.share(MIB).open(), arena.share(MIB).open()
        assert not arena.claim()
        del first
        assert not arena.claim()
        view = second[5:10]
        del second
        assert not arena.claim()
        del view
        assert arena.claim()
        assert arena.claim()

    def test_nor_while_another_process_has(self):
        arena = Arena.shared(MIB)
        arena.exporter(MIB)[:] = 1
        stranger = Stranger(arena.share(MIB))
        assert stranger.sum() == MIB
        assert not arena.claim()
        stranger.end()
        assert arena.claim(), "the kernel drops the locks of the dead"


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_multiprocessing_takes_handles(method: str):
    arena = Arena.shared(MIB)
    arena.exporter(MIB)[:] = 3
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=opening.report_sum, args=(arena.share(MIB), theirs))
    process.start()
    theirs.close()
    assert ours.recv() == 3 * MIB
    arena.close()
    del arena
    ours.send(None)
    assert ours.recv() == 3 * MIB, "memory lives while either side maps it"
    error = ours.recv()
    assert isinstance(error, HostMemoryError)
    process.join()
    assert process.exitcode == 0
    ours.close()


def test_a_stranger_reads_on_after_the_owner_was_killed():
    script = """
import pickle, sys
from aiostage._memory.arena import Arena
arena = Arena.shared(1 << 20)
arena.exporter(1 << 20)[:] = 2
print(pickle.dumps(arena.share(1 << 20)).hex(), flush=True)
with open("/proc/self/maps") as maps:
    shared = [line for line in maps if "memfd:" in line or "/dev/shm" in line]
print(*(line.split(maxsplit=5)[5].strip() for line in shared), sep="|", flush=True)
sys.stdin.readline()
"""
    owner = subprocess.Popen([*PYTHON, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    handle = pickle.loads(bytes.fromhex(owner.stdout.readline()))
    names = owner.stdout.readline().strip().split("|")
    assert any(name.startswith(SHARED_MEMORY) for name in names)
    assert all(name.endswith(" (deleted)") for name in names), "nothing has a name, so nothing stays behind"
    stranger = Stranger(handle)
    assert stranger.sum() == 2 * MIB
    owner.kill()
    owner.communicate()
    stranger.tell()
    assert stranger.sum() == 2 * MIB
    with pytest.raises(HostMemoryError):
        handle.open()
    stranger.end()


@pytest.mark.asyncio
class TestPools:
    async def test_memory_that_a_reader_has_open_is_not_reused(self, workers: Workers):
        pool = Pool(workers, shared=True)
        lease = await pool.acquire(MIB)
        lease.buffer[:] = 5
        opened = lease.share().open()
        place = lease.arena.address
        del lease

        other = await pool.acquire(MIB)
        assert other.arena.address != place
        other.buffer[:] = 6
        assert (opened == 5).all()
        del opened, other
        reused = [await pool.acquire(MIB) for _ in range(2)]
        assert place in [lease.arena.address for lease in reused]

    async def test_at_the_budget_the_next_waits_for_the_reader(self, workers: Workers):
        pool = Pool(workers, shared=True, max_bytes=MIB)
        lease = await pool.acquire(MIB)
        lease.buffer[:] = 1
        stranger = Stranger(lease.share())
        assert await workers.run(stranger.sum) == MIB
        del lease
        waiting = asyncio.create_task(pool.acquire(MIB))
        for _ in range(10):
            await asyncio.sleep(0)
        assert pool.statistics().waiting == 1
        await workers.run(stranger.end)
        lease = await waiting
        assert lease.buffer.nbytes == MIB

    async def test_descriptors_do_not_grow_with_tensors(self, workers: Workers):
        pool = Pool(workers, shared=True)
        await pool.acquire(MIB)
        before = descriptors()
        lease = await pool.acquire(4 * MIB)
        tensors = [torch.from_numpy(lease.buffer[start : start + 64]) for start in range(0, 2 * MIB, 64)]
        assert len(tensors) > 30_000
        assert len(descriptors() - before) <= 2


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYTHON, "-c", script], capture_output=True, text=True, check=False)


def test_memory_that_cannot_be_reserved_is_an_error_with_the_number_and_nothing_stays():
    done = run("""
import asyncio, os, resource, warnings
from aiostage._loop.workers import Workers
from aiostage._memory.pool import Pool
from aiostage.errors import HostMemoryError

async def main():
    workers = Workers(2, "workers")
    pool = Pool(workers, shared=True)
    await pool.acquire(1 << 20)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
    try:
        await pool.acquire(16 << 20)
    except HostMemoryError as error:
        print(error)
    while pool.statistics().arenas > 1:
        await asyncio.sleep(0.001)
    assert len(os.listdir("/proc/self/fd")) <= before
    lease = await pool.acquire(2 << 20)
    lease.buffer[:] = 1
    print("works on")

asyncio.run(main())
""")
    assert done.returncode == 0, done.stderr
    assert f"the kernel refuses {16 * MIB} bytes of host memory" in done.stdout
    assert "works on" in done.stdout


def test_a_full_file_system_is_an_error_and_no_bus_error():
    """A file on a tmpfs of 4 MiB in place of the anonymous one, which has no size of its own."""
    script = f"""
import os
from aiostage._memory import shared
from aiostage._memory.arena import Arena
from aiostage.errors import HostMemoryError

def on_small_file_system(name, flags):
    return os.open("/mnt", os.O_RDWR | os.O_TMPFILE)

os.memfd_create = on_small_file_system
arena = Arena.shared({16 * MIB})
try:
    arena.reserve(0, arena.nbytes)
except HostMemoryError as error:
    print(error)
"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=4m tmpfs /mnt"
    if subprocess.run([*command, mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system does not let this user mount a small tmpfs")
    done = subprocess.run(
        [*command, f'{mount} && exec "$0" -c "$1"', sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert f"the kernel refuses {16 * MIB} bytes" in done.stdout
    assert "No space left on device" in done.stdout


def test_a_dropped_file_closes_its_descriptor():
    before = descriptors()
    file = SharedFile(MIB)
    assert len(descriptors() - before) == 1
    del file
    gc.collect()
    assert not descriptors() - before


def test_a_lease_is_what_is_shared(workers: Workers):
    async def acquire() -> Lease:
        return await Pool(workers, shared=True).acquire(100)

    lease = asyncio.run(acquire())
    assert lease.share().nbytes == 100
    assert lease.share().open().nbytes == 100
