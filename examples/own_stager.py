"""Stagers of one's own, and PyTorch's: whatever has `stage` and `aclose` can be given to `save`.

A `CheckpointStager` needs two coroutines. The one here keeps only what differs from the last copy, byte for byte,
which pays where most of a model is frozen. `adapt` gives a synchronous stager of PyTorch the same two coroutines.
"""

from __future__ import annotations

import asyncio
import copy
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from aiostage import AsyncStager, CheckpointInfo, CheckpointStager, StagerClosedError, adapt, load, save

T = TypeVar("T")


class SparingStager(CheckpointStager):
    """Copies a tensor only if it differs from the last copy of it."""

    def __init__(self) -> None:
        self.copied = 0
        self._last: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = {}

    async def stage(self, state_dict: T) -> T:
        if self._last is None:
            raise StagerClosedError
        # In a thread, because comparing is work; the caller changes nothing before this returns.
        return await asyncio.to_thread(self._stage, state_dict, self._last)

    async def aclose(self) -> None:
        self._last = None

    def _stage(self, state_dict: T, last: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> T:
        staged: dict[int, object] = {}
        for tensor in state_dict.values():  # type: ignore[attr-defined]
            known = last.get(tensor.data_ptr())
            if known is None or not torch.equal(known[1], tensor):
                self.copied += 1
                known = last[tensor.data_ptr()] = (tensor, tensor.detach().clone())
            staged[id(tensor)] = known[1]
        # What the memo already knows, deepcopy takes from there.
        return copy.deepcopy(state_dict, staged)


def describe(name: str, info: CheckpointInfo) -> None:
    print(f"{name:<14} {info.leaves} tensors, {info.nbytes:,} bytes: {', '.join(info.files)}")


async def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 10))
    torch_stager = DefaultStager(
        TorchStagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        async with SparingStager() as sparing, adapt(torch_stager) as adapted, AsyncStager() as stager:
            for name, each in (("sparing", sparing), ("adapted", adapted), ("AsyncStager", stager)):
                describe(name, await save(model.state_dict(), Path(folder) / name, stager=each))
            nn.init.zeros_(model[2].bias)
            await save(model.state_dict(), Path(folder) / "sparing", stager=sparing, overwrite=True)
            print(f"the sparing stager made {sparing.copied} copies for two checkpoints of {len(model.state_dict())}")
        trees = [await load(Path(folder) / name) for name in ("sparing", "AsyncStager")]
    same = [key for key in trees[0] if torch.equal(trees[0][key], trees[1][key])]
    print(f"{len(same)} of {len(trees[0])} tensors are as they were; {set(trees[0]) - set(same)} has changed")


asyncio.run(main())
