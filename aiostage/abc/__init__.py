"""All that users may implement: stagers, backends, storages, observers, and what can be waited for."""

from aiostage.abc.observing import Observer, Span
from aiostage.abc.staging import Backend, CheckpointStager, SupportsQuery
from aiostage.abc.storage import Buffer, Draft, Reader, SharedDraft, SharedStorage, Storage

__all__ = [
    "Backend",
    "Buffer",
    "CheckpointStager",
    "Draft",
    "Observer",
    "Reader",
    "SharedDraft",
    "SharedStorage",
    "Span",
    "Storage",
    "SupportsQuery",
]
