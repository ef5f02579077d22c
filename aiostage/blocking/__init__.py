"""aiostage for programs without an event loop: the same things, whose methods block until they are done."""

from aiostage.blocking.checkpointer import Checkpointer, SaveHandle
from aiostage.blocking.files import load, save
from aiostage.blocking.stager import Snapshot, Stager
from aiostage.blocking.weights import WeightPublisher, WeightSubscriber

__all__ = [
    "Checkpointer",
    "SaveHandle",
    "Snapshot",
    "Stager",
    "WeightPublisher",
    "WeightSubscriber",
    "load",
    "save",
]
