"""PyTorch's ``torch.distributed.checkpoint`` from an event loop."""

from aiostage.dcp.channel import close
from aiostage.dcp.checkpointer import Checkpointer, SaveHandle
from aiostage.dcp.loader import load
from aiostage.dcp.saver import Saving, save, start_save
from aiostage.dcp.stager import TorchStager
from aiostage.dcp.storage import StorageReader, StorageWriter

__all__ = [
    "Checkpointer",
    "SaveHandle",
    "Saving",
    "StorageReader",
    "StorageWriter",
    "TorchStager",
    "close",
    "load",
    "save",
    "start_save",
]
