"""What it costs to read a local checkpoint: counted, since timings depend on the machine."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import aiostage
from aiostage._loop.workers import Job, Workers
from aiostage._platform.files import open_direct
from aiostage._platform.memory import PAGE_BYTES
from aiostage.checkpoint import part_reader
from aiostage.format.parts import PART_BYTES
from aiostage.storage import files
from aiostage.storage.files import InputFile, aligned_memory, open_directory
from aiostage.storage.local import LocalReader
from aiostage.testing import SimulatedAccelerator
from tests.checkpoint.comparing import assert_same

PARTS = 6


def tree() -> dict[str, Any]:
    return {str(number): torch.randn(PART_BYTES // 4) for number in range(PARTS)}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of each call that reads a file."""
    found: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        found.append((offset, sum(map(len, buffers))))
        return real(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were copied from buffers, a number for each part."""
    found: list[int] = []

    def counting(real: Callable[..., None]) -> Callable[..., None]:
        def scatter(part: Any, buffer: torch.Tensor) -> None:
            found.append(part.nbytes)
            real(part, buffer)

        return scatter

    monkeypatch.setattr(part_reader, "scatter", counting(part_reader.scatter))
    return found


@pytest.mark.asyncio
async def test_large_tensors_are_read_to_where_they_belong(
    tmp_path: Path, reads: list[tuple[int, int]], copied: list[int]
) -> None:
    saved = tree()
    await aiostage.save(saved, tmp_path / "checkpoint")
    reads.clear()
    assert_same(saved, await aiostage.load(tmp_path / "checkpoint"))
    # The first part is read for its header, without memory for it, and once more to where it belongs.
    assert copied == []
    path = tmp_path / "checkpoint" / "model.safetensors"
    manifest = (tmp_path / "checkpoint" / "manifest.json").stat().st_size
    assert sum(nbytes for _, nbytes in reads) == path.stat().st_size + PART_BYTES + manifest
    # A core still has in its cache what is verified. A kernel that does not preempt lets the event loop run soon.
    assert max(nbytes for _, nbytes in reads) <= 512 << 10


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize(("in_place", "cold"), [(False, None), (True, None), (True, 2 * PART_BYTES)])
async def test_the_event_loop_has_a_turn_for_several_parts_at_a_time(
    in_place: bool, cold: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[object] = []
    real = Workers.job

    def job(self: Workers, **options: bool) -> Job:
        jobs.append(self)
        return real(self, **options)

    monkeypatch.setattr(Workers, "job", job)

    async def jobs_for(parts: int) -> int:
        saved = {"0": torch.randn(parts * PART_BYTES // 4)}
        path = tmp_path / str(parts)
        await aiostage.save(saved, path)
        jobs.clear()
        if in_place:
            live = {"0": torch.zeros_like(saved["0"])}
            await aiostage.load(path, into=live, in_place=True)
        else:
            live = await aiostage.load(path)
        assert_same(saved, live)
        return len(jobs)

    # One part that is not in the page cache does not have the others read one by one.
    monkeypatch.setattr(files, "is_cached", lambda number, offset, nbytes, count: offset != cold)
    # Those that find out about a file are as many for 4 parts as for 24. The last parts are read one by one.
    assert await jobs_for(24) - await jobs_for(4) <= 8


@pytest.mark.one_loop
@pytest.mark.asyncio
@pytest.mark.parametrize("verify", [True, False])
async def test_a_thread_enters_few_functions_for_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    calls: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    async def calls_for(parts: int) -> int:
        saved = {"0": torch.randn(parts * PART_BYTES // 4)}
        path = tmp_path / str(parts)
        await aiostage.save(saved, path)
        live = {"0": torch.zeros_like(saved["0"])}
        calls.clear()
        threading.setprofile(profile)
        try:
            await aiostage.load(path, into=live, in_place=True, verify=verify)
        finally:
            threading.setprofile(None)
        assert_same(saved, live)
        return len(calls)

    monkeypatch.setattr(files, "is_cached", lambda number, offset, nbytes, count: True)
    # One for each half mebibyte, and some for the part, in which it is cut, read and compared.
    assert (await calls_for(24) - await calls_for(4)) / 20 <= 16 + 34


@pytest.mark.asyncio
async def test_unselected_bytes_are_read_only_to_verify_them(
    tmp_path: Path, reads: list[tuple[int, int]], copied: list[int]
) -> None:
    saved = tree()
    await aiostage.save(saved, tmp_path / "checkpoint")
    for verify, most in ((True, 3 * PART_BYTES), (False, PART_BYTES)):
        reads.clear()
        copied.clear()
        loaded = await aiostage.load(tmp_path / "checkpoint", only="3", verify=verify)
        assert_same({"3": saved["3"]}, loaded)
        assert not copied
        assert PART_BYTES <= sum(nbytes for _, nbytes in reads) < most + (1 << 20)


@pytest.mark.one_loop
@pytest.mark.asyncio
async def test_a_part_of_many_small_tensors_is_read_at_once(
    tmp_path: Path, reads: list[tuple[int, int]], copied: list[int]
) -> None:
    saved = {str(number): torch.randn(4096) for number in range(1000)}
    await aiostage.save(saved, tmp_path / "checkpoint")
    reads.clear()
    assert_same(saved, await aiostage.load(tmp_path / "checkpoint"))
    assert len(copied) == 2
    assert len(reads) < 60


@pytest.mark.asyncio
@pytest.mark.parametrize("where", [2.5, PARTS - 0.5])
async def test_damage_in_what_is_read_piece_by_piece(tmp_path: Path, where: float) -> None:
    await aiostage.save(tree(), tmp_path / "checkpoint")
    with (tmp_path / "checkpoint" / "model.safetensors").open("r+b") as file:
        file.seek(int(where * PART_BYTES))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(aiostage.CheckpointCorruptError, match="do not match their checksum"):
        await aiostage.load(tmp_path / "checkpoint")
    with pytest.raises(aiostage.CheckpointCorruptError, match="do not match their checksum"):
        await aiostage.load(tmp_path / "checkpoint", only=str(int(where)))


@pytest.fixture
def direct_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were read past the page cache, a number for each call; nothing counts as cached."""
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        pytest.skip("this system has no direct I/O")
    found: list[int] = []
    real = os.preadv

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        count = real(number, buffers, offset)
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT:
            found.append(count)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(files, "is_cached", lambda number, offset, nbytes, count: False)
    return found


async def save_direct(saved: dict[str, Any], path: Path) -> None:
    """Save a checkpoint whose file can be read past the page cache, or skip the test."""
    await aiostage.save(saved, path)
    with open_directory(str(path)) as directory:
        number = open_direct("model.safetensors", directory.fileno())
    if number is None:
        pytest.skip("this file system has no direct I/O")
    os.close(number)


def odd_tree(value: float) -> dict[str, Any]:
    """Return a tree of several parts whose file does not end at the end of a page."""
    return tree_of(value) | {
        "small": [torch.full((3,), value) for _ in range(100)],
        "turned": torch.full((7, 5), value).t(),
    }


def tree_of(value: float) -> dict[str, Any]:
    return {str(number): torch.full((PART_BYTES // 4 + 1,), value + number) for number in range(PARTS)}


@pytest.mark.asyncio
@pytest.mark.parametrize("verify", [True, False])
async def test_what_is_not_cached_is_read_past_the_cache_in_place(
    tmp_path: Path, direct_reads: list[int], verify: bool
) -> None:
    saved, live = odd_tree(1.0), odd_tree(0.0)
    await save_direct(saved, tmp_path / "checkpoint")
    assert await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True, verify=verify) is live
    assert_same(saved, live)
    # One call a part, but for the first if it is not verified: it has a gap.
    *whole, last = sorted(direct_reads, reverse=True)
    assert set(whole) == {PART_BYTES}
    assert last < PART_BYTES
    size = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    assert sum(direct_reads) == size - (0 if verify else PART_BYTES)
    direct_reads.clear()
    await aiostage.load(tmp_path / "checkpoint", verify=verify)
    assert not direct_reads


@pytest.mark.asyncio
async def test_devices_are_loaded_in_place_past_the_cache(tmp_path: Path, direct_reads: list[int]) -> None:
    saved = tree_of(1.0)
    await save_direct(saved, tmp_path / "checkpoint")
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator:
        live = {key: accelerator.to_device(value) for key, value in tree_of(0.0).items()}
        await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True, backend=accelerator)
        accelerator.synchronize()
        assert len(direct_reads) >= PARTS - 1
        assert_same(saved, live)


@pytest.mark.asyncio
async def test_of_two_readers_the_second_reads_through_the_cache(tmp_path: Path, direct_reads: list[int]) -> None:
    saved, live = tree_of(1.0), tree_of(0.0)
    await save_direct(saved, tmp_path / "checkpoint")
    with (tmp_path / "checkpoint" / "model.safetensors").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)
    assert_same(saved, live)
    assert not direct_reads


@pytest.mark.asyncio
async def test_a_file_system_that_refuses_direct_reads(
    tmp_path: Path, direct_reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, live = tree_of(1.0), tree_of(0.0)
    await save_direct(saved, tmp_path / "checkpoint")
    counting = os.preadv

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return counting(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)
    assert_same(saved, live)
    assert not direct_reads


@pytest.mark.asyncio
async def test_the_disk_has_three_reads_and_a_load_four_buffers(
    tmp_path: Path, direct_reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, live = tree_of(1.0), tree_of(0.0)
    await save_direct(saved, tmp_path / "checkpoint")
    counted, aligned = os.preadv, files.aligned_memory
    together, lock, buffers = threading.Barrier(3), threading.Lock(), 0
    under_way = most = begun = 0

    def preadv(number: int, memory: list[memoryview], offset: int) -> int:
        nonlocal under_way, most, begun
        if not fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT:
            return counted(number, memory, offset)
        with lock:
            under_way, begun = under_way + 1, begun + 1
            most, is_first = max(most, under_way), begun <= together.parties
        try:
            if is_first:
                # Broken, which fails the load, unless the others come.
                together.wait(20)
            return counted(number, memory, offset)
        finally:
            with lock:
                under_way -= 1

    def aligned_memory(nbytes: int) -> Any:
        nonlocal buffers
        buffers += nbytes == PART_BYTES
        return aligned(nbytes)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(files, "aligned_memory", aligned_memory)
    await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)
    assert_same(saved, live)
    assert most == 3
    assert 3 <= buffers <= 4


def has_pages(memory: memoryview) -> bool:
    """Return whether all pages of a buffer are in memory, or swapped."""
    address = files.address_of(memory)
    first, last = address // PAGE_BYTES, (address + len(memory) - 1) // PAGE_BYTES
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read((last - first + 1) * 8), np.uint64)
    return bool((entries >> np.uint64(62)).all())


@pytest.mark.asyncio
@pytest.mark.parametrize("to_device", [False, True])
async def test_direct_reads_fault_in_no_memory(
    tmp_path: Path, direct_reads: list[int], monkeypatch: pytest.MonkeyPatch, to_device: bool
) -> None:
    # While they do, the address space is locked, and the event loop waits for that in its next mmap.
    saved, live = tree_of(1.0), tree_of(0.0)
    await save_direct(saved, tmp_path / "checkpoint")
    counted = os.preadv
    found: list[bool] = []

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT:
            found.extend(map(has_pages, buffers))
        return counted(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with SimulatedAccelerator(seed=1, spontaneous=True) as accelerator:
        if to_device:
            live = {key: accelerator.to_device(value) for key, value in live.items()}
        await aiostage.load(
            tmp_path / "checkpoint", into=live, in_place=True, backend=accelerator if to_device else None
        )
        accelerator.synchronize()
        assert_same(saved, live)
    assert len(found) >= PARTS - 1
    assert all(found)


@pytest.mark.asyncio
async def test_each_of_many_files_is_read_past_the_cache(tmp_path: Path, direct_reads: list[int]) -> None:
    saved = {str(number): torch.full((1024,), float(number)) for number in range(40)}
    live = {key: torch.zeros_like(value) for key, value in saved.items()}
    await save_direct({"0": saved["0"]}, tmp_path / "probe")
    await aiostage.save(saved, tmp_path / "checkpoint", max_shard_bytes=4096)
    opened, most = LocalReader._file, 0

    def counted(reader: LocalReader, name: str) -> InputFile:
        nonlocal most
        file = opened(reader, name)
        most = max(most, sum(each.descriptors for each in reader._files.values()))
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalReader, "_file", counted)
        await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)
    assert_same(saved, live)
    # The first parts of two were kept after their headers were read, and the index of the shards is verified, too.
    assert len(direct_reads) == 40 - 2 + 1
    assert most <= 17


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_a_load_in_place_needs_no_second_descriptor(
    tmp_path: Path, direct_reads: list[int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    saved, live = tree_of(1.0), tree_of(0.0)
    await save_direct(saved, tmp_path / "checkpoint")
    real = os.open

    def open_few(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", open_few)
    await aiostage.load(tmp_path / "checkpoint", into=live, in_place=True)
    assert_same(saved, live)
    assert not direct_reads


@pytest.mark.asyncio
async def test_damage_in_what_is_read_past_the_cache(tmp_path: Path, direct_reads: list[int]) -> None:
    await save_direct(tree_of(1.0), tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(3 * PART_BYTES + 1)
        opened.write(b"\xff")
    with pytest.raises(aiostage.CheckpointCorruptError, match="do not match their checksum"):
        await aiostage.load(tmp_path / "checkpoint", into=tree_of(0.0), in_place=True)
    assert direct_reads


def test_a_file_that_becomes_shorter_while_it_is_read_past_the_cache(tmp_path: Path, direct_reads: list[int]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 48)
    with open_directory(str(tmp_path)) as directory, InputFile(directory, "file", path=str(path)) as file:
        if not file.cold_parts(8192):
            pytest.skip("this file system has no direct I/O")
        memory = aligned_memory(8192)
        file.read_past_cache(memory.data, 8192)
        assert memory[:4096].tobytes() == bytes(range(256)) * 16
        os.truncate(path, 5000)
        with pytest.raises(aiostage.CheckpointCorruptError, match="it ends at byte 5000"):
            file.read_past_cache(memory.data, 0)


@pytest.mark.parametrize("kind", ["link", "circle", "fifo"])
def test_a_file_whose_name_something_else_gets_is_read_through_the_cache(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 48)
    with open_directory(str(tmp_path)) as directory, InputFile(directory, "file", path=str(path)) as file:
        path.rename(tmp_path / "other")
        if kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(tmp_path / ("other" if kind == "link" else "file"))
        assert file.cold_parts(8192) == []
        memory = aligned_memory(8192)
        file.read(memory.data, 0)
    assert memory.tobytes() == bytes(range(256)) * 32


def test_a_read_keeps_its_descriptor_when_another_thread_gives_up_reading_past_the_cache(
    tmp_path: Path, direct_reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 48)
    memory, other = aligned_memory(8192), aligned_memory(8192)
    real, calls = os.preadv, 0

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            # What another thread may do between the look at the number and the read.
            file.read_past_cache(other.data, 0)
            os.fstat(number)
        elif fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(number, buffers, offset)

    with open_directory(str(tmp_path)) as directory, InputFile(directory, "file", path=str(path)) as file:
        if not file.cold_parts(8192):
            pytest.skip("this file system has no direct I/O")
        monkeypatch.setattr(os, "preadv", preadv)
        file.read_past_cache(memory.data, 0)
    assert direct_reads == [8192]
    assert memory.tobytes() == other.tobytes() == path.read_bytes()[:8192]


class Copier:
    """Copies that are over when a test says so."""

    def __init__(self) -> None:
        self.over = [asyncio.Event(), asyncio.Event()]

    async def wait(self, number: int) -> None:
        await self.over[number].wait()


@pytest.mark.asyncio
async def test_a_cancelled_read_waits_for_all_copies_to_devices() -> None:
    copier = Copier()
    workers = Workers(1, "test")
    targets = part_reader.ReadTargets(workers, copier=copier)  # type: ignore[arg-type]
    reader = part_reader.PartReader(None, workers, PART_BYTES, targets, verify=True)  # type: ignore[arg-type]
    waiting = asyncio.create_task(reader._wait_until_copied([0, 1]))  # type: ignore[list-item]
    await asyncio.sleep(0)
    waiting.cancel()
    copier.over[0].set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done(), "the second is still being made"
    copier.over[1].set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
