"""PyTorch's ``torch.distributed.checkpoint`` from an event loop."""

from aiostage.dcp.channel import close
from aiostage.dcp.loader import load
from aiostage.dcp.saver import Saving, save, start_save
from aiostage.dcp.stager import TorchStager

__all__ = ["Saving", "TorchStager", "close", "load", "save", "start_save"]
