"""All that users may implement: stagers, backends, storages, observers, and what can be waited for."""

from aiostage.abc.observing import Observer, Span
from aiostage.abc.staging import Backend, CheckpointStager, SupportsQuery
from aiostage.abc.storage import Buffer, MultiWriterCheckpoint, MultiWriterStorage, PendingCheckpoint, Reader, Storage

__all__ = [
    "Backend",
    "Buffer",
    "CheckpointStager",
    "MultiWriterCheckpoint",
    "MultiWriterStorage",
    "Observer",
    "PendingCheckpoint",
    "Reader",
    "Span",
    "Storage",
    "SupportsQuery",
]
