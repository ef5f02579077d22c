"""Where checkpoints lie: the protocol, and the storages that come with it.

How the room is read. `locate` makes a storage of what users pass. On disks: `local`, then `commit`, which makes a
directory appear as a whole, and `files`, what the system has. In stores of objects: `remote`, then `pointer`, which
makes a folder of objects a checkpoint, and `clean_up`, which finds what dead writers left. `bucket` is what these need
of a store; `objects` and `remote_files` have it, by obstore and fsspec.
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
    """Import what needs a package that need not be installed, once it is asked for."""
    if name not in _NEEDS_AN_EXTRA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_for(name):
        return getattr(import_module(f"{__name__}.{_NEEDS_AN_EXTRA[name]}"), name)
