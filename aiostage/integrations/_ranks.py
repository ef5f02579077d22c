"""What the processes of one data-parallel training decide together around a checkpoint, and what they cannot save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["Ranks", "refuse_partitioned", "refuse_sharded"]


class Ranks:
    """The processes of the training, or this one alone. Every method is a collective: all ranks call it."""

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        if self.alone:
            return flag
        said = torch.tensor([flag], dtype=torch.int32, device="cpu")
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._gloo())
        return bool(said.item())

    def gather(self, item: Any) -> list[Any]:
        """Return the items of all ranks, by rank; on ranks other than the first, an empty list."""
        if self.alone:
            return [item]
        gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(item, gathered or None, dst=0, group=self._gloo())
        return gathered

    def from_first(self, item: Any) -> Any:
        """Return the item of the first rank."""
        if self.alone:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self._gloo())
        return box[0]

    def _gloo(self) -> Any:
        # A group of its own, on the CPU: collectives neither wait for a device nor mix with those of the trainer. It is
        # made at the first use, which all ranks reach in the same order.
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group


def refuse_sharded(model: torch.nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Refuse a model of which this rank has only a part: of DTensors, FSDP 1 or DeepSpeed's ZeRO 3.

    Args:
        model: Without the wrapper of DistributedDataParallel.
        state: Its state dict.
        name: The name of the model, for the error.

    Raises:
        UnsupportedLeafError: If a tensor is sharded over ranks.
    """
    for key, value in state.items():
        if (
            hasattr(value, "device_mesh")
            and hasattr(value, "placements")
            and any(not placement.is_replicate() for placement in value.placements)
        ):
            raise _sharded(f"the tensor is sharded over ranks ({', '.join(map(str, value.placements))})", (name, key))
    # The state dict of FSDP 1 may be whole. The optimizer's state still is that of this rank's flat parameters.
    if dist.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        for key, module in model.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                raise _sharded("the module is sharded over ranks by FullyShardedDataParallel", (name, key))
    for key, parameter in model.named_parameters():
        # DeepSpeed empties the parameter itself. The state dict has detached copies, which do not show that.
        if hasattr(parameter, "ds_id"):
            raise _sharded("the parameter is partitioned over ranks by DeepSpeed (ZeRO 3)", (name, key))


def refuse_partitioned(optimizer: Any, name: str) -> None:
    """Refuse an optimizer of DeepSpeed. From ZeRO 1 on, it has only this rank's part of the state.

    Raises:
        UnsupportedLeafError: If it is such an optimizer, or wraps one.
    """
    # Wrappers such as Accelerate's have the inner optimizer as `optimizer`. The list guards against a circle.
    seen: list[Any] = []
    while optimizer is not None and all(optimizer is not each for each in seen):
        if any(cls.__module__.split(".")[0] == "deepspeed" for cls in type(optimizer).__mro__):
            raise _sharded("DeepSpeed partitions the state of the optimizer over ranks", (name,))
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)


def _sharded(reason: str, path: tuple[str, ...]) -> UnsupportedLeafError:
    return UnsupportedLeafError(
        f"{reason}, and one rank writes.",
        path=format_path(tuple(part for part in path if part)),
        remedy="Save sharded models with aiostage.dcp on all ranks; with DeepSpeed, by its own save_checkpoint().",
    )
