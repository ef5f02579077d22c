"""Where checkpoints lie: the protocol, and the storages that come with it."""

from aiostage.abc import Buffer, Draft, Reader, Storage
from aiostage.storage.local import LocalStorage
from aiostage.storage.locate import locate, storage_at

__all__ = ["Buffer", "Draft", "LocalStorage", "Reader", "Storage", "locate", "storage_at"]
