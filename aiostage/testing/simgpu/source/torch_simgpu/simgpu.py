"""``torch.simgpu``: what PyTorch and its distributed checkpoints ask of a device's module, and what tests need."""

from __future__ import annotations

from typing import Any

import torch

from torch_simgpu import _C
from torch_simgpu._C import (
    Gate,
    chunked,
    copy_delay,
    drain,
    fail_device,
    fail_later,
    in_use,
    kernel_delay,
    memory_limit,
    pageable_async,
    pending,
    poison,
    seed,
    sleep,
    stats,
    sync_watch,
    watched_syncs,
)

__all__ = [
    "Event",
    "Gate",
    "Stream",
    "chunked",
    "copy_delay",
    "current_device",
    "current_stream",
    "device",
    "device_count",
    "drain",
    "fail_device",
    "fail_later",
    "get_amp_supported_dtype",
    "get_rng_state",
    "in_use",
    "init",
    "is_available",
    "is_initialized",
    "kernel_delay",
    "manual_seed",
    "manual_seed_all",
    "memory_limit",
    "pageable_async",
    "pending",
    "poison",
    "seed",
    "set_device",
    "set_rng_state",
    "sleep",
    "stats",
    "stream",
    "sync_watch",
    "synchronize",
    "watched_syncs",
]

_initialized = False


class device:
    """Makes a device current for a block."""

    def __init__(self, device: Any) -> None:
        self.idx = torch.accelerator._get_device_index(device, optional=True)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = _C._exchangeDevice(self.idx)

    def __exit__(self, *error: object) -> None:
        _C._set_device(self.prev_idx)


def is_available() -> bool:
    """Return True."""
    return True


def device_count() -> int:
    """Return how many devices there are."""
    return int(_C._get_device_count())


def current_device() -> int:
    """Return the calling thread's current device."""
    return int(_C._get_device())


def set_device(device: int) -> None:
    """Change the calling thread's current device."""
    _C._set_device(device)


def init() -> None:
    """Begin to use the devices."""
    _lazy_init()


def is_initialized() -> bool:
    """Return whether this process has begun to use the devices."""
    return _initialized and not _is_in_bad_fork()


def _is_in_bad_fork() -> bool:
    return bool(_C._isInBadFork())


def _lazy_init() -> None:
    global _initialized
    if not is_initialized():
        _C._init()
        _initialized = True


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes of mixed precision."""
    return [torch.float16, torch.bfloat16]


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices."""
    for index in range(device_count()):
        _C._get_default_generator(index).manual_seed(seed)


manual_seed = manual_seed_all


def get_rng_state(device: Any = "simgpu") -> torch.Tensor:
    """Return the state of the current device's generator."""
    state: torch.Tensor = _C._get_default_generator(current_device()).get_state()
    return state


def set_rng_state(state: torch.Tensor, device: Any = "simgpu") -> None:
    """Set the state of the current device's generator."""
    _C._get_default_generator(current_device()).set_state(state)


def current_stream(device: Any = None) -> torch.Stream:
    """Return the calling thread's current stream of a device."""
    return torch.accelerator.current_stream(device if device is not None else torch.device("simgpu", current_device()))


def stream(stream: torch.Stream) -> torch.Stream:
    """Return what makes a stream current for a block: itself."""
    return stream


def synchronize(device: Any = None) -> None:
    """Block until the devices have done all that they were told to."""
    drain()


def Stream(*arguments: Any, **options: Any) -> torch.Stream:
    """Return a new stream of the current device."""
    return torch.Stream("simgpu", *arguments, **options)


def Event(*arguments: Any, **options: Any) -> torch.Event:
    """Return a new event."""
    return torch.Event("simgpu", *arguments, **options)
