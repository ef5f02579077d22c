"""What the processes of one data-parallel training have to settle among themselves around a checkpoint."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from aiostage.errors import UnsupportedLeafError
from aiostage.leaf import format_path

__all__ = ["Ranks", "read_generators", "refuse_sharded", "write_generators"]


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


def write_generators(*, all_devices: bool) -> torch.Tensor:
    """Return the state of all generators of random numbers, as a file of the Trainer's ``rng_state.pth`` has it.

    Args:
        all_devices: Of all CUDA devices, and not of the current one only.
    """
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    device: Any = torch.get_device_module("cuda")
    if device.is_available():
        state["cuda"] = device.get_rng_state_all() if all_devices else device.get_rng_state()
    stream = io.BytesIO()
    torch.save(state, stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def read_generators(saved: torch.Tensor) -> None:
    """Set the generators to what :func:`write_generators` has returned."""
    # Pickles of NumPy's own kinds are in it, which weights_only refuses; the bytes come from our checkpoint.
    state = torch.load(io.BytesIO(bytes(saved.numpy())), weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    device: Any = torch.get_device_module("cuda")
    if "cuda" in state and device.is_available():
        (device.set_rng_state_all if isinstance(state["cuda"], list) else device.set_rng_state)(state["cuda"])


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
