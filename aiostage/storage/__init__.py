"""Storages: where checkpoints lie.

Read in this order. `locate` makes a storage from a path, a URL or a store, and names the checkpoints of a run. Local
disks: `local` is the storage, `commit` makes a directory appear as a whole, `files` has descriptors, locks and direct
I/O. Object stores: `remote` is the storage, `pointer` says which folder of objects is the checkpoint, `clean_up` finds
the files of dead writers. `bucket` is the interface to a store; `objects` implements it with obstore, `remote_files`
with fsspec.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aiostage._extras import needed_for
from aiostage.abc import Buffer, PendingCheckpoint, Reader, Storage
from aiostage.storage.local import LocalStorage
from aiostage.storage.locate import locate, storage_at

if TYPE_CHECKING:
    from aiostage.storage.objects import ObjectStorage
    from aiostage.storage.remote_files import FsspecStorage

__all__ = [
    "Buffer",
    "FsspecStorage",
    "LocalStorage",
    "ObjectStorage",
    "PendingCheckpoint",
    "Reader",
    "Storage",
    "locate",
    "storage_at",
]

_NEEDS_AN_EXTRA = {"FsspecStorage": "remote_files", "ObjectStorage": "objects"}


def __getattr__(name: str) -> Any:
    """Import a storage that needs an optional package when it is first asked for."""
    if name not in _NEEDS_AN_EXTRA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_for(name):
        return getattr(import_module(f"{__name__}.{_NEEDS_AN_EXTRA[name]}"), name)
