"""The way back: staged values into live tensors."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from aiostage._capture.plan import BATCH_BYTES, BATCH_LEAVES
from aiostage._capture.walk import Walk
from aiostage._copy.host import copy_tensors
from aiostage._copy.staging import Resources
from aiostage._loop.cleanup import finish
from aiostage._loop.slices import Slices
from aiostage.errors import CheckpointMismatchError
from aiostage.leaf import Path, format_path

__all__ = ["restore"]


async def restore(resources: Resources, staged: Any, into: Any) -> None:
    """Copy every tensor of one tree into its twin in the other, after both were found to match."""
    slices = Slices(resources.options.max_loop_hold)
    sources, targets = [await _leaves(slices, tree) for tree in (staged, into)]
    mismatched = [
        f"{format_path(path)} ({_describe(sources[path])} into {_describe(targets[path])})"
        for path in sources.keys() & targets.keys()
        if _describe(sources[path]) != _describe(targets[path])
    ]
    missing = [format_path(path) for path in targets.keys() - sources.keys()]
    unexpected = [format_path(path) for path in sources.keys() - targets.keys()]
    if missing or unexpected or mismatched:
        raise CheckpointMismatchError(
            missing=sorted(missing), unexpected=sorted(unexpected), mismatched=sorted(mismatched)
        )
    job = resources.workers.job()
    batch: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    nbytes = 0
    for path, target in targets.items():
        if isinstance(target, UninitializedTensorMixin):
            continue
        batch[0].append(target)
        batch[1].append(sources[path])
        nbytes += target.nbytes
        if nbytes >= BATCH_BYTES or len(batch[0]) >= BATCH_LEAVES:
            job.put(partial(copy_tensors, *batch))
            batch, nbytes = ([], []), 0
    if batch[0]:
        job.put(partial(copy_tensors, *batch))
    job.close()
    # Half a restore is neither the old state nor the new: once begun it is finished.
    await finish(job.settled)
    if job.error is not None:
        raise job.error


def _describe(tensor: torch.Tensor) -> str:
    if isinstance(tensor, UninitializedTensorMixin):
        return "uninitialized"
    return f"{tensor.dtype} {tuple(tensor.shape)}"


async def _leaves(slices: Slices, tree: Any) -> dict[Path, torch.Tensor]:
    walk = Walk(passthrough=None, copy_now=copy.copy)
    await slices.run(walk.run(tree))
    leaves = {walk.path(index): tensor for index, tensor in enumerate(walk.leaves.tensors)}
    walk.release()
    return leaves
