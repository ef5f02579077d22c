"""Memory that another coroutine takes away from its tensors while copies of it wait or run.

Each case runs in a process of its own: what this is about ends processes.
"""

from __future__ import annotations

import subprocess

import pytest

from tests.patience import seconds
from tests.warm import PYTHON

PROGRAM = """
import asyncio, gc, sys
import torch
from aiostage import AsyncStager, StagingOptions, TornSnapshotError
from tests.staging.holding import copies_held

changes, elements, count, kind = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
detect = sys.argv[5] == "1"


class Mine(torch.Tensor):
    pass


class Yours(torch.Tensor):
    pass


def leaf(number):
    # Rows of several sizes, some of them consecutive.
    tensor = torch.full((elements + number % 3,), float(number + 1))
    if kind == "strided":
        return torch.full((4, elements), float(number + 1)).t()
    if kind == "subclass":
        return tensor.as_subclass(Yours if number % 2 else Mine)
    return tensor


def replace(tensor, change):
    if change == "data":
        tensor.data = torch.zeros(tensor.shape)
    elif change == "swap":
        torch.utils.swap_tensors(tensor, torch.zeros(tensor.shape).as_subclass(type(tensor)))
    elif change == "set":
        with torch.no_grad():
            torch.Tensor.set_(tensor, torch.zeros(tensor.shape))
    elif change == "free":
        tensor.untyped_storage().resize_(0)
    elif change == "grow":
        tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() * 3)


kept = []


async def main(change):
    tree = {"step": 1, "w": {f"p{n}": leaf(n) for n in range(count)}}
    options = StagingOptions(detect_torn=detect, dtype=torch.bfloat16 if kind == "cast" else None)
    async with AsyncStager(options) as stager:
        for _ in range(2):
            before = await stager.stage(tree)
        expected = [tensor.clone() for tensor in before["w"].values()]
        del before
        with copies_held(stager) as release:
            async with stager.snapshot(tree) as snapshot:
                for tensor in list(tree["w"].values())[::2]:
                    replace(tensor, change)
                kept.extend(torch.full((elements,), -1.0) for _ in range(count))
                release.set()
                try:
                    staged = await snapshot.result()
                except TornSnapshotError as error:
                    print(change, "torn", len(error.paths), flush=True)
                else:
                    same = all(map(torch.equal, staged["w"].values(), expected))
                    print(change, "right" if same else "wrong", flush=True)
                    del staged
        gc.collect()
        assert stager.statistics().leases == 0


for change in changes:
    asyncio.run(main(change))
    kept.clear()
"""


def run(changes: list[str], elements: int, count: int, kind: str = "plain", *, detect: bool = True) -> list[str]:
    arguments = [",".join(changes), str(elements), str(count), kind, str(int(detect))]
    done = subprocess.run(
        [*PYTHON, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=seconds(120), check=False
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stdout.splitlines()


CHANGES = ["data", "swap", "set", "free", "grow"]
SIZES = [(4_000_000, 2), (1000, 40)]


@pytest.mark.parametrize(("elements", "count"), SIZES, ids=["16 MiB", "small"])
@pytest.mark.parametrize("kind", ["plain", "cast", "strided", "subclass"])
def test_a_copy_of_what_was_replaced_is_torn(elements: int, count: int, kind: str) -> None:
    assert run(CHANGES, elements, count, kind) == [f"{change} torn {count // 2}" for change in CHANGES]


@pytest.mark.parametrize(("elements", "count"), SIZES, ids=["16 MiB", "small"])
def test_without_detection_it_is_right_all_the_same(elements: int, count: int) -> None:
    # The copies read the storages that the leaves had, which were not written to.
    assert run(["data", "swap", "set"], elements, count, detect=False) == ["data right", "swap right", "set right"]


def test_what_was_freed_is_torn_also_without_detection() -> None:
    # There is nothing left to be copied.
    assert run(["free", "grow"], 4_000_000, 2, detect=False) == ["free torn 1", "grow torn 1"]


LARGER = """
import asyncio
import torch
from aiostage import AsyncStager, StagingOptions, TornSnapshotError


async def main():
    for detect in (True, False):
        ended = set()
        async with AsyncStager(StagingOptions(max_loop_hold=1e-9, detect_torn=detect)) as stager:
            for turn in range(1, 13, 1 + (not detect)):
                small = [torch.ones(1) for _ in range(600)]
                tree = {"before": small[::2], "leaf": torch.ones(7), "after": small[1::2]}
                staging = asyncio.ensure_future(stager.stage(tree))
                for _ in range(turn):
                    await asyncio.sleep(0)
                tree["leaf"].data = torch.full((2**22,), 3.0)
                try:
                    leaf = (await staging)["leaf"]
                except TornSnapshotError as error:
                    assert error.paths == ("state_dict['leaf']",), error.paths
                    ended.add("torn")
                else:
                    assert leaf.unique().item() == (1.0 if leaf.shape == (7,) else 3.0)
        assert ended == {"torn"} or not detect, ended


asyncio.run(main())
"""


def test_a_leaf_that_becomes_larger_before_its_inspection_is_not_read_beyond_its_end() -> None:
    done = subprocess.run([*PYTHON, "-c", LARGER], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
