"""What a system may lack, and what is done without it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiostage._platform import files, limits, page_cache
from tests.patience import seconds
from tests.warm import PYTEST, PYTHON

ROOT = Path(__file__).parent.parent

ANEW = """
import sys, warnings
warnings.simplefilter("error")
for name in [name for name in sys.modules if name.partition(".")[0] == "aiostage"]:
    del sys.modules[name]
"""
"""What a program begins with that imports aiostage on another system than the process did that it is a fork of."""

ON_A_BARE_SYSTEM = [
    "tests/memory/test_shared.py",
    "tests/memory/test_pool.py::TestLeases",
    "tests/staging/test_sharing.py",
    "tests/storage/test_local.py",
]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_all_works_where_linux_calls_are_missing() -> None:
    program = ANEW + "import pytest\nsys.exit(pytest.main())"
    options = [*PYTEST[2:], "-q", "-p", "tests.bare_system", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*PYTHON, "-c", program, *options, *ON_A_BARE_SYSTEM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds(200),
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_they_are_missing_there() -> None:
    program = """
import os, tests.bare_system
from aiostage._platform import files, memory, threads
assert not threads.HAS_TIMERS and threads.open_timer() == -1
assert files._renameat2 is None and threads._sched_yield is None and memory._madvise is None and threads._usleep is None
assert not files.rename("absent", "absent too", exchange=True)
assert not files.set_direct(0, True)
threads.yield_core(), threads.let_threads_run(), memory.discard(0, 0)
number, page = memory.memory_file("name"), memory.PAGE_BYTES
os.ftruncate(number, 3 * page)
os.pwrite(number, b"kept", page)
memory.reserve_memory(number, 0, 3 * page)
assert os.fstat(number).st_blocks * 512 >= 3 * page
assert os.pread(number, 4, page) == b"kept"
into = bytearray(4)
assert files.read_into(number, memoryview(into), page) == 4 and into == b"kept"
assert files.read_into(number, memoryview(into), 3 * page) == 0
"""
    subprocess.run([*PYTHON, "-c", ANEW + program], cwd=ROOT, check=True, timeout=seconds(20))


def test_pages_of_64_kib(tmp_path: Path) -> None:
    """As of many kernels for aarch64: no size of a page is a constant."""
    program = f"""
import asyncio, mmap
mmap.PAGESIZE = mmap.ALLOCATIONGRANULARITY = 64 << 10
import torch, aiostage
from aiostage import AsyncStager, Checkpointer, StagingOptions
from aiostage._platform import memory
assert memory.PAGE_BYTES == 64 << 10 and not memory.HAS_HUGE_PAGES

async def main():
    tree = {{"large": torch.arange(300_001), "odd": torch.arange(40_000, dtype=torch.uint8)[3:], "s": torch.ones(3)}}
    for shared in (False, True):
        async with AsyncStager(StagingOptions(use_shared_memory=shared, max_host_bytes=64 << 20)) as stager:
            staged = await stager.stage(tree)
            statistics = stager.statistics()
            held = statistics.shared_bytes if shared else statistics.pageable_bytes
            assert held and held % (64 << 10) == 0
            async with Checkpointer({str(tmp_path)!r} + f"/{{shared}}", stager) as checkpoints:
                await (await checkpoints.save(1, staged)).committed()
                loaded = await checkpoints.restore()
                into = {{key: torch.zeros_like(value) for key, value in tree.items()}}
                await checkpoints.restore(into=into, in_place=True)
            for key, value in tree.items():
                for found in (staged, loaded, into):
                    assert torch.equal(found[key], value), key

