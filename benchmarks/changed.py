"""Incremental saves: what is written, and how long that takes, when all, some or nothing has changed."""

from __future__ import annotations

import os
import random
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from report import Check

import aiostage

__all__ = ["HEAD", "Changed", "incremental_saves"]

GIB = 2**30
_LAYERS, _RANK = 64, 16
FULL = "everything, not incremental"

HEAD = (
    "| changed since the last save | bytes that changed | written | captured, s | committed, s | by a full save |"
    "\n| --- | ---: | ---: | ---: | ---: | ---: |"
)


class Adapted:
    """Layers with an adapter of low rank behind each, as PEFT's state dicts have them: base, A, B, base, A, B, ..."""

    def __init__(self, nbytes: int) -> None:
        width = int((nbytes / _LAYERS / 4) ** 0.5) // 32 * 32
        self.tree: dict[str, Any] = {}
        for number in range(_LAYERS):
            self.tree[f"layer.{number}.weight"] = torch.rand(width, width)
            self.tree[f"layer.{number}.lora_A"] = torch.rand(_RANK, width)
            self.tree[f"layer.{number}.lora_B"] = torch.rand(width, _RANK)
        self.nbytes = self.change(lambda path: False, everything=True)

    def change(self, which: Callable[[str], bool], *, everything: bool = False) -> int:
        """Change tensors in place, and return their size in bytes."""
        changed = [tensor for path, tensor in self.tree.items() if everything or which(path)]
        for tensor in changed:
            tensor.add_(1)
        return sum(tensor.nbytes for tensor in changed)


CHANGES: dict[str, Callable[[Adapted], int]] = {
    FULL: lambda work: work.change(lambda path: True),
    "everything": lambda work: work.change(lambda path: True),
    "a tenth of the layers": lambda work: work.change(lambda path: int(path.split(".")[1]) % 10 == 0),
    "the adapters": lambda work: work.change(lambda path: "lora" in path),
    "nothing": lambda work: 0,
}


@dataclass
class Changed:
    """One kind of change.

    Attributes:
        what: Which.
        changed: Its size, as a share of all.
        rounds: For each the share written, seconds until captured and until committed, and those of a full save.
    """

    what: str
    changed: float
    rounds: list[tuple[float, float, float, float]]

    @property
    def written(self) -> float:
        """Bytes written by all bytes."""
        return statistics.median(written for written, *_ in self.rounds)

    @property
    def ratio(self) -> float:
        """Time of a save by that of a full one in the same round."""
        return statistics.median(committed / full for _, _, committed, full in self.rounds)

    def as_row(self) -> str:
        """Return a row of a Markdown table."""
        written, captured, committed, _ = (statistics.median(figures) for figures in zip(*self.rounds, strict=True))
        return (
            f"| {self.what} | {100 * self.changed:.1f} % | {100 * written:.1f} % | {captured:.2f} | {committed:.2f} | "
            f"{self.ratio:.2f} |"
        )

    def check(self) -> Check:
        """Return whether it writes what changed, and little else."""
        return Check(f"written when {self.what} changed / all bytes", self.written, self.changed + 0.1)


async def incremental_saves(nbytes: int, rounds: int, directory: str) -> list[Changed]:
    """Save to a local disk, in a new random order of changes each round."""
    work = Adapted(nbytes)
    found = {what: Changed(what, 0.0, []) for what in CHANGES}
    steps = count(1)
    async with (
        aiostage.AsyncStager() as stager,
        aiostage.Checkpointer(os.path.join(directory, "changed"), stager, incremental=True) as checkpoints,
    ):

        async def save() -> aiostage.CheckpointInfo:
            step = next(steps)
            info = await (await checkpoints.save(step, work.tree)).committed()
            # Not left to the checkpointer, whose next save would wait for the removal.
            await checkpoints.delete(step - 1)
            return info

        # The first has nothing to be compared with, and cold memory.
        await save()
        for _ in range(rounds):
            infos = {}
            for what in random.sample(list(CHANGES), len(CHANGES)):
                found[what].changed = CHANGES[what](work) / work.nbytes
                if what == FULL:
                    path = os.path.join(directory, "full")
                    infos[what] = await aiostage.save(work.tree, path, stager=stager)
                    shutil.rmtree(path)
                    # Otherwise the next incremental one would have this change to write too.
                    await save()
                else:
                    infos[what] = await save()
            for what, info in infos.items():
                found[what].rounds.append(
                    (info.written_bytes / work.nbytes, info.captured, info.committed, infos[FULL].committed)
                )
    return list(found.values())
