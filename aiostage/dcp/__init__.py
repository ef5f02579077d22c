"""PyTorch's ``torch.distributed.checkpoint`` from an event loop."""

from aiostage.dcp.checkpointer import Checkpointer, SaveHandle
from aiostage.dcp.group_queue import close
from aiostage.dcp.loader import load
from aiostage.dcp.saver import AsyncSaveResponse, save, start_save
from aiostage.dcp.stager import TorchStager
from aiostage.dcp.storage import StorageReader, StorageWriter

__all__ = [
    "AsyncSaveResponse",
    "Checkpointer",
    "SaveHandle",
    "StorageReader",
    "StorageWriter",
    "TorchStager",
    "close",
    "load",
    "save",
    "start_save",
]
