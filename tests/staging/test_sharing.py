"""A staged tree in another process."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import subprocess
from typing import Any

import pytest
import torch

from aiostage import AsyncStager, HostMemoryError, StagingError, StagingOptions
from tests.warm import PYTHON

READER = """
import pickle, sys, torch
tree = pickle.load(sys.stdin.buffer).open()
print(float(tree["a"].sum()), tree["a"] is tree["tied"], tree["row"]._base is None, type(tree["p"]).__name__, tree["n"])
print(tree["row"].untyped_storage().data_ptr() == tree["m"].untyped_storage().data_ptr(), tree["row"].tolist())
"""
SHARED = StagingOptions(use_shared_memory=True)


def named_memory() -> set[str]:
    """Return the names in /dev/shm, without those of the semaphores that other processes make all the time."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


class FirstTwo:
    """Has a state that is a new view each time."""

    conjugate = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getstate__(self) -> torch.Tensor:
        return self.tensor[:2].conj() if self.conjugate else self.tensor[:2]

    def __setstate__(self, state: torch.Tensor) -> None:
        self.tensor = state


def tree() -> dict[str, object]:
    a, m = torch.arange(1000.0), torch.arange(6.0).reshape(2, 3)
    return {"a": a, "tied": a, "m": m, "row": m[1], "p": torch.nn.Parameter(torch.ones(2)), "n": [1, "x"]}


@pytest.mark.asyncio
class TestShare:
    @pytest.mark.one_loop
    async def test_another_process_sees_the_same_tree(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage(tree())
            handle = await stager.share(staged)
            process = await asyncio.create_subprocess_exec(
                *PYTHON, "-c", READER, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            output, _ = await process.communicate(pickle.dumps(handle))
        assert process.returncode == 0
        assert output.decode().split("\n")[:2] == [
            "499500.0 True True Parameter [1, 'x']",
            "True [3.0, 4.0, 5.0]",
        ]

    async def test_a_handle_is_small_for_any_number_of_bytes(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage({"a": torch.ones(2_000_000)})
            assert len(pickle.dumps(await stager.share(staged))) < 1500

    async def test_opens_without_a_copy(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage({"a": torch.ones(1000)})
            opened = (await stager.share(staged)).open()
            assert torch.equal(opened["a"], staged["a"])
            # Writing shows in the reader's own view only.
            opened["a"].zero_()
            assert float(staged["a"].sum()) == 1000

    async def test_a_part_of_the_tree_may_be_shared(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage(tree())
            assert float((await stager.share([staged["a"]])).open()[0].sum()) == 499500

    async def test_tensors_made_while_it_is_pickled_are_those_that_were_made(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage([FirstTwo(torch.arange(4.0) + 10 * number) for number in range(8)])
            opened = (await stager.share(staged)).open()
        assert [item.tensor.tolist() for item in opened] == [[10.0 * number, 10.0 * number + 1] for number in range(8)]

    async def test_a_conjugate_view_that_is_made_while_it_is_pickled_keeps_its_sign(self):
        async with AsyncStager(SHARED) as stager:
            tree = [torch.ones(2), FirstTwo(torch.tensor([1 + 2j, 3 + 4j]))]
            staged = await stager.stage(tree)
            staged[1].conjugate = True
            opened = (await stager.share(staged)).open()
        assert opened[1].tensor.tolist() == [1 - 2j, 3 - 4j]

    async def test_a_handle_of_what_is_gone_is_an_error(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage({"a": torch.ones(1000)})
            handle = await stager.share(staged)
            del staged
            await stager.stage({"a": torch.zeros(1000)})
            with pytest.raises(HostMemoryError):
                handle.open()

    async def test_what_is_not_in_shared_memory_is_refused(self):
        async with AsyncStager() as stager:
            staged = await stager.stage(tree())
            with pytest.raises(StagingError, match="use_shared_memory=True"):
                await stager.share(staged)

    async def test_what_cannot_be_pickled_is_refused(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage({"a": torch.ones(2), "f": lambda: None})
            with pytest.raises(StagingError, match="cannot be described"):
                await stager.share(staged)

    @pytest.mark.filterwarnings("ignore")
    async def test_a_quantized_tensor_without_a_quantizer_is_refused(self):
        """Pickling it would end the process, or be an internal error of PyTorch's."""
        quantized = torch.quantize_per_tensor(torch.ones(8), 0.5, 3, torch.quint8)
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage({"a": torch.ones(2)})
            for without in (quantized.view(torch.quint8), torch.empty(4, dtype=torch.quint8)):
                with pytest.raises(StagingError, match=r"cannot be described to another process: .* no quantizer"):
                    await stager.share([staged, without])

    async def test_a_tree_that_is_too_deep_for_pickle_is_refused(self):
        deep: Any = torch.ones(2)
        # Python 3.14 stops at the end of the thread's stack, and not at a depth.
        for _ in range(50_000):
            deep = [deep]
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage(deep)
            with pytest.raises(StagingError, match="cannot be described to another process: RecursionError"):
                await stager.share(staged)

    async def test_statistics_tell_shared_bytes(self):
        async with AsyncStager(SHARED) as stager:
            staged = await stager.stage({"a": torch.ones(1000)})
            statistics = stager.statistics()
            assert statistics.shared_bytes >= staged["a"].nbytes
            assert statistics.pageable_bytes == statistics.pinned_bytes == 0


OWNER = """
import asyncio, os, sys, torch
from aiostage import AsyncStager, StagingOptions

async def main():
    stager = AsyncStager(StagingOptions(use_shared_memory=True))
    staged = await stager.stage({f"p{n}": torch.ones(1000) for n in range(2000)})
    print(len(os.listdir("/proc/self/fd")), flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


def test_nothing_is_left_in_dev_shm_after_a_kill() -> None:
    before = named_memory()
    process = subprocess.Popen([*PYTHON, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    open_descriptors = int(process.stdout.readline())
    assert named_memory() <= before
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert open_descriptors < 32
    assert named_memory() <= before


@pytest.mark.asyncio
async def test_memory_that_is_not_there_is_an_error_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = {"a": torch.ones(1000)}
    async with AsyncStager(StagingOptions(use_shared_memory=True)) as stager:
        with monkeypatch.context() as full:
            full.setattr(os, "posix_fallocate", refuse, raising=False)
            with pytest.raises(HostMemoryError, match="No space left"):
                await stager.stage(source)
        assert stager.statistics().leases == 0
        assert torch.equal((await stager.stage(source))["a"], source["a"])
