"""What rows 3 and 4 cannot do without: 50,000 tensors of 1 KiB, staged by the calls alone that the promise takes.

    python benchmarks/floor.py --rounds 9

Every way is one plain function, without a walk, a plan, slices, threads or errors. "Copy" makes what a staged copy is:
a dict of tensors with a storage each over one arena, and the bytes gathered into it. "Versions" reads each tensor's
version and form before and after it, as aiostage did before it held storages. "Storages" holds each storage as well,
and compares address, storage and size. "First" is that for tensors of which nothing is known, into new memory: it finds
what each is, and makes the guards that recognize them. CPU time of the process, medians of rounds in which the ways
take turns; aiostage does the same beside it, by the same clock, with a stager that knows them and with a new one.

A second table says what each question costs: "storages" with all questions, less the same without that one. "At once"
is a way that aiostage does not go: it copies each few tensors in the step in which it meets them, and holds no
storages. That would be no faster.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not
from time import process_time
from typing import Any

import numpy as np
import torch
from report import machine
from workloads import many_small

from aiostage import AsyncStager, _private
from aiostage._copy.host import Gather, one_thread

CHUNK = 256
ADDRESS, STORAGE, NBYTES = torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.UntypedStorage.nbytes
MEMORY = torch.UntypedStorage.data_ptr
VERSION, NESTED, GRAD = attrgetter("_version"), attrgetter("is_nested"), attrgetter("grad")
DTYPE, SHAPE, STRIDE, OFFSET = (
    attrgetter("dtype"),
    attrgetter("shape"),
    torch.Tensor.stride,
    torch.Tensor.storage_offset,
)
REQUIRES_GRAD, IS_CPU = attrgetter("requires_grad"), attrgetter("is_cpu")

Noted = list[tuple[list[Any], ...]]

QUESTIONS = ("attributes", "nested", "form", "gradient", "version", "storage again", "storage before the copy")
"""What is asked of each tensor. The first five are asked twice: when it is met and at capture."""


class Floor:
    """One source and one arena.

    Args:
        tree: Tensors of one spec.
    """

    def __init__(self, tree: dict[str, torch.Tensor]) -> None:
        self.tree = tree
        tensors = list(tree.values())
        self.shape, self.dtype = tuple(tensors[0].shape), tensors[0].numpy().dtype
        self.nbytes = tensors[0].nbytes
        self.memory = np.zeros(len(tensors) * self.nbytes, dtype=np.uint8)
        self.guards = list(map(guard, chunks(tensors)))
        self.unasked = ""
        """The question that is left out, to see what it costs."""

    def form(self, number: int, chunk: Sequence[torch.Tensor]) -> None:
        """Find that tensors have the class, dtype, shape and strides that they had, no attributes and no gradient."""
        unasked = self.unasked
        assert unasked == "attributes" or len(gc.get_referents(*chunk)) == len(chunk)
        assert unasked == "nested" or not any(map(NESTED, chunk))
        assert unasked == "form" or self.guards[number].check(*chunk)
        assert unasked == "gradient" or not any(map(is_not, map(GRAD, chunk), repeat(None)))

    def versions(self, chunk: Sequence[torch.Tensor]) -> list[int]:
        """Return the versions of tensors."""
        return [] if self.unasked == "version" else list(map(VERSION, chunk))

    def copy(self, addresses: list[int], memory: Any = None) -> dict[str, torch.Tensor]:
        """Make the staged tensors, and copy."""
        memory = self.memory if memory is None else memory
        with one_thread():
            gather = Gather.over(addresses, self.nbytes, memory)
            assert gather is not None
            gather.run(0, len(gather))
        rows = memory.view(self.dtype).reshape(len(addresses), *self.shape)
        return dict(zip(self.tree, map(torch.from_numpy, rows), strict=True))

    def only_copy(self) -> dict[str, torch.Tensor]:
        """Copy."""
        return self.copy(list(map(ADDRESS, self.tree.values())))

    def with_versions(self) -> dict[str, torch.Tensor]:
        """Copy, and compare versions and forms."""
        noted: Noted = []
        addresses: list[int] = []
        parts = chunks(list(self.tree.values()))
        for number, chunk in enumerate(parts):
            addresses += map(ADDRESS, chunk)
            noted.append((self.versions(chunk),))
            self.form(number, chunk)
        copied = self.copy(addresses)
        for number, chunk in enumerate(parts):
            assert self.versions(chunk) == noted[number][0]
            self.form(number, chunk)
        return copied

    def with_storages(self) -> dict[str, torch.Tensor]:
        """Copy while the storages are held, and compare versions, forms, addresses, storages and sizes."""
        return self._with_storages(self.form, self.memory)

    def at_once(self) -> dict[str, torch.Tensor]:
        """Copy each few tensors when they are met, hold no storages, and compare versions, forms and addresses."""
        noted: Noted = []
        copied: list[torch.Tensor] = []
        parts = chunks(list(self.tree.values()))
        rows = self.memory.view(self.dtype).reshape(len(self.tree), *self.shape)
        with one_thread():
            for number, chunk in enumerate(parts):
                begins = list(map(ADDRESS, chunk))
                noted.append((begins, self.versions(chunk)))
                self.form(number, chunk)
                first, last = len(copied), len(copied) + len(chunk)
                gather = Gather.over(begins, self.nbytes, self.memory[first * self.nbytes : last * self.nbytes])
                assert gather is not None
                gather.run(0, len(gather))
                copied += map(torch.from_numpy, rows[first:last])
        for number, (chunk, (begins, versions)) in enumerate(zip(parts, noted, strict=True)):
            assert list(map(ADDRESS, chunk)) == begins
            assert self.versions(chunk) == versions
            self.form(number, chunk)
        return dict(zip(self.tree, copied, strict=True))

    def without(self, question: str) -> Callable[[], dict[str, torch.Tensor]]:
        """Return the way with storages without a question."""

        def work() -> dict[str, torch.Tensor]:
            self.unasked = question
            try:
                return self.with_storages()
            finally:
                self.unasked = ""

        return work

    def first(self) -> dict[str, torch.Tensor]:
        """Do the same for tensors of which nothing is known, into new memory."""
        # So large that malloc maps it anew.
        return self._with_storages(self._learn, np.empty_like(self.memory))

    def _learn(self, number: int, chunk: Sequence[torch.Tensor]) -> None:
        """Find that tensors are plain, dense and alike, and make their guard."""
        assert len(gc.get_referents(*chunk)) == len(chunk)
        assert _private.dispatch_keys is not None
        assert _private.raw_repr is not None
        assert len(set(map(_private.raw_repr, map(_private.dispatch_keys, chunk)))) == 1
        assert all(map(IS_CPU, chunk))
        assert not any(map(REQUIRES_GRAD, chunk))
        forms = list(zip(map(type, chunk), map(DTYPE, chunk), map(SHAPE, chunk), map(STRIDE, chunk), strict=True))
        assert forms.count(forms[0]) == len(forms)
        assert max(map(OFFSET, chunk)) == 0
        assert not any(map(is_not, map(GRAD, chunk), repeat(None)))
        self.guards[number] = guard(chunk)

    def _with_storages(
        self, look: Callable[[int, Sequence[torch.Tensor]], None], memory: Any
    ) -> dict[str, torch.Tensor]:
        noted: Noted = []
        addresses: list[int] = []
        parts = chunks(list(self.tree.values()))
        for number, chunk in enumerate(parts):
            begins, storages = list(map(ADDRESS, chunk)), list(map(STORAGE, chunk))
            noted.append((begins, storages, list(map(NBYTES, storages)), self.versions(chunk)))
            addresses += begins
            look(number, chunk)
        for begins, storages, sizes, _ in noted if self.unasked != "storage before the copy" else ():
            # Before it is read, in the threads that copy.
            assert list(map(MEMORY, storages)) == begins
            assert list(map(NBYTES, storages)) == sizes
        copied = self.copy(addresses, memory)
        for number, (chunk, (begins, held, sizes, versions)) in enumerate(zip(parts, noted, strict=True)):
            assert list(map(ADDRESS, chunk)) == begins
            storages = held if self.unasked == "storage again" else list(map(STORAGE, chunk))
            assert all(map(is_, storages, held))
            assert list(map(NBYTES, storages)) == sizes
            assert self.versions(chunk) == versions
            self.form(number, chunk)
        return copied


def guard(chunk: Sequence[torch.Tensor]) -> Any:
    """Return what recognizes some tensors."""
    return _private.TensorGuards(
        *chunk,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in chunk],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in chunk],
    )


def chunks(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return tensors in lists of a few."""
    return [tensors[start : start + CHUNK] for start in range(0, len(tensors), CHUNK)]


