"""PyTorch's ``torch.distributed.checkpoint`` (DCP) from an event loop.

Read in this order. `saver` and `loader` are the public functions; `group_queue` runs what they ask for, one after the
other, in one thread for each process group; `barrier` decides in the ranks' store whether all of them take part.
`checkpointer` does this for a run. `storage` is DCP's writer and reader over our storages; `records` says what they
write, `unpickling` and `keys` how it is read without running code. `stager` and `loop_thread` serve PyTorch's own
savers, which know no event loop.
"""

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
