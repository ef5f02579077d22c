"""What the processes of one data-parallel training have to settle among themselves around a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["Ranks", "refuse_sharded"]


class Ranks:
    """The processes of the training, or this one alone. Every method is a collective: all ranks call it."""

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1

    def any(self, flag: bool) -> bool:
        """Return whether any rank says so."""
        if self.alone:
            return flag
        said = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._gloo())
        return bool(said.item())

    def gather(self, item: Any) -> list[Any]:
        """Return what each rank has given, by rank; on ranks other than the first, nothing."""
        if self.alone:
            return [item]
        gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(item, gathered or None, dst=0, group=self._gloo())
        return gathered

    def from_first(self, item: Any) -> Any:
        """Return what the first rank has given."""
        if self.alone:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self._gloo())
        return box[0]

    def _gloo(self) -> Any:
        # On the CPU, so that it neither waits for a device nor makes it wait.
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group


def refuse_sharded(state: dict[str, Any], name: str) -> None:
    """Refuse a state dict that has only this rank's part of its tensors.

    Raises:
        UnsupportedLeafError: If one is sharded.
    """
    for key, value in state.items():
        if (
            hasattr(value, "device_mesh")
            and hasattr(value, "placements")
            and any(not placement.is_replicate() for placement in value.placements)
        ):
            raise UnsupportedLeafError(
                f"the tensor is sharded over ranks ({', '.join(map(str, value.placements))}), and one rank writes.",
                path=format_path((name, key)),
                remedy="Save sharded models with aiostage.dcp, on all ranks.",
            )