asyncio.run(main())
"""
    subprocess.run([*PYTHON, "-c", ANEW + program], cwd=ROOT, check=True, timeout=seconds(30))


def test_nothing_that_containers_forbid_is_used() -> None:
    """The seccomp profiles of container engines refuse these calls, and kernels without privileges the second."""
    for path in (ROOT / "aiostage").rglob("*.py"):
        assert not {"io_uring", "userfaultfd"} & set(re.findall(r"\w+", path.read_text())), path


def test_windows_is_refused_in_one_sentence() -> None:
    program = "import torch, numpy, anyio, xxhash, asyncio, ctypes, sys; sys.platform = 'win32'; import aiostage"
    done = subprocess.run(
        [*PYTHON, "-c", ANEW + program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds(20)
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: aiostage does not support Windows")


class TestMacos:
    """Its calls, seen from Linux: that they are made, with its numbers for its flags."""

    def test_renamex_np(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[bytes, bytes, int]] = []
        answer = 0

        def renamex_np(old: bytes, new: bytes, flags: int) -> int:
            calls.append((old, new, flags))
            return answer

        monkeypatch.setattr(files, "_renameat2", None)
        monkeypatch.setattr(files, "_renamex_np", renamex_np)
        assert files.rename("a", "b", exchange=True)
        assert files.rename("a", "b", exchange=False)
        # RENAME_SWAP and RENAME_EXCL of <sys/stdio.h>.
        assert calls == [(b"a", b"b", 2), (b"a", b"b", 4)]
        answer = -1
        ctypes.set_errno(errno.ENOTSUP)
        assert not files.rename("a", "b", exchange=True)
        ctypes.set_errno(errno.EEXIST)
        with pytest.raises(FileExistsError):
            files.rename("a", "b", exchange=False)

    @pytest.mark.parametrize("number", [None, errno.ENOTSUP, errno.EIO])
    def test_full_fsync(self, number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []

        def ask(descriptor: int, command: int) -> int:
            calls.append(command)
            if number is not None:
                raise OSError(number, os.strerror(number))
            return 0

        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", ask)
        monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
        if number == errno.EIO:
            with pytest.raises(OSError, match="Input/output error"):
                files.sync(0)
        else:
            files.sync(0)
        assert calls == ([51, "fsync"] if number == errno.ENOTSUP else [51])


class TestMemoryLimit:
    def test_no_control_groups(self, tmp_path: Path) -> None:
        assert limits.memory_limit(tmp_path) is None

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def test_the_tightest_of_a_group_and_those_around_it(self, tmp_path: Path) -> None:
        self.write(tmp_path / "proc/self/cgroup", "0::/pods/mine\n")
        self.write(tmp_path / "sys/fs/cgroup/pods/mine/memory.max", "max\n")
        assert limits.memory_limit(tmp_path) is None
        self.write(tmp_path / "sys/fs/cgroup/pods/memory.max", "4096\n")
        assert limits.memory_limit(tmp_path) == 4096
        self.write(tmp_path / "sys/fs/cgroup/pods/mine/memory.max", "8192\n")
        assert limits.memory_limit(tmp_path) == 4096

    def test_seen_from_a_container(self, tmp_path: Path) -> None:
        self.write(tmp_path / "proc/self/cgroup", "4:cpu,memory:/docker/abc\n0::/\n")
        self.write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
        assert limits.memory_limit(tmp_path) is None
        self.write(tmp_path / "sys/fs/cgroup/memory.max", "1000\n")
        assert limits.memory_limit(tmp_path) == 1000
        self.write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "500\n")
        assert limits.memory_limit(tmp_path) == 500


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system does not say what its page cache has")
@pytest.mark.parametrize("counted", [True, False])
def test_what_the_page_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
    if counted:
        if not page_cache._HAS_CACHESTAT:
            pytest.skip("this system counts no cached pages")
        # Pages are counted in one call, and not mapped and looked at one by one.
        monkeypatch.setattr(page_cache, "_mincore", None)
    else:
        monkeypatch.setattr(page_cache, "_HAS_CACHESTAT", False)
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        is_cached = partial(page_cache.is_cached, count=page_cache.counts_cached_pages())
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        if is_cached(file.fileno(), 0, 1 << 20):
            pytest.skip("this file system is a part of the page cache, or the kernel does not say")
        # A read of some pages makes half of the first megabyte cached, and nothing of the rest.
        os.pread(file.fileno(), 512 << 10, 0)
        assert is_cached(file.fileno(), 0, 512 << 10)
        assert not is_cached(file.fileno(), 512 << 10, 512 << 10)
        # Nothing that could be asked about counts as cached: it is then read in the usual way.
        assert is_cached(file.fileno(), 1, 4096)
    assert is_cached(-1, 0, 4096)


FILTERED = """
    import ctypes, struct, sys
    from aiostage._platform import page_cache
    # Load the number of the call; if it is that of cachestat end the process, else allow it.
    lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 451), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    library = ctypes.CDLL(None)
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(lines), ctypes.addressof(program)))
    refused = library.prctl(38, 1, 0, 0, 0) or library.prctl(22, 2, described, 0, 0)
    if refused:
        sys.exit(77)
    with open(sys.argv[1], "rb") as file:
        print(page_cache.is_cached(file.fileno(), 0, 1 << 20, count=page_cache.counts_cached_pages()))
"""
"""A process whose filter ends it for a call that is newer than the filter, as systemd's may be."""


@pytest.mark.skipif(not page_cache._HAS_CACHESTAT, reason="this system counts no cached pages")
@pytest.mark.timeout(120)
def test_a_filter_of_system_calls_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    command = [*PYTHON, "-c", textwrap.dedent(FILTERED), str(path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=seconds(30.0), check=False)
    if found.returncode == 77:
        pytest.skip("this system does not let processes filter their calls")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "True"


@pytest.mark.timeout(120)
def test_a_bare_container() -> None:
    """No HOME, a user without a name, nowhere to write but the target."""
    program = """
import asyncio, os, sys, aiostage, torch
# The interpreter may lie where only its owner can read it.
os.setgid(54321), os.setuid(54321)

async def main():
    async with aiostage.AsyncStager() as stager:
        staged = await stager.stage({"a": torch.arange(3)})
    await aiostage.save(staged, sys.argv[1])
    return await aiostage.load(sys.argv[1])

assert asyncio.run(main())["a"].tolist() == [0, 1, 2]
"""
    if os.getuid() != 0:
        pytest.skip("only root can become a user without a name")
    environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TMPDIR": "/nonexistent"}
    # Not in pytest's own directories: each run of pytest takes all rights to them from other users.
    with tempfile.TemporaryDirectory() as target:
        os.chmod(target, 0o777)
        done = subprocess.run(
            [sys.executable, "-c", program, target + "/a"],
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds(30),
        )
    assert done.returncode == 0, done.stderr