def timed(work: Callable[[], dict[str, torch.Tensor]], tree: dict[str, torch.Tensor]) -> float:
    """Return how much CPU time some work takes, in milliseconds; dropping its result is no part of it."""
    gc.collect()
    begin = process_time()
    copied = work()
    spent = process_time() - begin
    first, last = next(iter(tree)), next(reversed(tree))
    assert len(copied) == len(tree)
    assert all(torch.equal(copied[name], tree[name]) for name in (first, last))
    return 1e3 * spent


async def staged_in(stager: AsyncStager, tree: dict[str, torch.Tensor]) -> float:
    """Return how much CPU time a staging takes, in milliseconds."""
    gc.collect()
    begin = process_time()
    staged = await stager.stage(tree)
    spent = process_time() - begin
    del staged
    return 1e3 * spent


async def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is measured")
    rounds = parser.parse_args().rounds
    tree = many_small()
    floor = Floor(tree)
    ways = {
        "copy": floor.only_copy,
        "copy, versions": floor.with_versions,
        "copy, versions, storages": floor.with_storages,
        "at once: copy, versions": floor.at_once,
        "first: copy, versions, storages": floor.first,
    }
    unasked = {question: floor.without(question) for question in QUESTIONS}
    spent: dict[str, list[float]] = {name: [] for name in (*ways, "aiostage", "aiostage, first")}
    saved: dict[str, list[float]] = {question: [] for question in QUESTIONS}
    async with AsyncStager() as stager:
        for _ in range(3):
            await stager.stage(tree)
        # Full runs of the collector hit one way or another by chance, and all of them make as many objects.
        gc.collect()
        gc.freeze()
        for _ in range(rounds):
            for name, work in ways.items():
                spent[name].append(timed(work, tree))
            spent["aiostage"].append(await staged_in(stager, tree))
            async with AsyncStager() as new:
                spent["aiostage, first"].append(await staged_in(new, tree))
            for question, work in unasked.items():
                saved[question].append(timed(floor.with_storages, tree) - timed(work, tree))
    print(f"{machine()}\n\n| way | CPU, ms (least-most) |\n| --- | ---: |")
    for name, figures in spent.items():
        print(f"| {name} | {statistics.median(figures):.0f} ({min(figures):.0f}-{max(figures):.0f}) |")
    print("\n| question | CPU, ms |\n| --- | ---: |")
    for question, differences in saved.items():
        print(f"| {question} | {statistics.median(differences):.0f} |")


if __name__ == "__main__":
    asyncio.run(main())
