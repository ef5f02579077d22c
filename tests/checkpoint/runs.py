"""What runs save that change little from step to step, and which files their checkpoints then consist of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aiostage.abc import Storage
from aiostage.incremental.references import placement_of
from aiostage.storage.locate import removed_by_tombstone
from aiostage.storage.pointer import LEASE_NAME, POINTER_NAME
from tests.checkpoint.memory_storage import MANIFEST
from tests.checkpoint.names import name_of

MIB = 1 << 20


def numbers(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


class LoRA:
    """A frozen tower and a small adapter that learns."""

    def __init__(self, layers: int = 20) -> None:
        self.tower = {f"layer{n}": numbers(2 * MIB // 4, n) for n in range(layers)}
        self.adapter = {f"layer{n}": numbers(MIB // 80, n) for n in range(layers)}

    def train(self) -> None:
        for tensor in self.adapter.values():
            tensor.add_(1)

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"step": step, "adapter": self.adapter, "tower": self.tower}


def copied(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: value.clone() for key, value in branch.items()} if isinstance(branch, dict) else branch
        for name, branch in tree.items()
    }


class Run:
    """A frozen tower, something that changes piece by piece, and an adapter that learns."""

    def __init__(self) -> None:
        self.tower = numbers(4 * MIB // 4, 0)
        self.slow = {f"p{n}": numbers(MIB // 4, n) for n in range(6)}
        self.adapter = numbers(1000, 99)

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"step": step, "slow": self.slow, "adapter": {"weight": self.adapter}, "tower": {"weight": self.tower}}

    def train(self, step: int) -> None:
        self.adapter.add_(1)
        for number in (step, step + 2):
            self.slow[f"p{number % 6}"].add_(1)


def in_directory(root: Path) -> dict[tuple[str, str], int]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {(path.relative_to(root).parts[0], path.name): path.stat().st_size for path in paths}


async def needed(storage: Storage, steps: list[int]) -> dict[tuple[str, str], int]:
    """Return the files that checkpoints consist of, wherever they lie, with their sizes."""
    found: dict[tuple[str, str], int] = {}
    for step in steps:
        placement = await placement_of(storage, name_of(step))
        assert placement is not None
        found |= {(source or name_of(step), file): nbytes for (source, file), nbytes in placement.sizes.items()}
    return found


def apart_from_the_small(files: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Leave out what every checkpoint and every tombstone has, which is small."""
    small = {key for key in files if key[1] in (MANIFEST, POINTER_NAME, LEASE_NAME) or removed_by_tombstone(key[0])}
    assert sum(files[key] for key in small) < 100_000
    return {key: nbytes for key, nbytes in files.items() if key not in small}
