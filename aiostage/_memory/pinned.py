"""Registering arenas with an accelerator, so that its copy engines reach them directly."""

from __future__ import annotations

import logging
import threading

import torch

from aiostage._loop.coroutines import Finalizer
from aiostage._loop.forks import register_after_fork
from aiostage._memory.arena import Arena
from aiostage._platform.limits import locked_memory_limit
from aiostage.abc import Backend
from aiostage.errors import AcceleratorUnavailableError

__all__ = ["Pinning"]

_logger = logging.getLogger("aiostage")


class Pinning:
    """How a pool registers its arenas, and what it does when that fails.

    An arena is registered once and as a whole: drivers take a copy that crosses from one registration into the next
    for an error or for pageable memory. It stays registered until it is closed.

    Args:
        backend: Whose registration to use.
        required: Raise when a registration fails. Otherwise the first failure is logged with its likely cause, and
            staging goes on in memory that is not registered.

    Attributes:
        failed: Whether a registration has failed; none is tried again.
    """

    def __init__(self, backend: Backend, *, required: bool = False) -> None:
        self._backend = backend
        self._required = required
        self._lock = threading.Lock()
        self.failed = False
        register_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Begin anew in a child."""
        self._lock = threading.Lock()

    def wants(self, arena: Arena) -> bool:
        """Return whether an arena is still to be registered."""
        return not (arena.pinned or self.failed)

    def register(self, arena: Arena, device: torch.device) -> None:
        """Register an arena with a device, unless that has been done or it was closed meanwhile.

        Blocks, for some 0.1 s a GiB: call it from a worker thread.

        Args:
            arena: Best populated before, which many threads can do at once and the driver does with one.
            device: The accelerator.

        Raises:
            AcceleratorUnavailableError: If the driver refuses and pinning is required.
        """
        with arena.registering:
            if arena.closed or not self.wants(arena):
                return
            try:
                self._backend.register(arena.address, arena.nbytes, device)
            except OSError as error:
                self._refused(arena, device, error)
                return
            # Only now is it pinned, so that an error above leaves nothing to undo. Not at exit: the driver may be gone
            # by then, and its registrations with it.
            arena.pinning = Finalizer(arena, self._backend.unregister, arena.address, device)
            arena.leave_out_of_children()

    def _refused(self, arena: Arena, device: torch.device, error: OSError) -> None:
        reason = f"{device} cannot register {arena.nbytes} bytes of host memory: {error}. {_memory_lock_limit()}"
        if self._required:
            raise AcceleratorUnavailableError(
                reason, remedy="Raise that limit, stage less at once, or set use_pinned_memory=None to go on without."
            ) from error
        with self._lock:
            first, self.failed = not self.failed, True
        if first:
            _logger.warning("%s Copies go on in memory that is not pinned, which is slower.", reason)


def _memory_lock_limit() -> str:
    """Say how much memory this process may lock."""
    limit = locked_memory_limit()
    amount = "no limit on locked memory" if limit is None else f"a limit of {limit} bytes of locked memory"
    return f"This process has {amount} (RLIMIT_MEMLOCK, shown in KiB by `ulimit -l`)."
