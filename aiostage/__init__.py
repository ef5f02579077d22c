"""Asyncio-native staging of PyTorch checkpoints.

``Checkpointer`` keeps the checkpoints of a run: saves them while training goes on, removes old ones, finds the latest.
``save`` and ``load`` write and read one. ``AsyncStager`` makes the copy in host memory that they write, for any other
use::

    async with aiostage.Checkpointer("runs/first", keep=3) as checkpoints:
        await checkpoints.save(step, state_dict)  # returns when captured; written while training goes on

Further: ``aiostage.dcp`` for many ranks, ``aiostage.weights`` for processes that need new weights,
``aiostage.blocking`` for programs without an event loop, ``aiostage.storage`` for object stores, ``aiostage.testing``
for tests. Everything raised on purpose is a ``StagingError``, or the standard exception for wrong arguments.
"""

from typing import TYPE_CHECKING

from aiostage._loop.polling import wait_event
from aiostage.abc import Backend, CheckpointStager, SupportsQuery
from aiostage.checkpoint.checkpointer import Checkpointer
from aiostage.checkpoint.load import load
from aiostage.checkpoint.save import save
from aiostage.checkpoint.save_task import SaveHandle
from aiostage.checkpoint.writer import CheckpointInfo
from aiostage.errors import (
    AcceleratorUnavailableError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    HostMemoryError,
    RankFailedError,
    StagerClosedError,
    StagingError,
    StorageError,
    TornSnapshotError,
    UnsupportedLeafError,
    WeightsError,
)
from aiostage.leaf import StagedLeaf
from aiostage.options import StagerStatistics, StagingOptions
from aiostage.snapshot import Snapshot
from aiostage.stager import AsyncStager, adapt

if TYPE_CHECKING:
    from types import ModuleType

    from aiostage import blocking, dcp, storage, testing, weights  # noqa: F401 - reachable, and imported when asked for

__all__ = [
    "AcceleratorUnavailableError",
    "AsyncStager",
    "Backend",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointInfo",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointStager",
    "Checkpointer",
    "HostMemoryError",
    "RankFailedError",
    "SaveHandle",
    "Snapshot",
    "StagedLeaf",
    "StagerClosedError",
    "StagerStatistics",
    "StagingError",
    "StagingOptions",
    "StorageError",
    "SupportsQuery",
    "TornSnapshotError",
    "UnsupportedLeafError",
    "WeightsError",
    "adapt",
    "load",
    "save",
    "wait_event",
]

_LAZY = ("blocking", "dcp", "storage", "testing", "weights")


def __getattr__(name: str) -> "ModuleType":
    """Import a module of the package when it is first asked for: some take long, or need what is optional."""
    if name in _LAZY:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
